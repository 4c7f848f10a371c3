"""LoRA by peft: which projections get an adapter, and a base model prepared for it, in 4 bits where asked for.

The projections are found, not known by name: one traced pass shows where attention is computed, and every linear
module of the layers that hold those places is one of its query, key, value and output projections or belongs to the
MLP beside it. The unembedding lies outside the layers and is left alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import RevprobeError, did_you_mean, nearest
from ...hooks.attention_sites import attending_modules
from ...hooks.untouched import untouched
from ...models.bases.radd import Modulation
from ...models.peft_adapters import has_adapter
from ...models.probed import ProbedModel
from ..config.finetuning import LoraOptions

_LAYER = re.compile(r"^(?P<layers>.*?)\.(?P<number>\d+)(\.|$)")
# Below this size in the traced pass nothing is learned from a longer one.
_TRACED_TOKENS = 4


def projections(model: ProbedModel) -> dict[str, str]:
    """Every linear module inside the model's layers: its path -> "attention", "mlp", or "norm" (adaptive norms').

    Raises: RevprobeError, when no attention is seen, or no linear module stands in the layers that compute it.
    """
    # Of a memory plan only shapes are at hand, and nothing can be read; where attention is computed shows all the same.
    ids = torch.arange(_TRACED_TOKENS, device=model.device)[None] % model.vocab_size
    with untouched(model.module), torch.no_grad():
        sites = attending_modules(model.module, lambda: model.logits(ids))
    if not sites:
        raise RevprobeError(f"no attention was seen in {model.name}; name the modules to adapt in lora.targets")
    stacks = {found["layers"] for site in sites if (found := _LAYER.match(site))}
    linear = {name for name, part in model.module.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    inside = sorted(name for name in linear if any(name.startswith(f"{stack}.") for stack in stacks))
    if not inside:
        raise RevprobeError(
            f"{model.name} computes attention at {sites[0]!r}, but has no linear module in numbered layers around it; "
            "name the modules to adapt in lora.targets"
        )
    within = tuple(f"{site}." for site in sites)
    norms = {name for name, part in model.module.named_modules() if isinstance(part, Modulation)}
    return {name: "attention" if name.startswith(within) else "norm" if name in norms else "mlp" for name in inside}


def target_modules(model: ProbedModel, targets: str | Sequence[str] = "auto") -> list[str]:
    """What peft's `target_modules` gets: short names (q_proj, up_proj, ...) where they mean exactly the projections.

    Args:
        targets: "auto" for all attention and MLP projections, "attention" or "mlp" for those alone, or names as peft
            takes them (a module's path or the end of one).
    Raises: RevprobeError, for a name that no linear module has, which lists those there are; and for one that would be
        read as the experts of a mixture, which are no modules.
    """
    found = projections(model)
    if experts := _experts(model.module):
        _require_no_expert(model.name, experts, targets, found)
    if not isinstance(targets, str):
        for target in targets:
            if not any(path == target or path.endswith(f".{target}") for path in found):
                there = sorted({path.rpartition(".")[2] for path in found})
                near = did_you_mean(target, there) + (f" of {', '.join(there)}" if nearest(target, there) else "")
                raise RevprobeError(f"lora.targets: {model.name} has no projection {target!r}{near}")
        return list(targets)
    wanted = [name for name, kind in found.items() if kind == targets or (targets == "auto" and kind != "norm")]
    short = sorted({name.rpartition(".")[2] for name in wanted})
    everywhere = {name for name, _ in model.module.named_modules() if name.rpartition(".")[2] in short}
    return short if everywhere == set(wanted) else wanted


def _experts(module: nn.Module) -> dict[str, str]:
    """Experts kept in one tensor: each projection that a checkpoint has of them, gate_proj and the like -> its tensor.

    Mixtures of transformers fuse them when they load: `experts.gate_up_proj` is gate_proj and up_proj of all experts.
    """
    tensors = [name for name, tensor in module.named_parameters() if tensor.dim() == 3 and ".experts." in name]
    fused = {name: name.rpartition(".")[2] for name in tensors}
    return {
        projection: name
        for name, last in fused.items()
        for projection in (last, *(f"{part}_proj" for part in last.removesuffix("_proj").split("_")))
    }


def _require_no_expert(
    model: str, experts: Mapping[str, str], targets: str | Sequence[str], found: Mapping[str, str]
) -> None:
    """Raise where some of what is asked for lies in the experts: the adapter would be on the rest of it alone."""
    asked = [targets] if isinstance(targets, str) else targets
    wrong = [target for target in asked if target in ("auto", "mlp") or target in experts]
    if wrong:
        tensor = experts.get(wrong[0], next(iter(experts.values())))
        ends = {".".join(path.split(".")[-2:]) for path, kind in found.items() if kind == "mlp"}
        beside = f", or names of what lies beside them: {', '.join(sorted(ends))}" if ends else ""
        raise RevprobeError(
            f"lora.targets {wrong[0]!r}: the experts of {model} are one tensor a layer ({tensor}), which takes no "
            f"adapter here; use 'attention'{beside}"
        )


def require_no_adapter(model: ProbedModel) -> None:
    """Raise for a base that has an adapter: a new one takes its place, or checkpoints lack a part of it."""
    if has_adapter(model.module):
        raise RevprobeError(
            f"{model.name} has an adapter of peft on it, and fine-tuning starts from a whole model; merge it into its "
            "base (peft's merge_and_unload), save that, and name its folder as the model"
        )


def add_lora(model: ProbedModel, options: LoraOptions | None, *, checkpointing: bool = False) -> nn.Module:
    """The model's module with a fresh adapter, everything else frozen; initial values from torch's random state.

    Args:
        options: None for no adapter: the module itself, all of it to be trained.
        checkpointing: prepare a 4-bit base for gradient checkpointing too.
    Returns: a peft `PeftModel`; it changes nothing yet, since an adapter starts at zero.
    Raises: RevprobeError, for a model that has an adapter already; and as `target_modules`.
    """
    require_no_adapter(model)
    module: Any = model.module
    if options is None:
        plain: nn.Module = module.requires_grad_(True)
        return plain
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    targets = target_modules(model, options.targets)
    if getattr(module, "is_loaded_in_4bit", False):
        module = prepare_model_for_kbit_training(module, use_gradient_checkpointing=checkpointing)
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets, bias="none"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that it is renaming
        adapted: nn.Module = get_peft_model(module, config)
    return adapted


def quantization(quantize: str | None, dtype: torch.dtype, *, on_cpu: bool) -> dict[str, Any]:
    """What `from_pretrained` needs to load a base in 4 bits (QLoRA: NF4, doubly quantized); nothing for None.

    Raises: RevprobeError, without a GPU or without bitsandbytes.
    Source: Dettmers et al. 2023 (arXiv 2305.14314).
    """
    if quantize is None:
        return {}
    if on_cpu:
        raise RevprobeError(f"model.quantize {quantize!r} needs a CUDA GPU, and torch sees none here; leave it out")
    if find_spec("bitsandbytes") is None:
        raise RevprobeError(
            f"model.quantize {quantize!r} needs bitsandbytes, which is not installed; `pip install bitsandbytes`, or "
            "leave it out"
        )
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": bits, "device_map": {"": 0}}
