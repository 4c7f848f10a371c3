"""What a user gets: the public names, an import that stays light, a wheel and an sdist with the right files."""

import ast
import doctest
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import revprobe

PUBLIC = [
    "BlockSweep",
    "Control",
    "FinetuneConfig",
    "FirstOrderPrediction",
    "ModelComparison",
    "ProbeCallback",
    "ProbedModel",
    "Query",
    "Question",
    "RaddConfig",
    "RaddForMaskedLM",
    "Reading",
    "Readings",
    "ReversalPair",
    "ReversalPairs",
    "RevprobeError",
    "RunConfig",
    "SweepConfig",
    "TextRelation",
    "TwoRouteToy",
    "__version__",
    "alibi_correlation",
    "audit_assumptions",
    "block_sweep",
    "compare",
    "compare_models",
    "declare_fused",
    "decode",
    "decoded_match",
    "diagnose",
    "edit_attention",
    "fine_tune",
    "foretelling",
    "from_table",
    "invented_names",
    "letter_pairs",
    "letter_tokenizer",
    "letters",
    "list_models",
    "load_model",
    "logit_contributions",
    "look_alike_data",
    "model_frequencies",
    "model_theory",
    "objective_classes",
    "objective_steps",
    "objective_terms",
    "one_layer_gpt2",
    "one_step",
    "one_step_curves",
    "open_run",
    "open_sweep",
    "pair_from_text",
    "pairs_from_frame",
    "parent_child",
    "person_description",
    "placeholder_storage",
    "plan_memory",
    "pore",
    "pressure",
    "probe",
    "probe_attention_correlation",
    "probe_causal_trace",
    "probe_gradient_cosine",
    "probe_in_parts",
    "probe_logit_lens",
    "probe_reverse_probability",
    "probe_route_edit",
    "probe_stored_evidence",
    "probe_stored_once",
    "rank_candidates",
    "rank_heads",
    "ray_workers",
    "read_price",
    "register_model",
    "rope_asymmetric_bound",
    "rope_conditional_correlation",
    "rope_correlation_bound",
    "rope_correlation_tail",
    "rope_limit_bound",
    "rope_query_bound",
    "rope_transfer_condition",
    "run_sweep",
    "save_figure",
    "simulate_alibi_transfer",
    "simulate_rope_transfer",
    "storage_curves",
    "storage_gradient_cosines",
    "theory_tables",
    "token_contributions",
    "token_strip",
    "top_predictions",
    "trace_denoising",
    "train",
    "trex",
    "with_bounds",
]
EXAMPLES = {"examples/one_layer.yaml", "examples/one_layer_quick.yaml", "examples/robustness.yaml"}
EXAMPLES |= {"examples/negative_evidence.yaml", "examples/one_layer_published.yaml", "examples/pressure.yaml"}
EXAMPLES |= {f"examples/{name}.yaml" for name in ("mini_models", "section6", "section6_ablations", "section6_methods")}
EXAMPLES |= {"examples/llada_8b_parent_child.yaml"}
EXAMPLES |= {f"examples/{name}.yaml" for name in ("smdm_reversal", "differ")}
EXAMPLES |= {f"examples/causal_{name}.yaml" for name in ("all_tokens", "completion_only")}
EXAMPLES |= {"examples/finetune_tiny.yaml", "examples/table7.yaml", "examples/fsdp.yaml"}
DATA = {"relations/data/invented_names.csv", "relations/data/trex_templates.csv"}
DATA |= {f"relations/data/look_alike_{name}.csv" for name in ("names", "roles", "wordings", "words")}
DATA |= {f"report/html/explorer.{kind}" for kind in ("html", "js")} | {"report/html/parts.html"}
DATA |= {f"report/html/page.{kind}" for kind in ("css", "html", "js")}
DATA |= {f"report/html/section6.{kind}" for kind in ("css", "html", "js")}
DATA |= {f"report/dashboard/{name}" for name in ("index.html", "page.css", "page.js")}
DATA |= {"report/bundle/index.html"}
# What takes seconds to import.
HEAVY = ["torch", "transformers", "numpy", "pandas", "plotly.graph_objects", "peft", "transformer_lens", "dash"]


