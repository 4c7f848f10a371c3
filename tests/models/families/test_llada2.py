"""LLaDA2.0 and 2.1 of any size against a slow decoder; their router, their layout, and what is refused.

The fixture's biases never make a dropped group's 0 the better choice: a bias of -0.5 does.
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
from revprobe.models.contract.block_masks import added_to_scores, training_mask
from revprobe.models.families.files import Files
from revprobe.models.families.known import family_of
from revprobe.models.families.llada2 import LLADA2, LLaDA2Config, LLaDA2Router
from tiny import FIXTURES

NAME, TOLD = "llada2-tiny", {"mask_token_id": 246, "block_size": 4}
CLOSE = 2e-5
TOKENS = 11


# --- drawn checkpoints -----------------------------------------------------------------------------------------------


def drawn_config(seed: int) -> dict:
    """As the published file has it; seeds differ in what the fixture has no example of."""
    torch.manual_seed(seed)
    kv, per, dim, layers = pick(1, 2, 3), pick(1, 2, 3), [4, 12, 10, 6, 8, 20][seed], 2 + seed % 2
    groups, size = [(1, 5), (2, 3), (4, 2), (3, 4), (2, 4), (4, 3)][seed]
    kept = max(1, groups - 1 - seed % 2)
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "hidden_size": pick(20, 24, 48),
        "num_attention_heads": kv * per,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "num_hidden_layers": layers,
        "num_experts": groups * size,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": 1 if seed == 3 else min(kept * size, pick(2, 3)),
        "num_shared_experts": 1 + (seed == 4),
        "first_k_dense_replace": seed % 2,
        "intermediate_size": pick(14, 20),
        "moe_intermediate_size": pick(8, 12),
        "partial_rotary_factor": 1.0 if seed == 5 else 0.5,
        "routed_scaling_factor": pick(1.0, 2.5),
        "rope_theta": pick(600000, 10000.0),
        "rms_norm_eps": pick(1e-5, 1e-6),
        "tie_word_embeddings": seed % 3 == 1,
        "vocab_size": 40 - 3 * (seed == 4),
        "use_qk_norm": seed != 2,
        "use_qkv_bias": seed == 5,
        "use_bias": False,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "torch_dtype": "float32",
    }


def drawn_weights(config: dict) -> dict[str, Tensor]:
    """Under the published names."""
    width, dim, experts = config["hidden_size"], config["head_dim"], config["num_experts"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (40, width), "model.norm.weight": (width,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (40, width)}
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        shapes |= {f"{at}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{at}attention.query_key_value.weight"] = ((heads + 2 * kv) * dim, width)
        shapes[f"{at}attention.dense.weight"] = (width, heads * dim)
        if config["use_qkv_bias"]:
            shapes[f"{at}attention.query_key_value.bias"] = ((heads + 2 * kv) * dim,)
        if config["use_qk_norm"]:
            shapes |= {f"{at}attention.{which}_layernorm.weight": (dim,) for which in ("query", "key")}
        mlps = {f"{at}mlp.": config["intermediate_size"]}
        if n >= config["first_k_dense_replace"]:
            shapes |= {f"{at}mlp.gate.weight": (experts, width), f"{at}mlp.gate.expert_bias": (experts,)}
            mlps = {f"{at}mlp.experts.{e}.": config["moe_intermediate_size"] for e in range(experts)}
            mlps[f"{at}mlp.shared_experts."] = config["moe_intermediate_size"] * config["num_shared_experts"]
        for place, inner in mlps.items():
            shapes |= {f"{place}{part}_proj.weight": (inner, width) for part in ("gate", "up")}
            shapes[f"{place}down_proj.weight"] = (width, inner)
    ones = {name for name in shapes if name.endswith("norm.weight")}
    return {name: torch.randn(shape) * 0.4 + (name in ones) for name, shape in shapes.items()}


def slow(config: dict, weights: dict[str, Tensor]) -> Slow:
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, kv, dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    head = w.get("lm_head.weight", w["model.word_embeddings.weight"])
    turning = int(dim * config["partial_rotary_factor"])
    sizes = (heads, kv, dim, turning, float(config["rope_theta"]), config["rms_norm_eps"])
    made = Slow(w["model.word_embeddings.weight"], w["model.norm.weight"], head, *sizes)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        norms = [w[f"{at}{norm}.weight"] for norm in ("input_layernorm", "post_attention_layernorm")]
        parts = [slice(a * dim, b * dim) for a, b in ((0, heads), (heads, heads + kv), (heads + kv, heads + 2 * kv))]
        three = [w[f"{at}attention.query_key_value.weight"][part] for part in parts]
        bias = w.get(f"{at}attention.query_key_value.bias")
        biases = [torch.zeros(len(rows)).double() for rows in three] if bias is None else [bias[part] for part in parts]
        own = [w.get(f"{at}attention.{which}_layernorm.weight") for which in ("query", "key")]
        out = w[f"{at}attention.dense.weight"]
        made.layers.append(Layer(*norms, *three, out, *own, lambda token, n=n: mlp(w, config, n, token), tuple(biases)))
    return made


def mlp(w: dict[str, Tensor], config: dict, layer: int, token: Tensor) -> Tensor:
    at = f"model.layers.{layer}.mlp."
    if layer < config["first_k_dense_replace"]:
        return swiglu(token, w, at)
    weights = routed(w[f"{at}gate.weight"] @ token, w[f"{at}gate.expert_bias"], config)
    chosen = sum(weight * swiglu(token, w, f"{at}experts.{e}.") for e, weight in weights.items())
    return chosen + swiglu(token, w, f"{at}shared_experts.")


def routed(logits: Tensor, bias: Tensor, config: dict, dropped: float = -torch.inf) -> dict[int, float]:
    """The formula, one expert at a time: which are chosen, and their weights."""
    score = [1 / (1 + float((-logit).exp())) for logit in logits]
    offered = [s + float(b) for s, b in zip(score, bias, strict=True)]
    size = len(score) // config["n_group"]
    group = {g: sum(sorted(offered[g * size : g * size + size])[-2:]) for g in range(config["n_group"])}
    kept = sorted(group, key=lambda g: -group[g])[: config["topk_group"]]
    offered = [offer if e // size in kept else dropped for e, offer in enumerate(offered)]
    chosen = sorted(range(len(score)), key=lambda e: -offered[e])[: config["num_experts_per_tok"]]
    total = sum(score[e] for e in chosen) + 1e-20 if len(chosen) > 1 else 1.0
    return {e: score[e] / total * config["routed_scaling_factor"] for e in chosen}


def trained(i: int, j: int, length: int, size: int) -> bool:
    """The rule of training, one pair of places at a time: noised before clean."""
    own, other = (i % length) // size, (j % length) // size
    if i < length:
        return own == other if j < length else other < own
    return j >= length and other <= own


@pytest.mark.parametrize("seed", rest_long(range(6), 2))
@torch.no_grad()
def test_any_size_equals_a_slow_decoder(seed: int, tmp_path: Path) -> None:
    config, block = drawn_config(seed), 3 + seed % 3
    weights = drawn_weights(config)
    told = {"mask_token_id": 38 - 3 * (seed == 4), "block_size": block}
    model = rp.load_model(write_checkpoint(tmp_path, weights, config), **told)
    assert (model.vocab_size, model.block_size, model.logit_shift) == (40, block, 0)
    ids = torch.randint(40, (1, TOKENS))
    made, listed = slow(config, weights), ids[0].tolist()
    blocked, scores = made.run(listed, lambda i, j: j // block <= i // block)
    assert worst_apart(model, ids, blocked, scores) < CLOSE
    assert worst_apart(model.in_blocks(None), ids, *made.run(listed, lambda i, j: True)) < CLOSE
    doubled, _ = made.run(listed * 2, lambda i, j: trained(i, j, TOKENS, block), [*range(TOKENS)] * 2)
    added = added_to_scores(training_mask(TOKENS, block), None, torch.float32)
    places = torch.tensor([[*range(TOKENS)] * 2])
    out = model.module(ids.repeat(1, 2), attention_mask=added, position_ids=places).logits
    assert apart(out[0], doubled) < CLOSE
    for fault in FAULTS:
        faulty = rp.load_model(tmp_path, **told)
        if fault(faulty.module):
            assert apart(faulty.logits(ids)[0], blocked) > 100 * CLOSE, fault.__name__


def routers(module: torch.nn.Module) -> list[LLaDA2Router]:
    return [part for part in module.modules() if isinstance(part, LLaDA2Router)]


def without_bias(module: torch.nn.Module) -> bool:
    for router in routers(module):
        router.e_score_correction_bias.zero_()
    return module.config.num_experts > 5


def every_group_kept(module: torch.nn.Module) -> bool:
    for router in routers(module):
        router.topk_group = router.num_group
    return module.config.topk_group < module.config.n_group


def not_scaled(module: torch.nn.Module) -> bool:
    for router in routers(module):
        router.routed_scaling_factor = 1.0
    return module.config.routed_scaling_factor != 1


def without_shared(module: torch.nn.Module) -> bool:
    for name, weight in module.named_parameters():
        if "shared_experts.down" in name:
            weight.zero_()
    return True


FAULTS = (without_bias, every_group_kept, not_scaled, without_shared)


# --- the router ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "share"), [(1, 0.0), (2, 0.02), (3, 0.25)])
@torch.no_grad()
def test_dropped_groups_are_never_chosen_though_a_bias_makes_the_kept_negative(top_k: int, share: float) -> None:
    """Counted as 0, as GLM-4-MoE's had it at first, they win over kept experts: a third of the tokens go elsewhere."""
    config = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": top_k, "routed_scaling_factor": 2.5}
    ours = LLaDA2Config(num_experts=8, hidden_size=16, **config)
    torch.manual_seed(0)
    router = LLaDA2Router(ours)
    router.weight.copy_(torch.randn(8, 16) * 0.3)
    router.e_score_correction_bias.fill_(-0.5)
    tokens = torch.randn(2, 300, 16)
    logits, weights, experts = router(tokens)
    elsewhere = 0
    for token, weight, expert in zip(tokens.flatten(0, 1), weights, experts, strict=True):
        exact = router.weight.double() @ token.double()
        wanted = routed(exact, router.e_score_correction_bias, config)
        assert wanted.keys() == set(expert.tolist())
        assert all(abs(wanted[e] - w) < 1e-5 for e, w in zip(expert.tolist(), weight.tolist(), strict=True))
        elsewhere += routed(exact, router.e_score_correction_bias, config, dropped=0.0).keys() != wanted.keys()
    assert logits.shape == (600, 8) and elsewhere >= share * 600


