"""What a module does when it is run, found out once: direction, padding, batches, and where its tokens stand.

`contract_of(called)` judges the runs of `trial`. What can be handled is (queries of different lengths are kept apart,
rows are counted from the first token on); what cannot is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...errors import RevprobeError
from .called import CalledModule
from .placement import Placement, place_tokens
from .skeleton import skeleton
from .trial import Trial, run_trial
from .witness import Reach, reached

# In float32 the same row alone and in a batch differ by 1e-6 of the logits' spread, 1e-5 in deep models.
_FLOAT32 = 2e-4
# Of a model's own rounding, alone against in a batch, where it computes in less than float32.
_TIMES_NOISE = 16.0


@dataclass(frozen=True)
class Contract:
    """What holds of a module.

    Args:
        reaches_back: whether a later token changes earlier logits; None where nothing changes any logit (an
            unembedding that is still zero), so that neither objective is contradicted.
        equal_lengths: why queries of different lengths cannot share a batch; empty where they can.
        placement: where the input's tokens stand among the rows of the logits and of attention.
        narrowed: the type that products are taken in where it is narrower than the weights' (autocast); else None.
        ambient: whether that was seen inside the caller's own autocast, which ends with it.
        measured: what was compared and by how much it differed, in standard deviations of the logits; NaN: not run.
        routed: whether differences in runs of equal shapes were rounding (a mixture of experts).
    """

    reaches_back: bool | None
    equal_lengths: str
    placement: Placement
    narrowed: torch.dtype | None
    ambient: bool = False
    measured: dict[str, float] = field(default_factory=dict)
    routed: bool = False

    @classmethod
    def taken_for_granted(cls) -> Contract:
        """What most modules do, for one that cannot be run."""
        return cls(None, "", Placement(), None)


_known: WeakKeyDictionary[nn.Module, dict[Hashable, Contract]] = WeakKeyDictionary()


def contract_of(called: CalledModule) -> Contract:
    """The module's contract, from five short runs (six, where autograd must decide); once per module and adapter.

    Raises: RevprobeError, for a module that cannot be run, is random in eval mode, writes into its weights, lets rows
        of a batch reach each other, or gives rows of logits that are not its tokens'.
    """
    state = _state(called.module)
    known = _known.setdefault(called.module, {})
    if state not in known:
        with skeleton(called.module, called.name) as copy:
            found = _judge(run_trial(CalledModule(copy, called.name)))
        if found.reaches_back is None:
            return found  # it will be another once it has been trained
        known[state] = found
    return known[state]


def _state(module: nn.Module) -> Hashable:
    """What changes a module's behaviour other than training: its adapters, its attention kernel, its dtype."""
    adapters = tuple(
        (name, str(getattr(part, "active_adapters", "")), part.disable_adapters, bool(part.merged))
        for name, part in module.named_modules()
        if hasattr(part, "disable_adapters") and hasattr(part, "merged")
    )
    prompt = str(getattr(module, "active_adapter", "")) if hasattr(module, "peft_config") else ""
    kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
    dtype = next((p.dtype for p in module.parameters()), None)
    return adapters, prompt, kernel, dtype, _ambient(module), id(vars(module).get("forward"))


def _ambient(module: nn.Module) -> bool:
    """Whether the caller runs this under autocast."""
    return torch.is_autocast_enabled(next((p.device.type for p in module.parameters() if not p.is_meta), "cpu"))


def _judge(trial: Trial) -> Contract:
    placement = place_tokens(trial)
    if trial.drew:
        _require_repeatable(trial)
    judge = _Judge(trial, placement.logits)
    changes = trial.moved(trial.plain.logits[1:], trial.changed.logits[1:]) > 0
    judge.require_own_rows()
    return Contract(
        judge.reaches_back() if changes else None,
        judge.padding(),
        placement,
        trial.arithmetic if trial.arithmetic.itemsize < trial.called.dtype.itemsize else None,
        _ambient(trial.called.module),
        judge.measured,
        judge.routed,
    )


