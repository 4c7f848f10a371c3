"""What every test relies on: one thread, no network, repeatable examples, and where the package's files are."""

import gc
import os
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start: sums over one thread repeat bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from long_cases import LONG_TESTS

from tiny import ROOT

gc.disable()  # until all tests are collected: see `pytest_collection_finish`
torch.set_num_threads(1)
# No deadline: the first example pays for lazy imports. Derandomized: a red suite is red again when it is run again.
settings.register_profile("revprobe", deadline=None, derandomize=True)
settings.load_profile("revprobe")


def pytest_collection_finish() -> None:
    """What is imported stays: it is not looked through again whenever Python collects garbage.

    With torch, transformers and the test tools a full collection takes 0.4 s, there are many while they are imported,
    and accelerate asks for one after each training: a third of the time of the tests that train.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before `-m "not long"` takes them out: which long tests there are, for the test of their table."""
    found = config.stash.setdefault(LONG_TESTS, {})
    for item in items:
        own = found.setdefault(item.nodeid.partition("::")[0], set())
        if item.get_closest_marker("long"):
            own.add(item.nodeid)


BESIDE_THE_PACKAGE = {"tests", "examples", "docs"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever the test before has set: the sums of this one repeat."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, which is the package `revprobe`."""
    return ROOT


@pytest.fixture(scope="session")
def package_files() -> dict[str, str]:
    """Every Python file of the package, by its path from the root -> the one name it may be imported under."""
    found = {}
    for folder, inner, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        inner[:] = [name for name in inner if is_code_folder(here / name)]
        for path in (here / name for name in names if name.endswith(".py")):
            found[path.as_posix()] = ".".join(["revprobe", *path.with_suffix("").parts]).removesuffix(".__init__")
    assert "__init__.py" in found, f"no package at {ROOT}"
    return dict(sorted(found.items()))


def is_code_folder(path: Path) -> bool:
    """Whether a folder, given from the root, can hold modules of the package: told by what it is not, so that a new
    folder is part of the package until someone says otherwise.
    """
    beside = path.as_posix() in {*BESIDE_THE_PACKAGE, "runs", "build", "dist"}
    return not beside and not path.name.startswith(".") and path.name != "__pycache__"
