"""transformers' Auto classes know RADD, LLaDA and Dream after a bare `import revprobe`, whatever loads first."""

import subprocess
import sys
from pathlib import Path

import pytest

from tiny import FIXTURES

RADD = FIXTURES / "v0_1" / "tiny-sweep" / "rope-l4-s0" / "checkpoints" / "step-000020"
LEFT = "len([f for f in sys.meta_path if type(f).__name__ == '_ImportWatcher'])"


def run_fresh(code: str, tmp_path: Path) -> list[str]:
    """What a new interpreter prints, word by word; without a terminal, since a prompt for remote code must fail."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nRADD, LLADA, DREAM = {[str(RADD), *folders()]!r}\n{code}")
    command = [sys.executable, "-P", str(script)]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def folders() -> list[str]:
    return [str(FIXTURES / name) for name in ("llada-tiny", "dream-tiny")]


@pytest.mark.parametrize(
    "imports",
    [
        "import revprobe\nimport transformers as t",
        "import transformers as t\nimport revprobe",
        "import transformers as t\nt.AutoModelForMaskedLM, t.AutoConfig, t.AutoTokenizer\nimport revprobe",
        "import transformers as t\nt.AutoConfig\nimport revprobe\nt.AutoModel",
        "import revprobe\nimport transformers as t\nt.AutoTokenizer\nt.AutoConfig",
        "from transformers import LlamaForCausalLM\nimport revprobe\nimport transformers as t",
        "import revprobe, transformer_lens\nimport transformers as t",
        "from revprobe.models.bases.radd import RaddForMaskedLM\nimport transformers as t",
        "import revprobe\nfrom transformers.models.auto import modeling_auto\nimport transformers as t",
        "import revprobe\nfrom transformers.generation import utils\nimport transformers as t",
        "import importlib.util, revprobe\nimportlib.util.find_spec('transformers.models.auto.modeling_auto')\n"
        "import transformers as t",
    ],
)
def test_every_folder_loads_whatever_was_imported_first(imports: str, tmp_path: Path) -> None:
    """A registration made while a module is half imported, or lost because a module was only looked for, is missed."""
    code = (
        f"{imports}\nload = lambda kind, folder, **o: type(getattr(t, kind).from_pretrained(folder, **o)).__name__\n"
        "print(load('AutoConfig', RADD), load('AutoModelForMaskedLM', RADD), load('AutoModelForMaskedLM', LLADA),\n"
        "      load('AutoModel', LLADA, device_map='cpu'), load('AutoModelForCausalLM', DREAM))\n"
        "from revprobe import RaddConfig\nprint(t.AutoModelForMaskedLM.from_config(RaddConfig()).__class__.__name__)\n"
        "from transformers.models.auto import tokenization_auto\n"
        f"print(tokenization_auto.tokenizer_class_from_name('DreamTokenizer').__module__, {LEFT})"
    )
    llada, dream = "LLaDAForMaskedDiffusion", "DreamForMaskedDiffusion"
    expected = [
        "RaddConfig",
        "RaddForMaskedLM",
        llada,
        llada,
        dream,
        "RaddForMaskedLM",
        "revprobe.models.bases.configs",
        "0",
    ]
    assert run_fresh(code, tmp_path) == expected


def test_a_config_alone_and_a_tokenizer_alone_are_known(tmp_path: Path) -> None:
    code = (
        "import revprobe\nfrom transformers import AutoConfig\nprint(type(AutoConfig.from_pretrained(DREAM)).__name__)"
    )
    assert run_fresh(code, tmp_path) == ["DreamConfig"]
    code = (
        "import revprobe\nfrom transformers import AutoTokenizer\nprint(AutoTokenizer.from_pretrained(RADD).vocab_size)"
    )
    assert run_fresh(code, tmp_path)[0].isdecimal()


def test_a_spawned_worker_unpickles_and_loads(tmp_path: Path) -> None:
    code = """
import multiprocessing

def work(config, queue):
    import transformers
    queue.put((type(config).__name__, type(transformers.AutoModelForMaskedLM.from_pretrained(RADD)).__name__))