class _Judge:
    """Verdicts over one trial; `measured` and `routed` collect what `Contract` says of them."""

    def __init__(self, trial: Trial, offset: int) -> None:
        self.trial, self.offset = trial, offset
        self.measured: dict[str, float] = {}
        self.routed = False
        self._reach: Reach | str | None = "not asked"

    def rows(self, logits: Tensor, row: int, last: int = 0) -> Tensor:
        """The logits of one row's own tokens, all but the `last`. Shapes: `-> tokens vocab`."""
        return logits[row, self.offset : self.offset + self.trial.tokens - last]

    def require_own_rows(self) -> None:
        """Raises: RevprobeError, when other rows' content, or their number, moves a row's logits."""
        trial, name = self.trial, self.trial.called.name
        content = trial.moved(trial.plain.logits[0], trial.changed.logits[0])
        if trial.padded is not None and trial.refilled is not None:
            content = max(content, trial.moved(trial.padded.logits[0], trial.refilled.logits[0]))
        self.measured["other rows"] = content
        if self._reaches(content, "other_rows"):
            _require_repeatable(trial)
            raise RevprobeError(
                f"{name}: the tokens of one row change the logits of another by {content:.1g} of their spread, so a "
                "number would depend on what shares its batch; probe a model whose rows are independent"
            )
        number = trial.moved(self.rows(trial.plain.logits, 0), self.rows(trial.alone.logits, 0))
        self.measured["batch size"] = number
        if trial.arithmetic.itemsize >= 4 and not _is_coarse(trial) and number > _FLOAT32 and not self.routed:
            raise RevprobeError(
                f"{name}: a row alone and among two others differs by {number:.1g} of the logits' spread, so a number "
                "would depend on the batch size; probe a model whose rows are independent"
            )

    def reaches_back(self) -> bool:
        """Whether another last token moves earlier logits."""
        logits = self.trial.plain.logits, self.trial.changed.logits
        moved = self.trial.moved(*(self.rows(of, 1, last=1) for of in logits))
        self.measured["later tokens"] = moved
        return self._reaches(moved, "last")

    def padding(self) -> str:
        """Why padding may not stand beside real tokens; empty where it may."""
        trial = self.trial
        if trial.padded is None or trial.refilled is None:
            self.measured |= {"padding": float("nan"), "alone": float("nan")}
            return trial.refusal
        content = trial.moved(self.rows(trial.padded.logits, 1), self.rows(trial.refilled.logits, 1))
        alone = trial.moved(self.rows(trial.padded.logits, 1), self.rows(trial.alone.logits, 0))
        self.measured |= {"padding": content, "alone": alone}
        if self._reaches(content, "padding", "other_rows"):
            return f"padded tokens change its logits by {content:.1g} of their spread"
        allowed = _TIMES_NOISE * self.measured["batch size"]
        if alone > max(allowed, _FLOAT32 if not _is_coarse(trial) else 0.0) and not self.routed:
            return f"a padded row's logits differ from the row's alone by {alone:.1g} of their spread"
        return ""

    def _reaches(self, moved: float, *places: str) -> bool:
        """Whether a difference in runs of equal shapes is more than experts' rounding."""
        if not moved:
            return False
        if not self.trial.may_be_rounding(moved):
            return True
        if isinstance(self._reach, str):
            self._reach = reached(self.trial, self.offset)
            if self._reach is not None and not self._reach.repeated:
                _require_repeatable(self.trial)
        if self._reach is None or any(getattr(self._reach, place) for place in places):
            return True
        self.routed = True
        return False


def _is_coarse(trial: Trial) -> bool:
    """Whether its products are taken in less than float32, where rounding alone moves logits visibly."""
    tf32 = trial.called.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return trial.arithmetic.itemsize < 4 or tf32


def _require_repeatable(trial: Trial) -> None:
    """Raises: RevprobeError, naming the first module that answers the same input differently in eval mode."""
    called, ids = trial.called, trial.plain.ids
    # Noise of rounding's size gives the same bits now and then: two runs may agree by luck, four hardly.
    first, *others = (_outputs(called, ids) for _ in range(4 if trial.drew else 2))
    different = [name for name, out in first.items() if not all(_same(out, other.get(name)) for other in others)]
    if different:
        part: Any = called.module.get_submodule(different[0])
        raise RevprobeError(
            f"{called.name} is random in eval mode: {different[0] or 'the model'!r} ({type(part).__name__}) answers "
            "the same input differently each time; make it heed .eval()"
        )


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)


def _outputs(called: CalledModule, ids: Tensor) -> dict[str, Tensor]:
    """Every module's first output in one run, in the order in which they return."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                seen.setdefault(name, first.detach().clone())

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in called.module.named_modules()]
    try:
        with torch.no_grad():
            called.run(ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen
