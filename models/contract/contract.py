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
from .blocks import require_blocks, require_mask_argument
from .called import CalledModule
from .placement import Placement, place_tokens
from .skeleton import skeleton
from .trial import Trial, run_trial
from .witness import Reach, reached

# In float32 the same row alone and in a batch differ by 1e-6 of the logits' spread, 1e-5 in deep models.
_FLOAT32 = 2e-4
# Of a model's own rounding, alone against in a batch, where it computes in less than float32.
_TIMES_NOISE = 16.0


# Attributes that change nothing in eval mode: the mode itself, and what accelerate notes of a module that it trains.
_MARKS = ("training", "_is_accelerate_prepared")


@dataclass(frozen=True)
class Contract:
    """What holds of a module.

    Args:
        reaches_back: whether a later token changes earlier logits; None where no token changes another's logits (an
            unembedding or attention output that is still zero), so that neither objective is contradicted.
        equal_lengths: why queries of different lengths cannot share a batch; empty where they can.
        placement: where the input's tokens stand among the rows of the logits and of attention.
        narrowed: the type that products are taken in where it is narrower than the weights' (autocast); else None.
        ambient: whether that was seen inside the caller's own autocast, which ends with it.
        measured: what was compared and by how much it differed, in standard deviations of the logits; NaN: not run.
        routed: whether differences in runs of equal shapes were rounding (a mixture of experts).
        sees_itself: whether a token moves the logits of its own row; not so where the input is shifted inside.
    """

    reaches_back: bool | None
    equal_lengths: str
    placement: Placement
    narrowed: torch.dtype | None
    ambient: bool = False
    measured: dict[str, float] = field(default_factory=dict)
    routed: bool = False
    sees_itself: bool = True

    @classmethod
    def taken_for_granted(cls) -> Contract:
        """What most modules do, for one that cannot be run."""
        return cls(None, "", Placement(), None)


# Module -> state -> mask token of the trial -> what was found.
_known: WeakKeyDictionary[nn.Module, dict[Hashable, dict[int | None, Contract]]] = WeakKeyDictionary()


def contract_of(called: CalledModule, mask_token_id: int | None = None) -> Contract:
    """The module's contract, from six short runs, one of them with gradient; once per module, adapter and settings.

    Args:
        mask_token_id: stands in every row, as in the queries of a masked model; None where nothing is hidden so.
    Raises: RevprobeError, for a module that cannot be run, is random in eval mode, writes into its weights, lets rows
        of a batch reach each other, or gives rows of logits that are not its tokens'.
    """
    state, wanted = (state_of(called.module), called.block_size), mask_token_id
    known = _known.setdefault(called.module, {}).setdefault(state, {})
    found = known.get(wanted) or (next(iter(known.values()), None) if wanted is None else None)
    if found is None:
        require_mask_argument(called)
        with skeleton(called.module, called.name) as copy:
            tried = CalledModule(copy, called.name, called.block_size)
            found = _judge(run_trial(tried, wanted))
            if tried.block_size is not None:
                require_blocks(tried, wanted, found.placement.logits, found.narrowed)
        if found.reaches_back is not None:  # else it will be another once it has been trained
            known[wanted] = found
    return found


def state_of(module: nn.Module) -> Hashable:
    """What changes a module's behaviour other than training: its parts and their settings, adapters, kernel and dtype.

    Hooks do not count: whoever adds one to look on should not have the model run again.
    """
    parts = tuple((name, type(part), _settings(part)) for name, part in module.named_modules())
    configs = {id(part.config): part.config for part in module.modules() if "config" in vars(part)}.values()
    kernels = tuple(
        (getattr(config, "_attn_implementation", None), getattr(config, "is_causal", None) is False)
        for config in configs
    )
    adapter = str(getattr(module, "active_adapter", "")) if hasattr(module, "peft_config") else ""
    dtype = next((p.dtype for p in module.parameters()), None)
    return hash((parts, kernels, adapter, dtype, _ambient(module), id(vars(module).get("forward"))))


def _settings(part: nn.Module) -> tuple[tuple[str, object], ...]:
    """Flags, names and numbers that a module keeps as attributes, adapters' included; without `_MARKS`."""
    plain = bool | int | float | str | None
    own = {key: value for key, value in vars(part).items() if isinstance(value, plain) and key not in _MARKS}
    adapters = [key for key in ("_active_adapter", "merged_adapters", "_disable_adapters") if key in vars(part)]
    return (*own.items(), *((key, str(vars(part)[key])) for key in adapters))


def _ambient(module: nn.Module) -> bool:
    """Whether the caller runs this under autocast."""
    return torch.is_autocast_enabled(next((p.device.type for p in module.parameters() if not p.is_meta), "cpu"))


