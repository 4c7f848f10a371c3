"""The committed notebooks run from a clean kernel without a network, and show what they would show again."""

import ast
import json
import re
import runpy

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

import revprobe

NOTEBOOK = "attach_any_model.ipynb"
READINGS = ("attention_correlation", "gradient_cosine", "reverse_probability")
MODELS = 4  # each prints its three readings
PLOTLY = "application/vnd.plotly.v1+json"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.fixture(scope="module")
def stored(root):
    return nbformat.read(root / "examples" / NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def rerun(root, tmp_path_factory):
    """The notebook with the outputs of a kernel that has an empty home, nothing on its path, and no network."""
    home = tmp_path_factory.mktemp("home")
    runner = runpy.run_path(str(root / "examples" / "run_notebook.py"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "HF_HOME"):
            patch.setenv(name, str(home / name.lower()))
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):  # whoever asks the network is refused
            patch.setenv(name, "http://127.0.0.1:9")
        patch.delenv("PYTHONPATH", raising=False)
        return runner["executed"](root / "examples" / NOTEBOOK, home)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook, name: str = "stdout") -> str:
    streams = (o for cell in code(notebook) for o in cell.outputs if o.output_type == "stream")
    return "".join(o.text for o in streams if o.name == name)


def bundles(notebook) -> list[dict]:
    return [o.data for cell in code(notebook) for o in cell.outputs if "data" in o]


def test_it_runs_without_error_or_warning_and_prints_three_readings_a_model(rerun):
    assert not [o for cell in code(rerun) for o in cell.outputs if o.output_type == "error"]
    assert printed(rerun, "stderr") == ""
    text = printed(rerun)
    assert [text.count(f"Reading({name}=") for name in READINGS] == [MODELS] * 3, text
    figures = [data[PLOTLY] for data in bundles(rerun) if PLOTLY in data]
    titles = [figure["layout"]["title"]["text"] for figure in figures]
    for words in ("Pearson r within groups", "gradient cosine", "reverse probability"):
        assert any(words in title for title in titles), titles
    assert text.count("equal to 1e-4: True") == 1 + len(READINGS), "the bridge gives other numbers"


def test_the_error_comes_first_and_names_the_remedy(rerun):
    assert re.search(r"must be the same tokens in both directions; put a carrier .*carrier='Fact: '", printed(rerun))
    tables = [data["text/html"] for data in bundles(rerun) if "background:#E69F00" in data.get("text/html", "")]
    assert "swapped" in tables[0] and "␣Baldan" in tables[0], "the pair table of the Llama is not shown"


def test_what_is_committed_is_what_a_run_prints(stored, rerun):
    """Stale outputs turn this red: the words exactly, the numbers to what another CPU may round."""
    old, new = printed(stored), printed(rerun)
    assert NUMBER.sub("#", old) == NUMBER.sub("#", new), "run `python examples/run_notebook.py` and commit the outputs"
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (old, new)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-2, abs=1e-3)
    assert [sorted(set(data) - {"image/png"}) for data in bundles(stored)] == [
        sorted(set(data) - {"image/png"}) for data in bundles(rerun)
    ]


def test_the_committed_file_is_whole_small_and_opens_offline(root, stored):
    """In order, no error, below 1 MB; no path, address or time of the machine that ran it."""
    nbformat.validate(stored)
    assert [cell.execution_count for cell in code(stored)] == list(range(1, len(code(stored)) + 1))
    assert not [o for cell in code(stored) for o in cell.outputs if o.output_type == "error"]
    assert printed(stored, "stderr") == ""
    path = root / "examples" / NOTEBOOK
    assert path.stat().st_size < 1_000_000
    assert set(stored.metadata) == {"kernelspec", "language_info"} and not any(cell.metadata for cell in stored.cells)
    pictures = re.compile(r'"image/png": "[^"]*"')
    text = pictures.sub("", json.dumps(stored))
    assert not re.findall(r"https?://[^\"\\]*|<script|(?:/[\w.-]+){2,}", text), "a path, address or script"


def test_it_uses_the_public_names_alone(stored):
    """A name the package does not export, or an import from inside it, would teach what may change."""
    tree = ast.parse("\n".join(cell.source for cell in code(stored)))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "rp"}
    assert used and used <= set(revprobe.__all__), used - set(revprobe.__all__)
    froms = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert "revprobe" in imports and not [m for m in froms | imports if str(m).startswith("revprobe.")]


def test_every_section_says_first_what_the_reader_will_see(stored):
    sections = [c.source for c in stored.cells if c.cell_type == "markdown" and c.source.startswith("#")]
    assert len(sections) > MODELS
    for text in sections:
        assert text.split("\n\n")[1].startswith("**You will see**"), text.splitlines()[0]


def test_a_cell_that_fails_is_an_error_that_shows_it(root, tmp_path):
    """The planted fault: `executed` must not store a notebook that broke."""
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    runner = runpy.run_path(str(root / "examples" / "run_notebook.py"))
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner["executed"](tmp_path / "broken.ipynb", tmp_path)