def run_python(*arguments: str | Path, cwd: Path, path: Path | None = None, fine: tuple[int, ...] = (0,)) -> str:
    """Run a fresh interpreter and return what it printed; `path`, if given, is all that PYTHONPATH holds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode in fine, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_public_surface_is_pinned() -> None:
    """A new public name is a decision: it is written here too. Tab completion shows these and nothing else."""
    assert revprobe.__all__ == dir(revprobe) == PUBLIC


def stated_homes(root: Path) -> dict[str, str]:
    """Where the stub says that each public name is defined."""
    tree = ast.parse((root / "__init__.pyi").read_text())
    froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"revprobe.{node.module}" for node in froms for alias in node.names}


def test_the_stub_and_the_list_of_public_names_agree(root: Path) -> None:
    assert sorted([*stated_homes(root), "__version__"]) == PUBLIC


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - {"__version__"}))
def test_a_public_name_resolves_to_the_object_its_module_defines(name: str, root: Path) -> None:
    """A wrong module in the stub, a re-export, or a submodule that shadows the name turns this red."""
    value = getattr(revprobe, name)
    assert not isinstance(value, ModuleType), f"{name} is hidden by the submodule {value.__name__}"
    assert (value.__name__, value.__module__) == (name, stated_homes(root)[name])


def test_no_submodule_shadows_a_public_name(package_files: dict[str, str]) -> None:
    """Importing `revprobe.probe` as a module would replace the function of that name, for every later user."""
    assert not {f"revprobe.{name}" for name in PUBLIC} & set(package_files.values())


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod_model'; the closest is 'load_model'"):
        _ = revprobe.lod_model


def test_a_name_that_was_renamed_says_the_new_one() -> None:
    with pytest.raises(revprobe.RevprobeError, match=r"ReversalPair\.from_text is now revprobe\.pair_from_text"):
        revprobe.ReversalPair.from_text("{target} {evidence}", "{evidence} {target}", target="a", evidence="b")


@pytest.mark.parametrize("arguments", [("-c", "import revprobe"), ("-m", "revprobe", "--version"), ("-m", "revprobe")])
def test_import_version_and_help_load_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Python's own list of what it imported; what takes seconds must not be in it."""
    loaded = run_python("-X", "importtime", *arguments, cwd=tmp_path, fine=(0, 2))
    found = [name for name in HEAVY if f"| {name}\n" in loaded or f"|   {name}\n" in loaded]
    assert not found and "revprobe.models.auto_classes" in loaded, found


def test_what_a_public_name_needs_is_imported_with_it_and_no_more(tmp_path: Path) -> None:
    """A saved model is loaded and probed without peft, the Trainer and TransformerLens."""
    code = (
        "import sys, revprobe\nassert 'torch' not in sys.modules\nrevprobe.load_model, revprobe.probe\n"
        "print([m for m in ('torch', 'peft', 'transformers.trainer', 'transformer_lens') if m in sys.modules])"
    )
    assert run_python("-c", code, cwd=tmp_path).strip() == "['torch']"


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert revprobe.__version__ == version("revprobe")


def failing_doctests(module: ModuleType) -> tuple[int, int]:
    """Run the examples of a module's docstrings: how many failed, how many there are."""
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    return result.failed, result.attempted


def test_every_docstring_example_prints_what_it_says(
    package_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walks the imported revprobe.*: pytest's --doctest-modules would import each file a second time."""
    monkeypatch.chdir(tmp_path)
    counts = {name: failing_doctests(importlib.import_module(name)) for name in package_files.values()}
    assert counts["revprobe.errors"][1] > 0, "no example was found where there is one: the walk is blind"
    failed = {name: count for name, (count, _) in counts.items() if count}
    assert not failed, f"failing examples by module: {failed} (printed above)"


def test_a_planted_wrong_example_is_seen() -> None:
    module = ModuleType("planted", ">>> 1 + 1\n3\n\n>>> 1 + 1\n2\n")
    assert failing_doctests(module) == (1, 2)


def project_files(root: Path) -> set[str]:
    """What a commit would hold: files tracked or new, without the ignored ones. In an unpacked sdist, every file."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
        return {name for name in names if name and (root / name).is_file()}
    made = {".venv", "runs", "build", "dist", "PKG-INFO", "setup.cfg", "revprobe.egg-info"}
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    cached = (".pyc", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis")
    return {path.as_posix() for path in files if path.parts[0] not in made and not any(c in str(path) for c in cached)}


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist and of the wheel built from it, out of a copy whose folder could not name a module."""
    copy = tmp_path_factory.mktemp("build") / "1 check-out"
    for name in project_files(root):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy / name)
    log = run_python("-m", "build", "--no-isolation", "--outdir", copy.parent, copy, cwd=copy.parent)
    assert "Deprecat" not in log and "no files found" not in log, log
    return copy.parent


