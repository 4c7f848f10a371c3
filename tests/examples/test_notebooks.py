"""The committed notebooks run from a clean kernel without a network, and show what they would show again.

Each runs at the size of its switch that takes seconds; the one on other models has one size only, so what it prints is
compared number by number.
"""

import ast
import functools
import json
import re
import runpy
import zlib
from typing import Any

import nbformat
import pytest
from long_cases import rest_long
from nbclient.exceptions import CellExecutionError

import revprobe

ANY_MODEL = "02_attach_any_model.ipynb"
SIZED = ["01_one_layer.ipynb", "03_finetune_and_watch.ipynb", "04_storage_and_routes.ipynb"]
SIZED += ["05_why_the_reverse_answer_fades.ipynb", "06_inside_a_deep_model.ipynb"]
NOTEBOOKS = sorted([ANY_MODEL, *SIZED])
SWITCH = "REVPROBE_NOTEBOOK_SIZE"
READINGS = ("attention_correlation", "gradient_cosine", "reverse_probability")
MODELS = 4  # each prints its three readings
PLOTLY, PICTURE = "application/vnd.plotly.v1+json", "image/png"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
INTERVAL = re.compile(r"\[(-?\d+\.?\d*), (-?\d+\.?\d*)\]")
BYTES = 480_000


@pytest.fixture(scope="module")
def stored(root):
    """The committed notebook of a name."""
    return lambda name: nbformat.read(root / "examples" / name, as_version=4)


@pytest.fixture(scope="module")
def rerun(root, tmp_path_factory):
    """A notebook with the outputs of a kernel that has an empty home, nothing on its path, and no network."""
    runner = runpy.run_path(str(root / "examples" / "run_notebook.py"))

    @functools.cache
    def run(name: str) -> Any:
        home = tmp_path_factory.mktemp("home")
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "HF_HOME"):
                patch.setenv(variable, str(home / variable.lower()))
            for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):  # whoever asks the network is refused
                patch.setenv(variable, "http://127.0.0.1:9")
            patch.delenv("PYTHONPATH", raising=False)
            size = "small" if name in SIZED else "full"
            return runner["executed"](root / "examples" / name, home, size=size, pictures=False)

    return run


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def tree(notebook) -> ast.Module:
    return ast.parse("\n".join(cell.source for cell in code(notebook)))


def printed(notebook, name: str = "stdout") -> str:
    streams = (o for cell in code(notebook) for o in cell.outputs if o.output_type == "stream")
    return "".join(o.text for o in streams if o.name == name)


def bundles(notebook) -> list[dict]:
    return [o.data for cell in code(notebook) for o in cell.outputs if "data" in o]


def shown(output) -> tuple:
    """What an output is, whatever the numbers in it: text, a figure, or a table with its columns."""
    if output.output_type != "display_data" and "data" not in output:
        return (output.output_type, output.get("name"))
    if PLOTLY in output.data or PICTURE in output.data:
        return ("figure",)
    head = re.search(r"<thead>.*?</thead>", output.data.get("text/html", ""), re.S)
    return ("table", *re.findall(r"<th>([^<]*)</th>", head[0])) if head else tuple(sorted(output.data))


