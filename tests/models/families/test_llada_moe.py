"""LLaDA-MoE of any size against a slow decoder; its router, its layout, and what it refuses.

The fixture has neither a dense layer nor a shared expert: both are drawn here.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import copied, refusal, rewrite, set_in_config
from long_cases import rest_long
from plain_gradients import worst_product_error
from safetensors.torch import load_file
from slow_decoder import pick, write_checkpoint
from slow_mixture import Layer, Slow, apart, swiglu, worst_apart
from torch import Tensor

import revprobe as rp
from revprobe.models.families.files import Files
from revprobe.models.families.known import family_of, read_config
from revprobe.models.families.llada_moe import LLADA_MOE
from tiny import FIXTURES

NAME, MASK = "lladamoe-tiny", 252
CLOSE = 2e-5
TOKENS = 11


# --- drawn checkpoints -----------------------------------------------------------------------------------------------


def drawn_config(seed: int) -> dict:
    """As the published file has it; seeds differ in what the fixture has no example of."""
    torch.manual_seed(seed)
    groups, per, dim, layers, experts = pick(1, 2, 3), pick(1, 2), pick(4, 6, 10), 2 + seed % 2, pick(4, 5, 7)
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "hidden_size": groups * per * dim,
        "num_attention_heads": groups * per,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": pick(1, 2, 3),
        "moe_layer_freq": [[0, 1, 1], [1, 0, 1], [1, 1, 1]][seed % 3][:layers],
        "dense_intermediate_size": pick(14, 20),
        "expert_intermediate_size": pick(8, 12),
        "shared_expert_intermediate_size": [None, 10][seed % 2],
        "qk_layernorm": seed % 4 != 2,
        "tie_word_embeddings": seed % 3 == 1,
        "vocab_size": 40 - 3 * (seed == 4),
        "rms_norm_eps": pick(1e-5, 1e-6),
        "rope_theta": pick(50000, 10000.0),
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "partial_rotary_factor": 1,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "torch_dtype": "float32",
    }


# What the grouped product takes.
SIZED = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "expert_intermediate_size": 8}


def drawn_weights(config: dict) -> dict[str, Tensor]:
    """Under the published names."""
    width, dim = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (40, width), "model.norm.weight": (width,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (40, width)}
    for n, kind in enumerate(config["moe_layer_freq"]):
        at = f"model.layers.{n}."
        shapes |= {f"{at}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        grouped = config["num_key_value_heads"] * dim
        for letter, rows in zip("qkvo", (width, grouped, grouped, width), strict=True):
            shapes[f"{at}self_attn.{letter}_proj.weight"] = (rows, width)
        if config["qk_layernorm"]:
            shapes |= {f"{at}self_attn.{letter}_norm.weight": (dim,) for letter in "qk"}
        mlps = {f"{at}mlp.": config["dense_intermediate_size"]}
        if kind:
            shapes[f"{at}mlp.gate.weight"] = (config["num_experts"], width)
            mlps = {f"{at}mlp.experts.{e}.": config["expert_intermediate_size"] for e in range(config["num_experts"])}
            shared = config["shared_expert_intermediate_size"]
            mlps |= {f"{at}shared_expert.": shared} if shared else {}
        for place, inner in mlps.items():
            shapes |= {f"{place}{part}_proj.weight": (inner, width) for part in ("gate", "up")}
            shapes[f"{place}down_proj.weight"] = (width, inner)
    scales = {name: 0.2 if name.endswith("mlp.gate.weight") else 0.5 for name in shapes}
    return {name: torch.randn(shape) * scales[name] + (len(shape) == 1) for name, shape in shapes.items()}


def slow(config: dict, weights: dict[str, Tensor]) -> Slow:
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads = config["num_attention_heads"]
    dim = config["hidden_size"] // heads
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    sizes = (heads, config["num_key_value_heads"], dim, dim, float(config["rope_theta"]), config["rms_norm_eps"])
    made = Slow(w["model.embed_tokens.weight"], w["model.norm.weight"], head, *sizes)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        norms = [w[f"{at}{norm}.weight"] for norm in ("input_layernorm", "post_attention_layernorm")]
        four = [w[f"{at}self_attn.{letter}_proj.weight"] for letter in "qkvo"]
        own = [w.get(f"{at}self_attn.{letter}_norm.weight") for letter in "qk"]
        made.layers.append(Layer(*norms, *four, *own, lambda token, n=n: mlp(w, config, n, token)))
    return made


def mlp(w: dict[str, Tensor], config: dict, layer: int, token: Tensor) -> Tensor:
    """A softmax over all experts; the few best, weighted by it as it is."""
    at = f"model.layers.{layer}."
    if not config["moe_layer_freq"][layer]:
        return swiglu(token, w, f"{at}mlp.")
    score = (w[f"{at}mlp.gate.weight"] @ token).exp()
    score = score / score.sum()
    best = sorted(range(len(score)), key=lambda e: -float(score[e]))[: config["num_experts_per_tok"]]
    out = sum(score[e] * swiglu(token, w, f"{at}mlp.experts.{e}.") for e in best)
    return out + swiglu(token, w, f"{at}shared_expert.") if config["shared_expert_intermediate_size"] else out


@pytest.mark.parametrize("seed", rest_long(range(6), 2))
@torch.no_grad()
def test_any_size_equals_a_slow_decoder(seed: int, tmp_path: Path) -> None:
    config = drawn_config(seed)
    weights = drawn_weights(config)
    model = rp.load_model(write_checkpoint(tmp_path, weights, config), mask_token_id=38 - 3 * (seed == 4))
    assert (model.vocab_size, model.reads, model.logit_shift) == (40, "bidirectional", 0)
    ids = torch.randint(40, (1, TOKENS))
    made = slow(config, weights)
    logits, scores = made.run(ids[0].tolist(), lambda i, j: True)
    assert worst_apart(model, ids, logits, scores) < CLOSE
    assert worst_apart(model.in_blocks(4), ids, *made.run(ids[0].tolist(), lambda i, j: j // 4 <= i // 4)) < CLOSE
    # Planted faults: weights renormalised, one expert less, the shared expert or a dense layer left out.
    for fault in FAULTS:
        faulty = rp.load_model(tmp_path, mask_token_id=5)
        if fault(faulty.module):
            assert apart(faulty.logits(ids)[0], logits) > 100 * CLOSE, fault.__name__


def renormalised(module: torch.nn.Module) -> bool:
    gates = [part for part in module.modules() if hasattr(part, "norm_topk_prob")]
    for gate in gates:
        gate.norm_topk_prob = True
    return True


def one_expert_less(module: torch.nn.Module) -> bool:
    gates = [part for part in module.modules() if hasattr(part, "top_k")]
    for gate in gates:
        gate.top_k -= 1
    return gates[0].top_k > 0


def nothing_shared(module: torch.nn.Module) -> bool:
    shared = [p for name, p in module.named_parameters() if "shared_expert.down" in name]
    for weight in shared:
        weight.zero_()
    return bool(shared)


def keys_not_normed(module: torch.nn.Module) -> bool:
    for layer in module.model.layers:
        layer.self_attn.k_norm = torch.nn.Identity()
    return module.config.qk_layernorm


FAULTS = (renormalised, one_expert_less, nothing_shared, keys_not_normed)


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shard", ["5GB", "5KB"])
def test_saving_gives_back_the_published_names_and_tensors(seed: int, shard: str, tmp_path: Path) -> None:
    config = drawn_config(seed)
    published = drawn_weights(config)
    model = rp.load_model(write_checkpoint(tmp_path / "published", published, config), mask_token_id=38)
    model.module.save_pretrained(tmp_path / "again", max_shard_size=shard)
    files = sorted((tmp_path / "again").glob("model*.safetensors"))
    assert (len(files) > 1) == (shard == "5KB")
    again = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert again.keys() == published.keys() and all(torch.equal(again[name], published[name]) for name in published)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    theirs = {key for key, value in config.items() if value is not None and written.get(key) != value}
    assert theirs <= {"model_type", "architectures", "torch_dtype", "partial_rotary_factor"}
    assert rp.load_model(tmp_path / "again").mask_token_id == 38


def test_a_model_that_was_never_in_a_file_is_saved_in_the_published_layout(tmp_path: Path) -> None:
    config, _ = read_config(write_checkpoint(tmp_path, drawn_weights(drawn_config(1)), drawn_config(1)))
    torch.manual_seed(0)
    module = LLADA_MOE.model_class(config)
    shared = module.model.layers[0].mlp.shared_expert.gate_proj.weight
    assert 0.5 < float(shared.detach().std()) / config.initializer_range < 2, "drawn as the rest of the model"
    module.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == drawn_weights(drawn_config(1)).keys()


def test_two_tensors_of_one_shape_in_each_others_place_are_seen(tmp_path: Path) -> None:
    """The planted fault: experts in another order, or a gate for an up projection."""
    config = json.loads((FIXTURES / NAME / "config.json").read_text())
    expected = load_file(FIXTURES / NAME / "reference.safetensors")
    at = "model.layers.0.mlp.experts"
    for one, other in ((f"{at}.1.gate_proj", f"{at}.1.up_proj"), (f"{at}.0.down_proj", f"{at}.5.down_proj")):
        weights = load_file(FIXTURES / NAME / "model.safetensors")
        one, other = f"{one}.weight", f"{other}.weight"
        weights[one], weights[other] = weights[other], weights[one]
        model = rp.load_model(write_checkpoint(tmp_path, weights, config), mask_token_id=MASK)
        with torch.no_grad():
            assert float((model.logits(expected["input_ids"]) - expected["logits_nomask"]).abs().max()) > 1e-3


def test_a_tensor_of_a_shared_expert_that_is_missing_is_called_as_in_the_file(tmp_path: Path) -> None:
    """Its module is renamed, so is all that is in it."""
    config = drawn_config(1)
    weights = drawn_weights(config)
    gone = next(name for name in weights if "shared_expert.up" in name)
    del weights[gone]
    with pytest.raises(rp.RevprobeError, match=f"missing {gone} "):
        rp.load_model(write_checkpoint(tmp_path, weights, config), mask_token_id=3)


@pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
def test_gradients_of_experts_routers_and_shared_experts_equal_autograd(kernel: str, tmp_path: Path) -> None:
    """In groups they are split by example; one after the other they are read one example at a time, and named."""
    config = drawn_config(5) | SIZED
    write_checkpoint(tmp_path, drawn_weights(config), config)
    model = rp.load_model(tmp_path, mask_token_id=38, experts_implementation=kernel)
    ids = torch.randint(37, (4, 9), generator=torch.Generator().manual_seed(1))

    def loss(which: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(model.logits(ids[which])[:, 4], ids[which, 0], reduction="none")

    unread: dict[str, str] = {}
    parameters = dict(model.module.named_parameters())
    assert worst_product_error(model.module, parameters, loss, 4, unread=unread) < 1e-5
    experts = {name for name in parameters if ".experts." in name}
    assert set(unread) == (experts if kernel == "eager" else set()) and len(experts) == 6
    assert model.module.config._experts_implementation == kernel


@torch.no_grad()
def test_in_float64_experts_run_one_after_the_other() -> None:
    """The grouped product takes no float64."""
    with pytest.raises(rp.RevprobeError, match="cannot be multiplied in groups; use experts_implementation='eager'"):
        rp.load_model(FIXTURES / NAME, mask_token_id=MASK, dtype="float64", experts_implementation="grouped_mm")
    model = rp.load_model(FIXTURES / NAME, mask_token_id=MASK, dtype="float64")
    expected = load_file(FIXTURES / NAME / "reference.safetensors")
    assert float((model.logits(expected["input_ids"]) - expected["logits_nomask"]).abs().max()) < CLOSE


@torch.no_grad()
def test_the_bridge_gives_the_models_own_logits_with_dense_layers_and_shared_experts(tmp_path: Path) -> None:
    config = drawn_config(1)
    model = rp.load_model(write_checkpoint(tmp_path, drawn_weights(config), config), mask_token_id=38)
    ids = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    bridge = model.to_bridge()
    assert float((bridge(ids, attention_mask=mask) - model.logits(ids, mask))[mask.bool()].abs().max()) < 1e-4


# --- whose files, and what is refused --------------------------------------------------------------------------------


def test_the_family_is_told_from_dense_llada_and_by_its_published_names() -> None:
    said = json.loads((FIXTURES / NAME / "config.json").read_text())
    assert family_of(Files("any", said)) is LLADA_MOE
    assert family_of(Files("any", said | {"architectures": None})) is LLADA_MOE
    assert family_of(Files.at(FIXTURES / "llada-tiny")) is not LLADA_MOE
    for kind in ("Base", "Instruct"):
        files = Files(f"inclusionAI/LLaDA-MoE-7B-A1B-{kind}", said)
        assert family_of(files) is LLADA_MOE and LLADA_MOE.config(files).mask_token_id == 156895


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("clip_qkv", 8.0),
        ("moe_router_enable_expert_bias", True),
        ("moe_router_score_function", "sigmoid"),
        ("norm_topk_prob", True),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}),
        ("routed_scaling_factor", 2.5),
        ("router_num_group", 4),
        ("router_topk_group", 2),
        ("use_sliding_window", True),
        ("moe_layer_freq", [1]),
        ("num_experts_per_tok", None),
        ("rope_theta", None),
        ("num_experts", None),
    ],
)
def test_what_it_cannot_do_or_is_not_told_is_refused_by_name(setting: str, value: object, tmp_path: Path) -> None:
    settings = {setting: value}
    if setting == "rope_parameters":  # newer files have it there
        setting, settings = "partial_rotary_factor", settings | {"partial_rotary_factor": None}
    set_in_config(copied(NAME, tmp_path / "any"), **settings)
    assert setting in refusal(tmp_path / "any", mask_token_id=MASK)


def without(*ends: str):
    """Takes some tensors out."""
    return lambda weights: [weights.pop(name) for name in [*weights] if name.endswith(ends)]


SIXTH = "model.layers.0.mlp.experts.5.up_proj.weight"
DAMAGES = {
    "a tensor of an expert": (
        without("0.mlp.experts.3.up_proj.weight"),
        r"0\.mlp\.experts\.3\.up_proj\.weight missing",
    ),
    "an expert": (without(*(f"1.mlp.experts.2.{p}_proj.weight" for p in ("gate", "up", "down"))), "1.mlp.experts.2."),
    "all up projections": (
        without(*(f"0.mlp.experts.{e}.up_proj.weight" for e in range(6))),
        r"0\.mlp\.experts\.0\.up_proj\.weight, .* and 1 more missing",
    ),
    "a router": (without("1.mlp.gate.weight"), "missing model.layers.1.mlp.gate.weight"),
    "an expert under another number": (
        lambda weights: weights.update({SIXTH.replace(".5.", ".6."): weights.pop(SIXTH)}),
        "experts.5.up_proj.weight, model.layers.0.mlp.experts.6.up_proj.weight",
    ),
    "a router of another size": (
        lambda weights: weights.update({"model.layers.0.mlp.gate.weight": torch.zeros(5, 64)}),
        r"mismatched model.layers.0.mlp.gate.weight \(\(5, 64\) for \(6, 64\)\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_left_over_or_misshapen_is_named(damage: str, tmp_path: Path) -> None:
    change, said = DAMAGES[damage]
    rewrite(copied(NAME, tmp_path / "any"), change)
    assert re.search(said, refusal(tmp_path / "any", mask_token_id=MASK))
