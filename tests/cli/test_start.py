"""How a command starts: without looking for garbage among what it imports."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import revprobe as rp
from revprobe.cli.running import quick_imports


def test_a_command_collects_no_garbage_while_it_imports(tmp_path: Path) -> None:
    """A full collection takes 0.3 s by then; left in, a small run takes three seconds longer."""
    code = (
        "import gc, sys\n"
        "full = []\n"
        "def heard(phase, told):\n"
        "    if 'torch' in sys.modules and told['generation'] == 2: full.append(told)\n"
        "gc.callbacks.append(heard)\n"
        "from revprobe.cli.main import main\n"
        "sys.argv = ['revprobe', 'train', 'absent.yaml']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'transformers.trainer' in sys.modules\n"
        "print(len(full), gc.isenabled(), gc.get_freeze_count() > 300_000, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "0 True True\n", done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and "absent.yaml" in done.stderr


def test_what_is_imported_already_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: its own garbage must not be kept for good. And an import that fails leaves nothing behind."""
    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError, match="none"), quick_imports():
        assert not gc.isenabled()
        raise ImportError("none")
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_a_public_name_is_imported_without_looking_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script or a notebook has it; afterwards Python collects as before, also where the import fails."""
    seen: list[bool] = []

    def imported(name: str) -> object:
        seen.append(gc.isenabled())
        raise ImportError(name)

    monkeypatch.setattr(rp, "_import_public", imported)
    for collecting in (True, False):
        with pytest.raises(ImportError, match="load_model"):
            (gc.enable if collecting else gc.disable)()
            rp.__getattr__("load_model")
        assert gc.isenabled() is collecting
    gc.enable()
    assert seen == [False, False]


def test_the_suite_does_not_search_what_it_imported() -> None:
    """Set by conftest.py; without it the tests that train take half as long again."""
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
