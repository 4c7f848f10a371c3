"""The kinds of value that configs are made of, strict where YAML is generous."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_serializer

from .kinds import ConfigKind

# A run or sweep name becomes a folder.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
# Several of them as one: "wide+drop-right".
Names = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(\+[A-Za-z0-9][A-Za-z0-9._-]*)*$", max_length=100)]
# YAML booleans and quoted numbers are mistakes here, not numbers.
Count = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
# Sides of a weight, and layers: more than any model has, and few enough to be multiplied.
Size = Annotated[StrictInt, Field(ge=1, le=2**17)]
Threads = Annotated[StrictInt, Field(ge=1, le=1024)]
# Training holds every placement of every letter pair; their number grows with the square of the length.
Length = Annotated[StrictInt, Field(ge=2, le=512)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
# numpy's generators take no larger one.
Seed = Annotated[StrictInt, Field(ge=0, le=2**32 - 1)]


class Section(BaseModel):
    """A part of a config: a key it does not know is an error, and nothing changes it once it is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    # Of a config that is a file: what kind of file.
    kind: ClassVar[ConfigKind | None] = None


class Grown(Section):
    """A section with keys that came later: at their default they are not written, so that a run's config.yaml from
    before stays the config that it is."""

    added: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_added_defaults(self, handler: Any) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            key: value
            for key, value in handler(self).items()
            if key not in self.added or getattr(self, key) != fields[key].default
        }


def as_listed(value: object) -> object:
    """A name by itself as a list of one."""
    return [value] if isinstance(value, str) else value
