"""RADD, LLaDA and Dream in transformers' Auto classes, whichever of the two packages is imported first.

`AutoModelForMaskedLM.from_pretrained(folder)` must know them after a bare `import revprobe`, and must never ask for a
repository's code; yet importing transformers and torch takes seconds that `revprobe --help` does not have. So each
registration waits until the module that holds its Auto class has been imported. This file imports neither.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import Lock, local
from types import ModuleType
from typing import Any


def register_when_imported() -> None:
    """Register now with the modules of transformers that are loaded, and with the others once they are."""
    # `importlib.reload` comes here again; a class of the module as it was cannot be told by `isinstance`.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "registers_revprobe", False)]
    watcher = _ImportWatcher()
    sys.meta_path.insert(0, watcher)
    watcher.settle()


class _ImportWatcher(MetaPathFinder):
    """Makes the registrations whose module is there, at moments when this thread has no module half imported.

    Registering imports our classes, those import Qwen2's and Llama's, and transformers imports its Auto classes from
    the middle of other modules: at any other moment one of them would be met without its names. Modules are found as
    the finders behind this one do; the watcher goes when nothing is left to register.
    """

    registers_revprobe = True

    def __init__(self) -> None:
        self.packages = ("transformers", __name__.partition(".")[0])
        self.waiting = dict(_REGISTRATIONS)
        self.thread, self.registering = _Thread(), Lock()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] not in self.packages or self not in sys.meta_path:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in behind)
        spec: ModuleSpec | None = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # Not here: a module can be looked for (`importlib.util.find_spec`) without being imported.
            spec.loader = _WatchedLoader(spec.loader, self)
        return spec

    def settle(self) -> None:
        """Register what can be registered now; what fails is tried again after the next import."""
        # Another thread that is at it is not waited for: it may be waiting for a module that this one is importing.
        if self.thread.half_done or not self.registering.acquire(blocking=False):
            return
        try:
            while ready := [name for name in self.waiting if name in sys.modules]:
                self.waiting[ready[0]](sys.modules[ready[0]])
                del self.waiting[ready[0]]
        finally:
            self.registering.release()
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Thread(local):
    """How many watched modules a thread has begun to import and not ended."""

    half_done = 0


class _WatchedLoader(Loader):
    """Tells the watcher when a module's execution begins and ends; the module keeps the loader it has without this."""

    def __init__(self, loader: Loader, watcher: _ImportWatcher) -> None:
        self.loader, self.watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # what runpy and importlib.resources ask of a spec that is not imported yet

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "the import system gives it one"
        module.__spec__.loader = module.__loader__ = self.loader
        self.watcher.thread.half_done += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.watcher.thread.half_done -= 1
        self.watcher.settle()


def _configs(auto: Any) -> None:
    from .bases.configs import DreamConfig, LLaDAConfig, RaddConfig

    for config in (RaddConfig, LLaDAConfig, DreamConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _models(auto: Any) -> None:
    from .bases.configs import DreamConfig, LLaDAConfig, RaddConfig
    from .bases.radd import RaddForMaskedLM
    from .families.dream import DreamForMaskedDiffusion
    from .families.llada import LLaDAForMaskedDiffusion

    auto.AutoModelForMaskedLM.register(RaddConfig, RaddForMaskedLM, exist_ok=True)
    # The published auto_map names AutoModel and AutoModelForCausalLM: a class that is registered is loaded instead.
    for kind in (auto.AutoModel, auto.AutoModelForCausalLM, auto.AutoModelForMaskedLM):
        kind.register(LLaDAConfig, LLaDAForMaskedDiffusion, exist_ok=True)
        kind.register(DreamConfig, DreamForMaskedDiffusion, exist_ok=True)


def _tokenizers(auto: Any) -> None:
    from .bases.configs import DreamConfig, DreamTokenizer

    auto.AutoTokenizer.register(DreamConfig, fast_tokenizer_class=DreamTokenizer, exist_ok=True)


_REGISTRATIONS: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _configs,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.models.auto.tokenization_auto": _tokenizers,
}
