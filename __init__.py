"""Measure how a language model stores a relation and how it routes to it when the question is asked backwards.

    import revprobe as rp
    model = rp.load_model("runs/one-layer-quick/rope-l10-s0", weights="ema")
    rp.probe(model, rp.open_run("runs/one-layer-quick/rope-l10-s0").pairs()).plot()

Every public name is imported when it is first used (PEP 562; `__init__.pyi` says where from), so that neither torch nor
transformers loads before something needs it. RADD, LLaDA and Dream are in transformers' Auto classes all the same.
"""

import gc

import lazy_loader

from .models.auto_classes import register_when_imported

__version__ = "0.1.0"

_import_public, _, _public = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_public, "__version__"])

register_when_imported()


def __getattr__(name: str) -> object:
    """A public name, imported now. Raises: AttributeError, when there is none; it names the nearest."""
    if name not in _public:
        from .errors import did_you_mean

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}")
    collecting = gc.isenabled()
    gc.disable()  # torch and transformers stay; looking for garbage among them takes a quarter of the time
    try:
        return _import_public(name)
    finally:
        if collecting:
            gc.enable()


def __dir__() -> list[str]:
    return __all__