@pytest.fixture(scope="module")
def wheel_files(built: Path) -> set[str]:
    return set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel_files: set[str], package_files: dict[str, str]) -> None:
    """A folder missing from `packages`, a test that slips in, a lost py.typed or example: all turn this red."""
    metadata = {name for name in wheel_files if name.split("/")[0].endswith(".dist-info")}
    expected = {f"revprobe/{path}" for path in {*package_files, *EXAMPLES, *DATA, "py.typed", "__init__.pyi"}}
    assert wheel_files - metadata == expected
    assert any(name.endswith("licenses/LICENSE") for name in metadata), metadata


def test_the_sdist_holds_everything_that_is_committed(built: Path, root: Path) -> None:
    """From the sdist alone a developer can build, test and read: a folder MANIFEST.in forgot is listed here."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    committed = project_files(root)
    assert not committed - names, f"MANIFEST.in leaves out {sorted(committed - names)}"
    made_by_setuptools = {name for name in names if name in {"PKG-INFO", "setup.cfg"} or ".egg-info/" in name}
    extra = names - committed - made_by_setuptools
    assert not extra, f"the sdist holds what no commit does: {sorted(extra)}"


@pytest.mark.long
def test_an_installed_wheel_runs_and_brings_its_examples(built: Path, tmp_path: Path) -> None:
    """Away from the checkout: `python -m revprobe` answers from the wheel, and the examples resolve by name."""
    site = tmp_path / "site"
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(site)
    code = (
        "import revprobe\n"
        "from revprobe.finetune.config.loading import load_config\n"
        "from revprobe.finetune.config.one_layer import SweepConfig\n"
        "sweeps = [load_config(name, SweepConfig) for name in ('one-layer', 'one-layer-quick')]\n"
        "print(revprobe.__file__)"
    )
    public = (
        "import revprobe\nassert dir(revprobe) == revprobe.__all__\nprint(len(dir(revprobe)), revprobe.probe.__name__)"
    )
    shown = run_python("-c", public, cwd=tmp_path, path=site)
    assert shown.split() == [str(len(PUBLIC)), "probe"], "the stub is not in the wheel, or says something else"
    asked = run_python("-c", "import revprobe\nrevprobe.lod_model", cwd=tmp_path, path=site, fine=(1,))
    assert "the closest is 'load_model'" in asked, asked
    where = run_python("-c", code, cwd=tmp_path, path=site)
    assert Path(where.strip()) == site / "revprobe" / "__init__.py"
    shown = run_python("-m", "revprobe", "--help", cwd=tmp_path, path=site)
    assert all(command in shown for command in ("train", "probe", "sweep", "report", "models")), shown


@pytest.mark.long
def test_an_installed_wheel_writes_the_report_it_writes_here(built: Path, tmp_path: Path) -> None:
    """Away from the checkout: templates, style and script come from the wheel."""
    from revprobe.report.html.report import write_report

    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(site := tmp_path / "site")
    code = (
        "import revprobe\n"
        "from revprobe.report.dashboard.page import index\n"
        "from revprobe.report.html.report import write_report\n"
        "write_report([], 'there.html')\n"
        "print(revprobe.__file__, '<style>' in index())"
    )
    where = run_python("-c", code, cwd=tmp_path, path=site)
    assert where.split() == [str(site / "revprobe" / "__init__.py"), "True"]
    here = write_report([], tmp_path / "here.html").read_text()
    assert (tmp_path / "there.html").read_text() == here and "function drawTab" in here