def sizes(notebook) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the switch chooses between, full and small: the names of `A, B = small if SMALL else full`."""
    assigned = [node for node in ast.parse(code(notebook)[0].source).body if isinstance(node, ast.Assign)]
    (choice,) = (node for node in assigned if isinstance(node.value, ast.IfExp))
    assert ast.unparse(choice.value.test) == "SMALL"
    names = [name.id for name in choice.targets[0].elts]
    full, small = (ast.literal_eval(part) for part in (choice.value.orelse, choice.value.body))
    return dict(zip(names, full, strict=True)), dict(zip(names, small, strict=True))


# ---- what runs ----


@pytest.mark.parametrize("name", rest_long(NOTEBOOKS))
def test_it_runs_without_error_or_warning(rerun, name):
    """Its own assertions are among what runs: they hold at both sizes."""
    done = rerun(name)
    assert not [o for cell in code(done) for o in cell.outputs if o.output_type == "error"]
    assert printed(done, "stderr") == ""


@pytest.mark.parametrize("name", rest_long(SIZED))
def test_the_committed_outputs_are_those_of_these_cells_at_the_full_size(stored, rerun, name):
    """Stale outputs turn this red: cell by cell the same texts, figures and tables, and the full number of steps."""
    old, new = stored(name), rerun(name)
    assert [[shown(o) for o in cell.outputs] for cell in code(old)] == [
        [shown(o) for o in cell.outputs] for cell in code(new)
    ]
    full, small = sizes(old)
    assert re.search(rf"\b{full['STEPS']}\b", printed(old)), "not of the full size; run examples/run_notebook.py"
    assert re.search(rf"\b{small['STEPS']}\b", printed(new)), "the switch did nothing"
    assert full["STEPS"] > small["STEPS"] and full["WIDTH"] > small["WIDTH"]


@pytest.mark.parametrize("name", rest_long(SIZED))
def test_a_sized_notebook_shows_readings_with_interval_n_and_control(rerun, name):
    """No number alone: every table of readings has them, and every figure says what its bars or bands are."""
    tables = [shown(o) for cell in code(rerun(name)) for o in cell.outputs if shown(o)[0] == "table"]
    with_value = [table for table in tables if "value" in table]
    assert with_value
    assert all({"low", "high", "n", "control"} <= set(table) for table in with_value), tables
    for data in bundles(rerun(name)):
        if PLOTLY in data:
            figure = json.dumps(data[PLOTLY], ensure_ascii=False)
            assert re.search(r"95 %|control", figure), f"no interval and no control: {figure[:300]}"


@pytest.mark.long
def test_four_models_print_three_readings_each_and_the_bridge_agrees(rerun):
    done = rerun(ANY_MODEL)
    text = printed(done)
    assert [text.count(f"Reading({name}=") for name in READINGS] == [MODELS] * 3, text
    titles = [data[PLOTLY]["layout"]["title"]["text"] for data in bundles(done) if PLOTLY in data]
    for words in ("Pearson r within groups", "gradient cosine", "reverse probability"):
        assert any(words in title for title in titles), titles
    assert text.count("equal to 1e-4: True") == 1 + len(READINGS), "the bridge gives other numbers"


def test_the_error_comes_first_and_names_the_remedy(rerun):
    done = rerun(ANY_MODEL)
    assert re.search(r"must be the same tokens in both directions; put a carrier .*carrier='Fact: '", printed(done))
    tables = [data["text/html"] for data in bundles(done) if "background:#E69F00" in data.get("text/html", "")]
    assert "swapped" in tables[0] and "␣Baldan" in tables[0], "the pair table of the Llama is not shown"


def test_what_is_committed_is_what_a_run_prints(stored, rerun):
    """Stale outputs turn this red: the words exactly, the numbers to what another CPU may round."""
    old, new = printed(stored(ANY_MODEL)), printed(rerun(ANY_MODEL))
    assert NUMBER.sub("#", old) == NUMBER.sub("#", new), "run `python examples/run_notebook.py` and commit the outputs"
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (old, new)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-2, abs=1e-3)
    kinds = [[shown(o) for cell in code(one(ANY_MODEL)) for o in cell.outputs] for one in (stored, rerun)]
    assert kinds[0] == kinds[1]


# ---- what is committed ----


def outputs(notebook) -> str:
    """Every text that cells print, tables included."""
    return printed(notebook) + "\n".join(bundle.get("text/plain", "") for bundle in bundles(notebook))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_interval_that_the_prose_names_stands_in_the_outputs(stored, name):
    """What is said to have come out, beside what did: prose is not drawn, and outputs move without it."""
    notebook = stored(name)
    there = {float(number) for number in NUMBER.findall(outputs(notebook))}
    told = {bound for text in markdown(notebook) for pair in INTERVAL.findall(text) for bound in pair}
    for digits in range(4):
        # As it stands, in per cent, or as a loss where the output has the log-probability.
        near = {round(one * scale, digits) for one in there for scale in (1, 100, -1)}
        missing = [bound for bound in told if len(bound.partition(".")[2]) == digits and float(bound) not in near]
        assert not missing, f"in no output of {name}"


def test_the_prose_that_is_held_to_its_outputs_is_there(stored):
    """The check above would pass on notebooks that name no interval."""
    told = [INTERVAL.findall(text) for text in markdown(stored("06_inside_a_deep_model.ipynb"))]
    assert sum(map(len, told)) >= 12


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_committed_file_is_whole_small_and_opens_offline(root, stored, name):
    """In order, no error, figures as pictures; no path, address, time or script of the machine that ran it."""
    notebook = stored(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [o for cell in code(notebook) for o in cell.outputs if o.output_type == "error"]
    assert printed(notebook, "stderr") == ""
    assert (root / "examples" / name).stat().st_size < BYTES
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert not any(o.get("metadata") for cell in code(notebook) for o in cell.outputs)
    assert not [data for data in bundles(notebook) if PLOTLY in data], "install kaleido and run it again"
    assert any(PICTURE in data for data in bundles(notebook))
    text = re.sub(r'"image/png": "[^"]*"', "", json.dumps(notebook))
    assert not re.findall(r"https?://[^\"\\]*|<script|(?:/[\w.-]+){2,}", text), "a path, address or script"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_uses_the_public_names_alone(stored, name):
    """A name the package does not export, or an import from inside it, would teach what may change."""
    parsed = tree(stored(name))
    used = {n.attr for n in ast.walk(parsed) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "rp"}
    assert used and used <= set(revprobe.__all__), used - set(revprobe.__all__)
    froms = {n.module for n in ast.walk(parsed) if isinstance(n, ast.ImportFrom)}
    imports = {a.name for n in ast.walk(parsed) if isinstance(n, ast.Import) for a in n.names}
    assert "revprobe" in imports and not [m for m in froms | imports if str(m).startswith("revprobe.")]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_section_says_first_what_the_reader_will_see(stored, name):
    sections = [text for text in markdown(stored(name)) if text.startswith("#")]
    assert len(sections) > 4
    for text in sections:
        assert text.split("\n\n")[1].startswith("**You will see**"), text.splitlines()[0]


@pytest.mark.parametrize("name", SIZED)
def test_a_sized_notebook_says_what_its_figures_do_not_show_and_asserts_what_must_hold(stored, name):
    """A figure without its limits would be read as a finding; a cell that asserts holds at both sizes."""
    text = "\n".join(markdown(stored(name)))
    assert text.lower().count("does not show") >= 2
    assert "one seed" in text
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree(stored(name)))) >= 5


# ---- the switch and the runner ----


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_switch_is_documented_and_read_in_the_first_cell(root, stored, name):
    assert SWITCH in markdown(stored(name))[0]
    assert SWITCH in (root / "examples" / "run_notebook.py").read_text(encoding="utf-8").split('"""')[1]
    reading = [place for place, cell in enumerate(code(stored(name))) if SWITCH in cell.source]
    assert reading == ([0] if name in SIZED else [])


