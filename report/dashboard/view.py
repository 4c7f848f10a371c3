"""What a visitor looks at, as a value: it comes out of the address of the page and goes back into it.

So a view can be reloaded, shared and gone back to. What stands in an address is a wish: names are looked up among what
the folder holds (`choices.py`), numbers are read as numbers, and what is neither is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any
from urllib.parse import parse_qs, urlencode

from ..asking.edits import EDITS, MATCHES
from ..asking.sentences import LONGEST
from ..html.instruments import INSTRUMENTS

TABS = {"training": "Training", "checkpoint": "One checkpoint", "pair": "One pair"}
TABS |= {name: one.words for name, one in INSTRUMENTS.items()} | {"ask": "Ask the model"}
ABOUT = {"pair": "a pair of the run", "text": "typed sentences"}
WEIGHTS = {"ema": "EMA (raw where there is none)", "raw": "raw", "both": "both"}
BANDS = {"facts": "each run, band: interval over facts", "seeds": "seeds together, band: their range"}
FIGURES = {
    "heatmap": "correlation by distance",
    "scatter": "forward against reverse score",
    "gradient": "gradient cosine by role",
    "probability": "probability of the target",
}
_OF_FINETUNINGS = ("model", "dataset", "variant", "direction")
FILTERS = ("group", "state", "objective", "position_encoding", "length", *_OF_FINETUNINGS, "seed")
LAST = -1  # the checkpoint choice that follows a run
ALL = -1  # layers or heads
DRAWINGS = {name: drawing.words for one in INSTRUMENTS.values() for name, drawing in one.drawings.items()}
_CHOICES = {"tab": TABS, "weights": WEIGHTS, "bands": BANDS, "figure": FIGURES, "drawing": DRAWINGS}
_CHOICES |= {"about": ABOUT, "edit": EDITS, "match": MATCHES}
_WORDS = ("run", "stored", "fact", "at", "other")
_TYPED = ("forward", "reverse", "instead")
_NUMBERS = ("step", "layer", "head", "pair")
_ONLY = "only."
_LONGEST = 100_000  # letters of an address; a thousand runs have less
_SEARCHED = 200  # letters of a searched text


@dataclass(frozen=True)
class View:
    """One state of the page.

    Attributes:
        runs: keys of the chosen runs; None for the first that has readings.
        search, only: what the list of runs is narrowed to: a part of the name, and values by axis.
        run, step, stored, layer, head: the checkpoint that is looked into; `stored` is "raw" or "ema".
        figure: what is drawn of it, one of FIGURES.
        drawing: what is drawn on an instrument's tab, one of its drawings; "" is its first that the run has.
        about, forward, reverse: what the model is asked: the pair, or typed sentences.
        edit, match, factor, at, other, instead: what is changed before it is asked again: one of EDITS, what a
            transplant matches, a scaling's factor, the token that is masked, the fact or text whose evidence stands in.
    """

    tab: str = "training"
    runs: tuple[str, ...] | None = None
    search: str = ""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: str = "ema"
    bands: str = "facts"
    run: str | None = None
    step: int = LAST
    stored: str | None = None
    figure: str = "heatmap"
    drawing: str = ""
    layer: int = ALL
    head: int = ALL
    fact: str | None = None
    pair: int | None = None
    about: str = "pair"
    forward: str = ""
    reverse: str = ""
    edit: str = "none"
    match: str = "log_odds"
    factor: float = 2.0
    at: str | None = None
    other: str | None = None
    instead: str = ""

    @classmethod
    def from_address(cls, search: str) -> View:
        """The view of an address' part after the question mark; what it does not say, or says wrongly, is as usual."""
        try:
            said = parse_qs(search[:_LONGEST].removeprefix("?"), keep_blank_values=True, max_num_fields=2_000)
        except ValueError:  # more fields than any page of ours writes
            return cls()
        known: dict[str, Any] = {}
        for name, choices in _CHOICES.items():
            if said.get(name, [""])[-1] in choices:
                known[name] = said[name][-1]
        known |= {name: said[name][-1] for name in _WORDS if said.get(name, [""])[-1]}
        known |= {name: int(said[name][-1]) for name in _NUMBERS if _is_count(said.get(name, [""])[-1])}
        known |= {name: typed(said.get(name, [""])[-1]) for name in _TYPED}
        if (factor := positive(said.get("factor", [""])[-1])) is not None:
            known["factor"] = factor
        if "chosen" in said:
            known["runs"] = tuple(key for key in said["chosen"] if key)
        only = {axis: tuple(filter(None, said.get(_ONLY + axis, []))) for axis in FILTERS}
        known["only"] = {axis: values for axis, values in only.items() if values}
        return cls(search=said.get("search", [""])[-1][:_SEARCHED], **known)

    def address(self) -> str:
        """`?chosen=a&chosen=b&tab=pair`: what is not as usual, always in the same order; "" when all is."""
        said: list[tuple[str, str]] = []
        usual = View()
        for name in (one.name for one in fields(View)):
            value = getattr(self, name)
            if value == getattr(usual, name):
                continue
            if name == "runs":
                said += [("chosen", key) for key in value or ("",)]
            elif name == "only":
                said += [(_ONLY + axis, one) for axis in FILTERS for one in value.get(axis, ())]
            else:
                said.append((name, str(value)))
        return f"?{urlencode(said)}" if said else ""


def typed(text: object) -> str:
    """A typed text, no longer than can be told to be too long."""
    return str(text or "")[: LONGEST + 1]


def positive(number: object) -> float | None:
    """A finite number above 0; None for anything else."""
    try:
        value = float(str(number))
    except ValueError:
        return None
    return value if isfinite(value) and value > 0 else None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 12