def test_every_router_of_a_loaded_model_is_the_families_own() -> None:
    model = rp.load_model(FIXTURES / NAME, **TOLD)
    assert len(routers(model.module)) == 2 and all(type(router) is LLaDA2Router for router in routers(model.module))
    state = model.module.state_dict()
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in state
    assert not any("bias" in name for name, _ in model.module.named_parameters()), "a buffer, without a gradient"


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 5])
@pytest.mark.parametrize("shard", ["5GB", "9KB"])
def test_saving_gives_back_the_published_names_and_tensors(seed: int, shard: str, tmp_path: Path) -> None:
    config = drawn_config(seed)
    published = drawn_weights(config)
    model = rp.load_model(write_checkpoint(tmp_path / "published", published, config), mask_token_id=38, block_size=5)
    model.module.save_pretrained(tmp_path / "again", max_shard_size=shard)
    files = sorted((tmp_path / "again").glob("model*.safetensors"))
    assert (len(files) > 1) == (shard == "9KB")
    again = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert again.keys() == published.keys() and all(torch.equal(again[name], published[name]) for name in published)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key for key, value in config.items() if written.get(key) != value} <= {"architectures", "torch_dtype"}
    twice = rp.load_model(tmp_path / "again")
    assert (twice.mask_token_id, twice.block_size) == (38, 5)