if __name__ == "__main__":
    import revprobe
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=work, args=(revprobe.RaddConfig(), queue))
    worker.start()
    print(*queue.get(timeout=120))
    worker.join()
"""
    assert run_fresh(code, tmp_path) == ["RaddConfig", "RaddForMaskedLM"]


def test_a_module_keeps_the_loader_it_has_without_us(tmp_path: Path) -> None:
    """Sources, resources and reload all ask the module's loader."""
    code = (
        "import importlib, inspect, revprobe\nimport transformers.models.auto.modeling_auto as module\n"
        "print(type(module.__loader__).__name__, type(module.__spec__.loader).__name__,"
        " 'class AutoModel' in inspect.getsource(module))"
    )
    assert run_fresh(code, tmp_path) == ["SourceFileLoader", "SourceFileLoader", "True"]


def test_a_broken_import_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """An error inside a module counts it as done: the registrations are still made afterwards."""
    code = (
        "import revprobe, importlib.abc, importlib.machinery\n"
        "class Broken(importlib.abc.Loader):\n"
        "    def create_module(self, spec): return None\n"
        "    def exec_module(self, module): raise ImportError('planted')\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        return importlib.machinery.ModuleSpec(name, Broken()) if name == 'transformers.planted' else None\n"
        "sys.meta_path.append(Finder())\n"
        "import transformers\n"
        "try:\n    import transformers.planted\nexcept ImportError as error:\n    print(error)\n"
        "print(type(transformers.AutoConfig.for_model('radd')).__name__)"
    )
    assert run_fresh(code, tmp_path) == ["planted", "RaddConfig"]


REGISTERED = "print(type(transformers.AutoConfig.for_model('radd')).__name__, type(transformers.AutoModelForMaskedLM"
REGISTERED += ".from_pretrained(LLADA)).__name__)\n"


@pytest.mark.long
@pytest.mark.parametrize(
    "again",
    [
        "importlib.reload(revprobe)",
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('revprobe')]\nimport revprobe",
        "importlib.reload(revprobe)\nimport transformers\ntransformers.AutoConfig\nimportlib.reload(revprobe)",
    ],
)
def test_a_package_that_is_loaded_again_registers_once_more(again: str, tmp_path: Path) -> None:
    """Two watchers that asked each other where a module is would never come to an end."""
    code = f"import importlib, revprobe\n{again}\nimport transformers\n{REGISTERED}print({LEFT} <= 1)"
    assert run_fresh(code, tmp_path) == ["RaddConfig", "LLaDAForMaskedDiffusion", "True"]


def test_a_registration_that_fails_is_made_at_the_next_import(tmp_path: Path) -> None:
    """As after Ctrl-C in a notebook, in the middle of an import of seconds."""
    code = (
        "import revprobe\nsys.modules['revprobe.models.families.dream'] = None\n"
        "try:\n    from transformers import AutoModelForMaskedLM\n    print('imported')\n"
        "except ImportError:\n    print('failed')\n"
        "del sys.modules['revprobe.models.families.dream']\nimport transformers\n"
        f"transformers.AutoModelForMaskedLM\n{REGISTERED}"
    )
    assert run_fresh(code, tmp_path) == ["failed", "RaddConfig", "LLaDAForMaskedDiffusion"]


def test_a_thread_that_is_importing_does_not_keep_another_from_registering(tmp_path: Path) -> None:
    code = (
        "import revprobe, threading, importlib.abc, importlib.machinery\n"
        "begun, done = threading.Event(), threading.Event()\n"
        "class Slow(importlib.abc.Loader):\n"
        "    def create_module(self, spec): return None\n"
        "    def exec_module(self, module): begun.set(); done.wait(60)\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        return importlib.machinery.ModuleSpec(name, Slow()) if name == 'transformers.planted' else None\n"
        "sys.meta_path.append(Finder())\nimport transformers\n"
        "thread = threading.Thread(target=lambda: __import__('transformers.planted'))\nthread.start()\nbegun.wait(60)\n"
        f"{REGISTERED}done.set()\nthread.join()"
    )
    assert run_fresh(code, tmp_path) == ["RaddConfig", "LLaDAForMaskedDiffusion"]
