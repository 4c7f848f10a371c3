"""The description of a family of published checkpoints: data, by which its files are read into one of our classes.

A description knows config.json and the names of tensors, and no forward pass: that is its `model_class`'s, mostly a
class of transformers without its causal mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from .files import Files, Settings


def equal_rows(tensor: Tensor, config: Any, parts: int) -> Sequence[Tensor]:
    """As many equal blocks of rows as there are parts."""
    return tensor.chunk(parts) if tensor.shape[0] % parts == 0 else []


@dataclass(frozen=True)
class Fused:
    """A published tensor that is several of ours.

    Attributes:
        parts: their names here, in the order of `split`; `{}` stands for the number of a layer.
        split: takes the tensor, our config and the number of parts, and gives the parts; nothing where it does not fit.
    """

    parts: Sequence[str]
    split: Callable[[Tensor, Any, int], Sequence[Tensor]] = equal_rows


def of_type(model_type: str) -> Callable[[Files], bool]:
    """Recognises a family by the `model_type` of its config.json."""
    return lambda files: files.model_type == model_type


def own_settings(files: Files) -> dict[str, Any]:
    """Of a family whose config.json is our config's."""
    return dict(files.settings)


@dataclass(frozen=True)
class Family:
    """How the files of one family are read.

    Attributes:
        name: as people call it.
        about: one line for `list_models`.
        model_class: ours; its `config_class`, `logit_shift` and `attention` go with it.
        causal_class: of the causal model that some families are as well, under the same weights and config.
        recognises: whether files are the family's.
        to_config: the settings of our config from the published files, and from what the user was asked for.
        asks: options of `load_model` that `to_config` takes beside the files.
        key_map: published name of a module, with all that is in it, or of a tensor -> ours; `{}` stands for the number
            of a layer. The first that fits counts.
        fused: published name of a tensor -> those it is made of.
        streams: whether transformers puts tensors under our names while it loads and saves (`rename_by`): none is held
            twice then, and what is saved keeps the published names.
        embedding: our name of the table of tokens; where it has more rows than the config says, its rows count. Empty
            where more rows mean something else.
        constants: published name of a buffer that is worked out here -> the check of its value, which raises.
        plain: the `model_type` of the transformers models that `bidirectional=True` reads as this family.
        tokenizer: the public one that the family uses, by its name on the hub; None where checkpoints bring their own.
        published: name on the hub -> settings of our config that its files do not say.
        licence: of the published code, and of the weights.
        parity: the largest difference of logits and scores to the published code's, on the tiny checkpoint in the tests
            (float32); None where that code could not be run.
    """

    name: str
    about: str
    model_class: type[PreTrainedModel]
    recognises: Callable[[Files], bool]
    to_config: Callable[..., dict[str, Any]] = own_settings
    causal_class: type[PreTrainedModel] | None = None
    asks: Sequence[str] = ()
    key_map: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)
    streams: bool = False
    embedding: str = "model.embed_tokens.weight"
    constants: Mapping[str, Callable[[Tensor, Settings], None]] = field(default_factory=dict)
    plain: str = ""
    tokenizer: str | None = None
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    licence: str = ""
    parity: float | None = None

    @property
    def attention(self) -> str:
        """ "full", "block" or "either", as the class states it (`bases/bidirectional.py`); or "causal"."""
        return "causal" if self.objective == "causal" else str(getattr(self.model_class, "attention", "full"))

    @property
    def logit_shift(self) -> int:
        return int(getattr(self.model_class, "logit_shift", 0))

    @property
    def noise(self) -> str:
        """What hides a token: "mask", or "uniform" (a random token), as the class states it."""
        return str(getattr(self.model_class, "noise", "mask"))

    @property
    def tokenizer_source(self) -> str | None:
        """A name on the hub that has the family's tokenizer, for checkpoints that bring none."""
        return self.tokenizer or next(iter(self.published), None)

    @property
    def objective(self) -> str:
        """ "masked" or "causal"."""
        return str(getattr(self.model_class, "objective", "masked"))

    def class_for(self, objective: str) -> type[PreTrainedModel] | None:
        """The class that reads its files as "masked" or as "causal"; None where they are no such model."""
        return {"causal": self.causal_class, self.objective: self.model_class}.get(objective)

    @property
    def translates(self) -> bool:
        """Whether published tensors are put under our names here, before transformers sees them."""
        return not self.streams and bool(self.key_map or self.fused or self.constants)

    def config(self, files: Files, **asked: Any) -> PreTrainedConfig:
        """Our config of published files. Raises: RevprobeError, for settings that the class does not have."""
        settings = self.to_config(files, **asked) | dict(self.published.get(files.name, {}))
        rows = files.rows(self.official_name(self.embedding), self.embedding) or 0
        if rows > settings.get("vocab_size", 0):
            settings["vocab_size"] = rows
        kind: Any = self.model_class.config_class
        return kind(**{key: _as_declared(value, kind, key) for key, value in settings.items() if key not in _NOT_OURS})

    def translate(self, tensors: Mapping[str, Tensor], files: Files, config: Any) -> dict[str, Tensor]:
        """A checkpoint's tensors under our names; what the family does not know keeps its own.

        Raises: RevprobeError, when a constant is not what the forward pass here works out.
        """
        ours: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in self.constants:
                self.constants[name](tensor, files.settings)
            elif parts := self._parts(name, tensor, config):
                ours |= parts
            else:
                ours[_first(name, self.key_map.items())] = tensor
        return ours

    def _parts(self, name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
        """What a fused tensor is made of, under our names; empty for another."""
        for published, fused in self.fused.items():
            if parts := _renamed(name, published, *fused.parts):
                rows = fused.split(tensor, config, len(parts))
                # Copies, so that saving meets no tensors that share their memory.
                return {part: own.clone() for part, own in zip(parts, rows, strict=False)}
        return {}

    def official_name(self, name: str) -> str:
        """The published name of one of our tensors; other names stay as they are."""
        pairs = [(here, published) for published, here in self.key_map.items()]
        pairs += [(part, published) for published, fused in self.fused.items() for part in fused.parts]
        return _first(name, pairs)


@dataclass(frozen=True)
class PublishedFiles:
    """A checkpoint in the layout of a family, with its files and our config of them."""

    family: Family
    files: Files
    config: PreTrainedConfig

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its tensors under our names. Raises: RevprobeError, when a constant is not what is worked out here."""
        return self.family.translate(tensors, self.files, self.config)


# Of a published config.json: the kernel it was trained with (flex, flash), what the class states itself, and how other
# code called it, which would make tuples of outputs, or weights of attention that only the eager kernel has.
_NOT_OURS = (
    *("attn_implementation", "_attn_implementation", "model_type", "transformers_version"),
    *("return_dict", "output_attentions", "output_hidden_states"),
)


def _as_declared(value: Any, kind: type, key: str) -> Any:
    """A setting that json has as a whole number and the class as a fraction: transformers would refuse it."""
    return float(value) if type(value) is int and isinstance(getattr(kind, key, None), float) else value


def rename_by(
    key_map: Mapping[str, str], model_type: str, *, fused: Mapping[str, Fused] | None = None, like: str = ""
) -> None:
    """Let transformers rename, cut up and gather tensors while it reads and writes models of this type.

    Keyed by model type, since a class's own key is not inherited by subclasses.
    Args:
        like: the `model_type` of the class of transformers whose experts are gathered: files have one tensor for each
            expert, the class one for all.
    """
    renamings: list[Any] = [WeightRenaming(*_patterns(*names)) for names in key_map.items()]
    cuts = [_cut(published, one, kind) for published, one in (fused or {}).items() for kind in ("weight", "bias")]
    experts = get_checkpoint_conversion_mapping(like) or []
    register_checkpoint_conversion_mapping(model_type, [*renamings, *cuts, *experts], overwrite=True)


def _patterns(published: str, ours: str) -> tuple[str, str]:
    """One anchored pattern a module or tensor: reversible, and without effect on a file that has our names already."""
    return rf"^{re.escape(published)}".replace(r"\{\}", r"(\d+)"), ours.replace("{}", r"\1")


def _cut(published: str, fused: Fused, kind: str) -> WeightConverter:
    """One fused tensor, by its name inside a layer: transformers wants no numbers in the patterns of such."""
    inside, *parts = (f"{name.rpartition('{}.')[2]}.{kind}" for name in (published, *fused.parts))
    return WeightConverter(inside, parts, [_Cut(fused.split)])


class _Cut(ConversionOps):
    """`Fused.split` as a step of transformers' loader; saving puts the parts together again."""

    def __init__(self, split: Callable[[Tensor, Any, int], Sequence[Tensor]]) -> None:
        self.split = split

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **about: Any
    ) -> dict[str, Any]:
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        # What does not fit stands for every part, with an axis too many to be taken for one: its name goes into the
        # message (`require_match`), which an error here would not.
        rows = self.split(tensor, about["config"], len(target_patterns)) or [tensor[None]] * len(target_patterns)
        return {part: own.clone() for part, own in zip(target_patterns, rows, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


def published_name(name: str, key_map: Mapping[str, str]) -> str:
    """The published name of one of our tensors; other names stay as they are.

    >>> published_name("model.layers.3.mlp.up_proj.weight", {"backbone.layers.{}": "model.layers.{}"})
    'backbone.layers.3.mlp.up_proj.weight'
    """
    return _first(name, ((ours, published) for published, ours in key_map.items()))


def _first(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name as the first pair that fits renames it; as it is where none does."""
    found = (_renamed(name, before, after) for before, after in pairs)
    return next((one[0] for one in found if one), name)


def _renamed(name: str, before: str, *after: str) -> list[str]:
    """The name with its beginning `before` put as each of `after`, the layer's number kept; empty where it has none."""
    match = re.fullmatch(re.escape(before).replace(r"\{\}", r"(\d+)") + r"(\..+)?", name)
    if match is None:
        return []
    *layers, rest = match.groups("")
    return [one.format(*layers) + rest for one in after]