def test_tensors_and_rows_in_each_others_place_are_seen(tmp_path: Path) -> None:
    """The planted fault: queries and keys row by row, head by head; experts in another order."""
    config = json.loads((FIXTURES / NAME / "config.json").read_text())
    expected = load_file(FIXTURES / NAME / "reference.safetensors")
    fused, at = "model.layers.1.attention.query_key_value.weight", "model.layers.1.mlp.experts"

    def by_head(weights: dict[str, Tensor]) -> None:
        groups = weights[fused].reshape(8, 16, -1)
        weights[fused] = groups[[0, 1, 4, 6, 2, 3, 5, 7]].reshape(128, -1).contiguous()

    def experts_crossed(weights: dict[str, Tensor]) -> None:
        one, other = f"{at}.0.up_proj.weight", f"{at}.7.up_proj.weight"
        weights[one], weights[other] = weights[other], weights[one]

    for fault in (by_head, experts_crossed):
        weights = load_file(FIXTURES / NAME / "model.safetensors")
        fault(weights)
        model = rp.load_model(write_checkpoint(tmp_path, weights, config), **TOLD)
        with torch.no_grad():
            assert float((model.logits(expected["input_ids"]) - expected["block_logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
def test_gradients_of_experts_and_routers_equal_autograd(kernel: str) -> None:
    """In groups they are split by example; one after the other they are read one example at a time, and named."""
    model = rp.load_model(FIXTURES / NAME, experts_implementation=kernel, **TOLD)
    ids = torch.randint(240, (4, 9), generator=torch.Generator().manual_seed(1))

    def loss(which: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(model.logits(ids[which])[:, 4], ids[which, 0], reduction="none")

    unread: dict[str, str] = {}
    parameters = dict(model.module.named_parameters())
    assert worst_product_error(model.module, parameters, loss, 4, unread=unread) < 1e-5
    experts = {name for name in parameters if ".experts." in name}
    assert set(unread) == (experts if kernel == "eager" else set()) and len(experts) == 4


@pytest.mark.parametrize("blocks", [4, None])
@torch.no_grad()
def test_the_bridge_gives_the_models_own_logits_in_blocks_and_whole(blocks: int | None) -> None:
    model = rp.load_model(FIXTURES / NAME, **TOLD).in_blocks(blocks)
    ids = torch.randint(240, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    told = {"objective": "masked", "mask_token_id": 246, "logit_shift": 0, "block_size": blocks or "whole"}
    bridged = rp.ProbedModel(model.to_bridge(), **told)
    assert float((bridged.logits(ids, mask) - model.logits(ids, mask))[mask.bool()].abs().max()) < 1e-4


# --- whose files, and what is refused --------------------------------------------------------------------------------


def test_published_names_say_what_their_files_do_not() -> None:
    said = json.loads((FIXTURES / NAME / "config.json").read_text())
    for name in ("LLaDA2.0-mini", "LLaDA2.0-flash", "LLaDA2.0-mini-preview", "LLaDA2.1-mini"):
        files = Files(f"inclusionAI/{name}", said)
        config = LLADA2.config(files)
        assert family_of(files) is LLADA2 and (config.mask_token_id, config.block_size) == (156895, 32)
    assert family_of(Files("any", said | {"model_type": "llada21_moe"})) is LLADA2


def test_settings_that_are_not_there_are_the_published_codes_own() -> None:
    """GLM-4-MoE has others: no norms of queries and keys, a first dense layer, one group."""
    config = LLADA2.config(Files("any", {"model_type": "llada2_moe", "head_dim": None, "num_key_value_heads": 0}))
    assert (config.use_qk_norm, config.first_k_dense_replace, config.n_group, config.topk_group) == (True, 0, 8, 4)
    assert (config.head_dim, config.num_key_value_heads) == (config.hidden_size // 16, 16)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"norm_head": True}, "norm_head=True"),
        ({"norm_softmax": True}, "norm_softmax=True"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"score_function": "softmax"}, "score_function='softmax'"),
        ({"use_bias": True}, "use_bias=True"),
        ({"use_rmsnorm": False}, "use_rmsnorm=False"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"n_group": 8}, "8 experts in 8 groups"),
        ({"topk_group": 1}, "of which 1 are kept and 3 experts chosen"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(settings: dict, said: str, tmp_path: Path) -> None:
    set_in_config(copied(NAME, tmp_path / "any"), **settings)
    assert said in refusal(tmp_path / "any", **TOLD)


FUSED, BIAS = "model.layers.1.attention.query_key_value.weight", "model.layers.1.mlp.gate.expert_bias"
DAMAGES = {
    "a bias": (lambda w: w.pop(BIAS), f"missing {BIAS}"),
    "queries, keys and values": (lambda w: w.pop(FUSED), f"missing {FUSED}"),
    "a norm": (lambda w: w.pop("model.layers.0.attention.key_layernorm.weight"), "missing .*key_layernorm.weight"),
    "the table": (lambda w: w.pop("model.word_embeddings.weight"), "missing model.word_embeddings.weight"),
    "an expert's tensor": (
        lambda w: w.pop("model.layers.2.mlp.experts.0.down_proj.weight"),
        "2.mlp.experts.0.down_proj",
    ),
    "heads of another number": (
        lambda w: w.update({FUSED: torch.zeros(120, 64)}),
        rf"mismatched {FUSED} \(here .*q_proj.weight.*\) \(\(1, 120, 64\) for ",
    ),
    # GLM-4.5's class lets what is in layers 46 and 92 go by.
    "a layer too many": (
        lambda w: w.update({"model.layers.46.attention.dense.weight": torch.zeros(64, 64)}),
        "unexpected model.layers.46.attention.dense.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_left_over_or_misshapen_is_named(damage: str, tmp_path: Path) -> None:
    change, said = DAMAGES[damage]
    rewrite(copied(NAME, tmp_path / "any"), change)
    assert re.search(said, refusal(tmp_path / "any", **TOLD))
