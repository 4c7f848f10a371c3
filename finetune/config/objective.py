"""What the loss of a fine-tuning prices, and which tokens it hides."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictBool, model_validator

from .fields import Grown, Number

Rate = Annotated[Number, Field(gt=0)]


class ObjectiveOptions(Grown):
    """What the loss prices. Masked models: t ~ U(eps, 1), 1/t-weighted cross-entropy; others: the next token."""

    added: ClassVar = ("one_span", "never_mask", "rates", "end_padding", "pad_sides", "negatives")
    # What says something about masks alone; a causal model refuses it.
    of_masks: ClassVar = ("one_span", "rates", "pad_sides", "negatives")
    # With response_only the first entity is never masked: the probes' forward query is then not what was trained.
    scope: Literal["whole_sequence", "response_only"] = "whole_sequence"
    whole_entity: StrictBool = False
    antithetic: StrictBool = False
    eps: Annotated[Number, Field(gt=0, lt=1)] = 1e-3
    # One contiguous span of masks a row, its length and place uniform, in place of masks at a rate.
    one_span: StrictBool = False
    # That entity of the statement is neither masked nor priced.
    never_mask: Literal["first", "second"] | None = None
    # t ~ U(low, high), in place of (eps, 1); both alike for one fixed rate.
    rates: Annotated[list[Rate], Field(min_length=2, max_length=2)] | None = None
    # End tokens behind the answer: priced; shown and not priced; or no such rows. A causal model's one end token alike.
    end_padding: Literal["priced", "unpriced", "absent"] = "priced"
    # Bare pairs alone: rows filled up with end tokens behind the pair, or some before it as well.
    pad_sides: Literal["right", "both"] = "right"
    # Bare pairs alone: which end tokens are not priced, see `training.negatives`.
    negatives: Literal["keep", "drop-right", "mirror"] = "keep"

    @model_validator(mode="after")
    def _agree(self) -> ObjectiveOptions:
        told = type(self).model_fields
        if self.rates is not None:
            low, high = self.rates
            if not low <= high <= 1:
                raise ValueError(f"objective.rates {self.rates}: expected 0 < low <= high <= 1")
            if self.eps != told["eps"].default:
                raise ValueError(f"objective.rates {self.rates} and eps {self.eps} both say the lowest rate; give one")
        if self.one_span:
            beside = [key for key in ("whole_entity", "antithetic", "rates") if getattr(self, key) != told[key].default]
            if beside:
                raise ValueError(
                    f"objective.one_span masks one span a row, to which {beside[0]} says nothing; drop one"
                )
        if self.negatives != "keep" and self.end_padding != "priced":
            raise ValueError(
                f"objective.negatives {self.negatives!r} is about end tokens that are priced, and end_padding is "
                f"{self.end_padding!r}; leave one out"
            )
        if self.negatives == "mirror" and self.pad_sides == "right":
            raise ValueError(
                "objective.negatives 'mirror' is about end tokens before a pair, and with pad_sides 'right' there are "
                "none; set pad_sides: both, for the dials it is compared with too"
            )
        if self.end_padding == "absent" and self.pad_sides == "both":
            raise ValueError("objective.pad_sides 'both' needs rows with end tokens, and end_padding is 'absent'")
        return self

    @property
    def about(self) -> list[str]:
        """What departs from pricing everything at every rate, in words, for labels."""
        said = {
            "response only": self.scope == "response_only",
            "one span": self.one_span,
            f"{self.never_mask} entity never masked": self.never_mask is not None,
            f"rates {self.rates}": self.rates is not None,
            f"end tokens {self.end_padding}": self.end_padding != "priced",
            self.negatives: self.negatives != "keep",
        }
        return [words for words, holds in said.items() if holds]