def _judge(trial: Trial) -> Contract:
    placement = place_tokens(trial)
    if trial.drew:
        _require_repeatable(trial)
    judge = _Judge(trial, placement.logits)
    changes = trial.moved(
        trial.plain.logits[2, placement.logits + 1 :], trial.changed.logits[2, placement.logits + 1 :]
    )
    judge.require_own_rows()
    reaches = judge.reaches_back()
    return Contract(
        reaches if reaches or changes else None,
        judge.padding(),
        placement,
        trial.arithmetic if trial.arithmetic.itemsize < trial.called.dtype.itemsize else None,
        _ambient(trial.called.module),
        judge.measured,
        judge.routed,
        judge.sees_itself() or not (reaches or changes),
    )


class _Judge:
    """Verdicts over one trial; `measured` and `routed` collect what `Contract` says of them."""

    def __init__(self, trial: Trial, offset: int) -> None:
        self.trial, self.offset = trial, offset
        self.measured: dict[str, float] = {}
        self.routed = False
        self.reach: Reach | None = reached(trial, offset)
        if self.reach is not None and not self.reach.repeated:
            _require_repeatable(trial)

    def rows(self, logits: Tensor, row: int, tokens: int | None = None) -> Tensor:
        """The logits of a row's first tokens, by default those of the middle row. Shapes: `-> tokens vocab`."""
        return logits[row, self.offset : self.offset + (self.trial.tokens if tokens is None else tokens)]

    def require_own_rows(self) -> None:
        """Raises: RevprobeError, when other rows' content, or their number, moves a row's logits."""
        trial, name = self.trial, self.trial.called.name
        content = trial.moved(trial.plain.logits[1], trial.changed.logits[1])
        if trial.padded is not None and trial.refilled is not None:
            content = max(content, trial.moved(trial.padded.logits[2], trial.refilled.logits[2]))
        self.measured["other rows"] = content
        if self._reaches(content, "other_rows"):
            _require_repeatable(trial)
            by = f"by {content:.1g} of their spread" if content else "as their gradients show"
            raise RevprobeError(
                f"{name}: the tokens of one row change the logits of another {by}, so a number would depend on what "
                "shares its batch; probe a model whose rows are independent"
            )
        number = trial.moved(self.rows(trial.plain.logits, 1), self.rows(trial.alone.logits, 0))
        self.measured["batch size"] = number
        if trial.arithmetic.itemsize >= 4 and not _is_coarse(trial) and number > _FLOAT32 and not self.routed:
            raise RevprobeError(
                f"{name}: a row alone and among two others differs by {number:.1g} of the logits' spread, so a number "
                "would depend on the batch size; probe a model whose rows are independent"
            )

    def reaches_back(self) -> bool:
        """Whether another later token moves earlier logits."""
        trial, last = self.trial, self.trial.tokens - 1
        moved = trial.moved(*(self.rows(run.logits, 0, last) for run in (trial.plain, trial.changed)))
        if trial.padded is not None and trial.refilled is not None:
            half = trial.padded.ids.shape[1] // 2
            halves = (self.rows(run.logits, 0, half) for run in (trial.padded, trial.refilled))
            moved = max(moved, trial.moved(*halves))
        self.measured["later tokens"] = moved
        return self._reaches(moved, "later")

    def sees_itself(self) -> bool:
        """Whether the last token moves the logits of its own row."""
        last = self.offset + self.trial.tokens - 1
        return not torch.equal(self.trial.plain.logits[0, last], self.trial.changed.logits[0, last])

    def padding(self) -> str:
        """Why padding may not stand beside real tokens; empty where it may."""
        trial = self.trial
        if trial.padded is None or trial.refilled is None:
            self.measured |= {"padding": float("nan"), "alone": float("nan")}
            return trial.refusal
        content = trial.moved(self.rows(trial.padded.logits, 1), self.rows(trial.refilled.logits, 1))
        alone = trial.moved(self.rows(trial.padded.logits, 1), self.rows(trial.alone.logits, 0))
        self.measured |= {"padding": content, "alone": alone}
        if self._reaches(content, "padding"):
            return f"padded tokens change its logits by {content:.1g} of their spread"
        allowed = _TIMES_NOISE * self.measured["batch size"]
        if alone > max(allowed, _FLOAT32 if not _is_coarse(trial) else 0.0) and not self.routed:
            return f"a padded row's logits differ from the row's alone by {alone:.1g} of their spread"
        return ""

    def _reaches(self, moved: float, place: str) -> bool:
        """Whether tokens reach logits: by moving them more than experts' rounding, or by their gradient."""
        if self.reach is not None and getattr(self.reach, place):
            return True
        if not moved:
            return False
        if self.reach is None or not self.trial.may_be_rounding(moved):
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
            "the same input differently each time; make it heed the flag `training` (its own eval() is not called)"
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