def test_a_cell_that_fails_is_an_error_that_shows_it(root, tmp_path):
    """The planted fault: `executed` must not store a notebook that broke."""
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    runner = runpy.run_path(str(root / "examples" / "run_notebook.py"))
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner["executed"](tmp_path / "broken.ipynb", tmp_path)
    with pytest.raises(ValueError, match="size 'tiny': expected one of full, small"):
        runner["executed"](tmp_path / "broken.ipynb", tmp_path, size="tiny")


def test_printed_text_is_joined_with_its_neighbour_and_with_nothing_else(root):
    """Cut by the kernel's clock, it would differ from run to run; moved past a table, it would tell another story."""
    joined = runpy.run_path(str(root / "examples" / "run_notebook.py"))["joined"]
    stream = lambda name, text: nbformat.v4.new_output("stream", name=name, text=text)  # noqa: E731
    table = nbformat.v4.new_output("display_data", data={"text/html": "<table>"})
    parts = [("stdout", "a"), ("stdout", "b"), table, ("stdout", "c"), ("stderr", "d"), ("stderr", "e")]
    found = joined([stream(*part) if isinstance(part, tuple) else part for part in parts])
    assert [o.get("text") for o in found] == ["ab", None, "c", "de"]


def test_a_picture_is_packed_without_a_pixel_changed(root):
    """What a reader of the format meets, found by searching for names instead of walking: pixels, header, checksums."""
    packed = runpy.run_path(str(root / "examples" / "run_notebook.py"))["packed"]
    rows = b"".join(b"\x00" + bytes((x * x + y * y) // 97 % 256 for x in range(4 * 64)) for y in range(64))
    loose = zlib.compress(rows, 1)
    header = (64).to_bytes(4) * 2 + bytes([8, 6, 0, 0, 0])  # 64 x 64, 8 bits, RGBA
    parts = ((b"IHDR", header), (b"IDAT", loose[:40]), (b"IDAT", loose[40:]), (b"IEND", b""))
    chunk = lambda name, content: len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)  # noqa: E731
    tight = packed(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    place = tight.index(b"IDAT")
    content = tight[place + 4 : place + 4 + int.from_bytes(tight[place - 4 : place])]
    assert zlib.decompress(content) == rows
    assert tight == b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    assert len(content) < len(loose) and packed(tight) == tight
