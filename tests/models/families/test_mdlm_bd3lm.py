"""MDLM and BD3-LM: against outputs of the published code, and against a slow forward pass by hand at other sizes.

`tests/fixtures/{mdlm,bd3lm}-tiny` hold tiny checkpoints with logits and scores of that code (float32, CPU). The largest
difference seen is 5e-6; the tolerance is 2e-5. The mask token's own logit is raw there and -inf here.
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from checkpoint_files import copied, rewrite
from plain_gradients import worst_product_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import revprobe as rp
from revprobe.finetune.training.lora import target_modules
from revprobe.models.bases.radd import AdaptiveBlock, NoiseLevel
from revprobe.models.contract.block_masks import added_to_scores, training_mask
from revprobe.models.families.bd3lm import BD3LM, BD3LMConfig, BD3LMForMaskedDiffusion
from revprobe.models.families.mdlm import MDLM, MDLMConfig, MDLMForMaskedDiffusion
from tiny import FIXTURES, bridged, drawn, pairs_at

NAMES = ["mdlm-tiny", "bd3lm-tiny"]
MASK, CLOSE = 255, 2e-5
REFERENCE = {name: load_file(FIXTURES / name / "reference.safetensors") for name in NAMES}


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    """Copies to damage; their names do not say what they are."""

    return lambda name: copied(name, tmp_path / f"checkpoint-{name[0]}")


def settings(folder: Path, **changed: object) -> None:
    """Change keys of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changed
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs)[..., :MASK].abs().max())


@torch.no_grad()
def worst_logit_error(model: rp.ProbedModel, name: str) -> float:
    """Of the whole sequence, padded and all without."""
    expected, whole = REFERENCE[name], model.in_blocks(None)
    ids, padding = expected["input_ids"], expected["attention_mask"]
    valid = padding.bool()
    return max(
        apart(whole.logits(ids), expected["logits_nomask"]),
        apart(whole.logits(ids, padding)[valid], expected["logits"][valid]),
    )


# --- the reference's numbers ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_published_codes_and_the_mask_is_never_predicted(name: str) -> None:
    model = rp.load_model(FIXTURES / name)
    assert worst_logit_error(model, name) < CLOSE
    assert (model.logits(REFERENCE[name]["input_ids"])[..., MASK] == -math.inf).all()
    known = (model.objective, model.mask_token_id, model.logit_shift, model.max_length, model.block_size)
    assert known == ("masked", MASK, 0, *({"mdlm-tiny": (64, None), "bd3lm-tiny": (16, 4)}[name]))


@torch.no_grad()
def test_scores_of_the_training_pass_equal_the_published_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, raw: of the queries and keys that attention is given; what is masked is compared too."""
    module, expected = rp.load_model(FIXTURES / "bd3lm-tiny").module, REFERENCE["bd3lm-tiny"]
    scores: list[Tensor] = []
    attend = nn.functional.scaled_dot_product_attention

    def seen(query: Tensor, key: Tensor, *rest: Tensor, **options: object) -> Tensor:
        scores.append(query[0] @ key[0].mT / query.shape[-1] ** 0.5)
        return attend(query, key, *rest, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", seen)
    mask = added_to_scores(training_mask(16, 4), None, torch.float32)
    module(expected["train_input_ids"], attention_mask=mask, position_ids=expected["train_position_ids"])
    torch.testing.assert_close(torch.stack(scores), expected["train_scores_row0"], atol=CLOSE, rtol=0)


def swap_parts(weight: Tensor, *order: int) -> Tensor:
    """Equal blocks of rows, put in another order."""
    parts = weight.chunk(len(order))
    return torch.cat([parts[n] for n in order])


# Where -> the order in which a wrong loader or block would take the published rows.
WRONG_ORDERS = {
    "scale before shift": ("blocks.0.adaLN_modulation", (1, 0, 2, 4, 3, 5)),
    "gate before scale": ("blocks.0.adaLN_modulation", (0, 2, 1, 3, 5, 4)),
    "the MLP's first": ("blocks.0.adaLN_modulation", (3, 4, 5, 0, 1, 2)),
    "shift by shift": ("blocks.0.adaLN_modulation", (0, 3, 1, 4, 2, 5)),
    "scale before shift at the end": ("output_layer.adaLN_modulation", (1, 0)),
    "k before q": ("blocks.0.attn_qkv", (1, 0, 2)),
    "v before k": ("blocks.0.attn_qkv", (0, 2, 1)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", WRONG_ORDERS)
def test_rows_in_a_wrong_order_are_seen(fault: str, name: str, folder_of: Callable[[str], Path]) -> None:
    folder, (place, order) = folder_of(name), WRONG_ORDERS[fault]
    kinds = [f"backbone.{place}.{kind}" for kind in ("weight", "bias")]
    rewrite(folder, lambda weights: weights.update({k: swap_parts(weights[k], *order) for k in kinds if k in weights}))
    assert worst_logit_error(rp.load_model(folder), name) > 1e-2


def with_norm_bias(model: rp.ProbedModel, patch: pytest.MonkeyPatch) -> None:
    """As RADD's, whose biases start at one."""
    model.module.blocks[0].mlp_norm.bias = nn.Parameter(torch.ones(64))


def without_condition(model: rp.ProbedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NoiseLevel, "forward", lambda self, hidden: torch.zeros(len(hidden), 1, 32))


def with_sines_first(model: rp.ProbedModel, patch: pytest.MonkeyPatch) -> None:
    weight = model.module.sigma_map.first.weight
    weight.data = weight.data.roll(128, dims=1)


def without_the_last_silu(model: rp.ProbedModel, patch: pytest.MonkeyPatch) -> None:
    def forward(self: NoiseLevel, hidden: Tensor) -> Tensor:
        features = (torch.arange(256) < 128).float().expand(len(hidden), 1, -1)
        return self.second(nn.functional.silu(self.first(features)))

    patch.setattr(NoiseLevel, "forward", forward)


def with_ungated_mlp(model: rp.ProbedModel, patch: pytest.MonkeyPatch) -> None:
    modulation = model.module.blocks[1].adaLN_modulation
    modulation.weight.data[-64:], modulation.bias.data[-64:] = 0.0, 1.0


FAULTS = [with_norm_bias, without_condition, with_sines_first, without_the_last_silu, with_ungated_mlp]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_another_conditioning_or_norm_is_seen(plant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rp.load_model(FIXTURES / name)
    plant(model, monkeypatch)
    assert worst_logit_error(model, name) > 1e-2


# --- other sizes, by a slow forward pass ------------------------------------------------------------------------------


def published_checkpoint(folder: Path, family: str, seed: int, **stated: object) -> dict[str, Tensor]:
    """A checkpoint of random size as the published code writes it, away from every default."""
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    heads, head_dim, blocks, vocab = pick(1, 2, 3, 5), pick(4, 6, 16), pick(1, 2, 4), pick(41, 98)
    d, cond = heads * head_dim, pick(1, 7, 24, 128)
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocab, d), "output_layer.norm_final.weight": (d,)}
    shapes |= {"output_layer.linear.weight": (vocab, d), "output_layer.linear.bias": (vocab,)}
    adaptive = {"sigma_map.mlp.0": (cond, 256), "sigma_map.mlp.2": (cond, cond)}
    adaptive |= {"output_layer.adaLN_modulation": (2 * d, cond)}
    for n in range(blocks):
        shapes |= {f"blocks.{n}.attn_qkv.weight": (3 * d, d), f"blocks.{n}.attn_out.weight": (d, d)}
        shapes |= {f"blocks.{n}.mlp.0.weight": (4 * d, d), f"blocks.{n}.mlp.0.bias": (4 * d,)}
        shapes |= {f"blocks.{n}.mlp.2.weight": (d, 4 * d), f"blocks.{n}.mlp.2.bias": (d,)}
        shapes |= {f"blocks.{n}.norm{k}.weight": (d,) for k in (1, 2)}
        adaptive[f"blocks.{n}.adaLN_modulation"] = (6 * d, cond)
    if stated.get("adaln", True):
        for name, (rows, columns) in adaptive.items():
            shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    weights = {f"backbone.{name}": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    weights["backbone.rotary_emb.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    config: dict[str, object] = {"model_type": family, "architectures": [family.upper()], "vocab_size": vocab}
    config |= {"hidden_dim": d, "n_heads": heads, "n_blocks": blocks, "cond_dim": cond, "dropout": 0.1}
    config |= {"model_length": pick(12, 40), "time_conditioning": False, "return_dict": False, "torch_dtype": "float32"}
    if family == "bd3lm":
        weights |= {"sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.tensor(1.0)}
        config |= {"block_size": pick(1, 2, 3, 5, 64), "cross_attn": True, "adaln": True, "causal": False}
        config |= {"attn_backend": pick("flex", "sdpa"), "var_min": True}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | stated))
    save_file(weights, folder / "model.safetensors")
    return {name.removeprefix("backbone."): weight.double() for name, weight in weights.items()}


def silu(states: Tensor) -> Tensor:
    return states / (1 + (-states).exp())


def slow_condition(weights: dict[str, Tensor]) -> Tensor:
    """The noise level's embedding, at level 0."""
    frequencies = [math.exp(-math.log(10000) * k / 128) for k in range(128)]
    features = [math.cos(0 * f) for f in frequencies] + [math.sin(0 * f) for f in frequencies]
    inner = weights["sigma_map.mlp.0.weight"] @ torch.tensor(features, dtype=torch.float64)
    inner = silu(inner + weights["sigma_map.mlp.0.bias"])
    return silu(weights["sigma_map.mlp.2.weight"] @ inner + weights["sigma_map.mlp.2.bias"])


def slow_norm(states: Tensor, weight: Tensor) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def slow_attention(rows: Tensor, heads: int, sees: Tensor, places: list[int]) -> Tensor:
    """One head and one pair of positions at a time. Shapes: `(3 heads dim) seq, seq seq, seq -> seq (heads dim)`."""
    d, length = rows.shape[0] // 3, rows.shape[1]
    dim = d // heads
    mixed = torch.zeros(length, d, dtype=torch.float64)
    for h in range(heads):
        q, k, v = (rows[start + h * dim : start + (h + 1) * dim] for start in (0, d, 2 * d))  # dim length
        for i in range(length):
            seen = [j for j in range(length) if sees[i, j]]
            scores = []
            for j in seen:
                turns = [(places[i] - places[j]) * 10000 ** (-2 * p / dim) for p in range(dim // 2)]
                a, b = (torch.complex(x[: dim // 2, n], x[dim // 2 :, n]) for x, n in ((q, i), (k, j)))
                turned = a * b.conj() * torch.tensor([complex(math.cos(t), math.sin(t)) for t in turns])
                scores.append(turned.real.sum() / math.sqrt(dim))
            mixed[i, h * dim : (h + 1) * dim] = torch.stack(scores).softmax(0) @ v[:, seen].T
    return mixed


def slow_logits(weights: dict[str, Tensor], heads: int, ids: list[int], sees: Tensor, places: list[int]) -> Tensor:
    """The description of the public model, in float64."""
    states = weights["vocab_embed.embedding"][ids]
    d = states.shape[1]
    plain = [torch.zeros(d), torch.zeros(d), torch.ones(d)] * 2  # shift, scale, gate of a norm that is not adaptive
    condition = slow_condition(weights) if "sigma_map.mlp.0.weight" in weights else None

    def parts(name: str, count: int) -> list[Tensor]:
        if condition is None:
            return plain[:count]
        return list((weights[f"{name}.weight"] @ condition + weights[f"{name}.bias"]).split(d))

    for n in range(sum(name.endswith("attn_qkv.weight") for name in weights)):
        own = {name.removeprefix(f"blocks.{n}."): w for name, w in weights.items() if name.startswith(f"blocks.{n}.")}
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts(f"blocks.{n}.adaLN_modulation", 6)
        normed = slow_norm(states, own["norm1.weight"]) * (1 + scale) + shift
        mixed = slow_attention(own["attn_qkv.weight"] @ normed.T, heads, sees, places)
        states = states + gate * (mixed @ own["attn_out.weight"].T)
        normed = slow_norm(states, own["norm2.weight"]) * (1 + mlp_scale) + mlp_shift
        inside = normed @ own["mlp.0.weight"].T + own["mlp.0.bias"]
        inside = 0.5 * inside * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inside + 0.044715 * inside**3)))
        states = states + mlp_gate * (inside @ own["mlp.2.weight"].T + own["mlp.2.bias"])
    shift, scale = parts("output_layer.adaLN_modulation", 2)
    last = slow_norm(states, weights["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return last @ weights["output_layer.linear.weight"].T + weights["output_layer.linear.bias"]


CLOSE_64 = 2e-6  # float64 but for the angles, which are float32 in the model as in the published code


@torch.no_grad()
@pytest.mark.parametrize("family", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("seed", range(6))
def test_other_sizes_equal_a_forward_pass_written_out(seed: int, family: str, tmp_path: Path) -> None:
    """Read as the model is (BD3-LM in its blocks), padded, and whole."""
    weights = published_checkpoint(tmp_path / "sized", family, seed)
    model = rp.load_model(tmp_path / "sized", dtype="float64")
    config = json.loads((tmp_path / "sized" / "config.json").read_text())
    mask, size, heads = config["vocab_size"] - 1, config.get("block_size"), config["n_heads"]
    assert (model.mask_token_id, model.max_length, model.block_size) == (mask, config["model_length"], size)
    ids = torch.randint(0, mask, (7,)).index_fill(0, torch.tensor([2, 6]), mask)
    everyone = torch.ones(7, 7, dtype=torch.bool)
    sees = everyone if size is None else torch.tensor([[j // size <= i // size for j in range(7)] for i in range(7)])
    for read, rule in ((model, sees), (model.in_blocks(None), everyone)):
        expected = slow_logits(weights, heads, ids.tolist(), rule, list(range(7)))
        ours = read.logits(ids[None])[0]
        torch.testing.assert_close(ours[:, :mask], expected[:, :mask], atol=CLOSE_64, rtol=1e-6)
        assert (ours[:, mask] == -math.inf).all()
    short = slow_logits(weights, heads, ids[:5].tolist(), sees[:5, :5], list(range(5)))
    padding = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    padded = model.logits(torch.stack([ids.flip(0), ids]), padding)[1, :5]
    torch.testing.assert_close(padded[:, :mask], short[:, :mask], atol=CLOSE_64, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(10, 15))
def test_training_passes_of_other_sizes_equal_a_forward_pass_written_out(seed: int, tmp_path: Path) -> None:
    """Noised beside clean, lengths that blocks do not divide; norms are adaptive in some, in others not."""
    weights = published_checkpoint(tmp_path / "sized", "bd3lm", seed, adaln=seed % 2 == 0)
    model = rp.load_model(tmp_path / "sized", dtype="float64")
    config = json.loads((tmp_path / "sized" / "config.json").read_text())
    assert hasattr(model.module, "sigma_map") == isinstance(model.module.blocks[0], AdaptiveBlock) == (seed % 2 == 0)
    mask, size, n = config["vocab_size"] - 1, config["block_size"], 5
    ids = torch.randint(0, mask, (2 * n,)).index_fill(0, torch.tensor([1, 4]), mask)
    block, noised = [i % n // size for i in range(2 * n)], [i < n for i in range(2 * n)]

    def rule(i: int, j: int) -> bool:
        if noised[j]:
            return noised[i] and block[i] == block[j]
        return block[j] < block[i] or (not noised[i] and block[i] == block[j])

    sees = torch.tensor([[rule(i, j) for j in range(2 * n)] for i in range(2 * n)])
    places = [*range(n), *range(n)]
    expected = slow_logits(weights, config["n_heads"], ids.tolist(), sees, places)[:, :mask]
    given = {"attention_mask": sees[None, None], "position_ids": torch.tensor([places])}
    ours = model.module(ids[None], **given).logits[0, :, :mask]
    torch.testing.assert_close(ours, expected, atol=CLOSE_64, rtol=1e-6)


# --- what the config says ---------------------------------------------------------------------------------------------


def test_the_size_of_a_block_is_the_configs_or_asked_for(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("bd3lm-tiny")
    assert rp.load_model(folder, block_size=2).block_size == 2
    assert rp.load_model(folder, bidirectional=True).block_size is None
    settings(folder, block_size=None)
    with pytest.raises(rp.RevprobeError, match=r"its config does not say how long a block is; pass block_size="):
        rp.load_model(folder)
    assert rp.load_model(folder, block_size=8).block_size == 8
    settings(folder, cross_attn=False)
    assert rp.load_model(folder).reads == "bidirectional", "the mode in which the public code makes no mask"


def test_keys_for_the_public_code_alone_change_nothing(folder_of: Callable[[str], Path]) -> None:
    """flex attention is the same function as sdpa; `return_dict` would make tuples of outputs."""
    folder = folder_of("bd3lm-tiny")
    settings(folder, attn_backend="flex", return_dict=False)
    model = rp.load_model(folder)
    assert worst_logit_error(model, "bd3lm-tiny") < CLOSE
    assert model.module.config._attn_implementation == "sdpa" and not hasattr(model.module.config, "attn_backend")


def refused(name: str, words: str, change: Callable[[Path], object]) -> object:
    return pytest.param(name, words, change, id=words.split(":")[0][:40])


REFUSED = [
    refused("mdlm-tiny", r"mdlm config: time_conditioning=True is not", lambda f: settings(f, time_conditioning=True)),
    refused("bd3lm-tiny", r"bd3lm config: time_conditioning=True is", lambda f: settings(f, time_conditioning=True)),
    refused("bd3lm-tiny", r"bd3lm config: causal=True is not supported", lambda f: settings(f, causal=True)),
    refused("mdlm-tiny", r"config\.json of 'checkpoint-m' lacks n_heads", lambda f: settings(f, n_heads=None)),
    refused("mdlm-tiny", r"hidden_dim 64 is not divisible by n_heads 5", lambda f: settings(f, n_heads=5)),
    refused("mdlm-tiny", r"inv_freq \(8,\) holds other angles than base", lambda f: settings(f, n_heads=2)),
    refused("mdlm-tiny", r"mismatched backbone\..*adaLN_modulation\.weight", lambda f: settings(f, cond_dim=16)),
    refused("bd3lm-tiny", r"block_size 0: expected a whole number", lambda f: settings(f, block_size=0)),
    refused(
        "mdlm-tiny",
        r"inv_freq \(8,\) holds other angles than base 10000",
        lambda f: rewrite(f, lambda w: w["backbone.rotary_emb.inv_freq"].mul_(1.001)),
    ),
    refused(
        "bd3lm-tiny",
        r"sampling_eps_min or sampling_eps_max is 2\.0: expected one share",
        lambda f: rewrite(f, lambda w: w["sampling_eps_max"].fill_(2.0)),
    ),
    refused(
        "mdlm-tiny",
        r"missing backbone\.output_layer\.adaLN_modulation\.bias \(here final_adaLN_modulation\.bias",
        lambda f: rewrite(f, lambda w: w.pop("backbone.output_layer.adaLN_modulation.bias")),
    ),
    refused(
        "bd3lm-tiny",
        r"missing backbone\.sigma_map\.mlp\.2\.weight \(here sigma_map\.second\.weight",
        lambda f: rewrite(f, lambda w: w.pop("backbone.sigma_map.mlp.2.weight")),
    ),
    refused(
        "mdlm-tiny",
        r"unexpected backbone\.blocks\.0\.norm1\.bias",
        lambda f: rewrite(f, lambda w: w.update({"backbone.blocks.0.norm1.bias": torch.ones(64)})),
    ),
    refused(
        "mdlm-tiny",
        r"unexpected sampling_eps_max, sampling_eps_min",
        lambda f: shutil.copy(FIXTURES / "bd3lm-tiny" / "model.safetensors", f),
    ),
    refused(
        "bd3lm-tiny",
        r"missing .*unexpected .*embed_tokens|missing .*unexpected",
        lambda f: shutil.copy(FIXTURES / "radd-tiny" / "model.safetensors", f),
    ),
]


@pytest.mark.parametrize(("name", "words", "change"), REFUSED)
def test_what_the_model_is_not_is_refused_in_one_line(name, words, change, folder_of) -> None:
    folder = folder_of(name)
    change(folder)
    with pytest.raises(rp.RevprobeError, match=words) as caught:
        rp.load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"), [("mdlm-tiny", MDLMForMaskedDiffusion), ("bd3lm-tiny", BD3LMForMaskedDiffusion)]
)
def test_the_class_alone_does_not_fill_published_names_at_random(name: str, kind: type) -> None:
    with pytest.raises(rp.RevprobeError, match=r"does not match its config: missing .*; unexpected backbone\."):
        kind.from_pretrained(FIXTURES / name)


@pytest.mark.parametrize(("name", "family"), [("mdlm-tiny", MDLM), ("bd3lm-tiny", BD3LM)])
def test_every_tensor_has_its_published_name(name: str, family) -> None:
    ours = rp.load_model(FIXTURES / name).module.state_dict()
    published = {one for one in load_file(FIXTURES / name / "model.safetensors") if one not in family.constants}
    assert {family.official_name(one) for one in ours} == published
    assert family.official_name("blocks.11.attention.k_proj.weight") == "backbone.blocks.11.attn_qkv.weight"


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_has_the_published_keys_and_our_names(name: str, tmp_path: Path) -> None:
    module, ids = rp.load_model(FIXTURES / name).module, REFERENCE[name]["input_ids"]
    module.save_pretrained(tmp_path)
    published, saved = (json.loads((place / "config.json").read_text()) for place in (FIXTURES / name, tmp_path))
    for key in ("model_type", "hidden_dim", "n_blocks", "n_heads", "cond_dim", "model_length", "dropout"):
        assert saved[key] == published[key], key
    assert "auto_map" not in saved, "the published code does not read our names"
    assert set(load_file(tmp_path / "model.safetensors")) == set(module.state_dict())
    assert torch.equal(type(module).from_pretrained(tmp_path)(ids).logits, module(ids).logits)


@pytest.mark.parametrize("config", [MDLMConfig, BD3LMConfig])
def test_the_defaults_have_the_published_size(config: type) -> None:
    """170 million, as the cards of mdlm-owt and its descendants say."""
    kind = {MDLMConfig: MDLMForMaskedDiffusion, BD3LMConfig: BD3LMForMaskedDiffusion}[config]
    with torch.device("meta"):
        module = kind(config())
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == 169.6


def test_a_new_model_starts_as_the_published_code_does() -> None:
    """Modulations and unembedding zero, norms one, all else as torch leaves it: each block is the identity."""
    torch.manual_seed(0)
    module = MDLMForMaskedDiffusion(MDLMConfig(vocab_size=40, hidden_dim=24, n_blocks=2, n_heads=3, cond_dim=9))
    for name, parameter in module.named_parameters():
        if "adaLN" in name or name.startswith("lm_head"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all() and name.endswith("weight"), name
        else:
            fan_in = {"sigma_map.first": 256, "sigma_map.second": 9}.get(name.rpartition(".")[0], 24)
            width = (96 if "down_proj" in name else fan_in) ** -0.5
            assert 0.8 * width < parameter.abs().max() <= width, name
    assert module(torch.tensor([[1, 39, 2]])).loss is None


# --- the probes -------------------------------------------------------------------------------------------------------

# Inside one block of four, so that BD3-LM sees its evidence.
PAIRS = pairs_at((6, 5), (5, 6), count=9, length=8, vocab=240, ragged=True)


@pytest.mark.parametrize("name", NAMES)
def test_all_readings_can_be_taken_and_are_the_same_through_the_bridge(name: str) -> None:
    model = rp.load_model(FIXTURES / name)
    readings, theirs = rp.probe(model, PAIRS), rp.probe(bridged(model), PAIRS)
    for ours, other in zip(readings, theirs, strict=True):
        assert (other.value, other.n) == pytest.approx((ours.value, ours.n), abs=1e-4), ours.name
        assert ours.n == 9 and not ours.undefined
    storage = rp.probe_stored_evidence(model, PAIRS)  # its parts are held against the logit
    assert math.isfinite(storage.value) and storage.meta["worst_gap"] < 1e-5
    frame = readings[1].frame
    assert set(frame["role"]) == {"embed", "q", "k", "v", "o", "mlp", "norm", "unembed", "other"}
    conditions = frame[frame["role"] == "other"].drop_duplicates("parameter").set_index("parameter")["layer"]
    assert conditions.loc[[c for c in conditions.index if c.startswith("blocks")]].tolist() == [0, 0, 1, 1]
    assert conditions.loc[[c for c in conditions.index if not c.startswith("blocks")]].isna().all()
    assert "one_by_one" not in readings[1].meta


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["whole", "padded", "blocks", "training"])
def test_gradient_products_equal_autograd_for_every_parameter(name: str, how: str) -> None:
    """The condition's too, whose gradient is each example's own; nothing is read one example at a time."""
    module = rp.load_model(FIXTURES / name, dtype="float64").module
    ids, padding = REFERENCE[name]["input_ids"], REFERENCE[name]["attention_mask"]
    rows, targets = torch.tensor([3, 7, 5]), torch.tensor([4, 9, 200])
    given: dict[str, Tensor] = {"padded": {"attention_mask": padding}}.get(how, {})
    if how == "blocks":
        sees = torch.tensor([[j // 4 <= i // 4 for j in range(12)] for i in range(12)])
        given = {"attention_mask": added_to_scores(sees, padding, torch.float64)}
    if how == "training":
        ids = torch.cat([ids[:, :6], ids[:, 6:]], dim=1)
        given = {"attention_mask": training_mask(6, 3)[None, None].expand(3, -1, -1, -1)}
        given["position_ids"] = torch.arange(6).repeat(2).expand(3, -1)
        rows = torch.tensor([3, 1, 5])

    def loss(part: slice) -> Tensor:
        logits = module(ids[part], **{key: value[part] for key, value in given.items()}).logits
        read = logits[torch.arange(len(logits)), rows[part]]
        return nn.functional.cross_entropy(read, targets[part], reduction="none")

    parameters, unread = dict(module.named_parameters()), {}
    assert worst_product_error(module, parameters, loss, 3, one_by_one=False, unread=unread) < 1e-10
    assert not unread
    grads = dict(zip(parameters, torch.autograd.grad(loss(slice(None)).sum(), list(parameters.values())), strict=True))
    conditions = [key for key in parameters if "sigma_map" in key or "adaLN" in key]
    assert len(conditions) == 10 and all(grads[key].norm() > 1e-3 for key in conditions), "each is reached"


def test_a_condition_without_the_batch_would_not_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the test above: computed once, its gradient comes summed over the batch."""
    module = rp.load_model(FIXTURES / "mdlm-tiny", dtype="float64").module
    whole = NoiseLevel.forward
    monkeypatch.setattr(NoiseLevel, "forward", lambda self, hidden: whole(self, hidden[:1]))
    ids = REFERENCE["mdlm-tiny"]["input_ids"]

    def loss(part: slice) -> Tensor:
        logits = module(ids[part]).logits[:, 3]
        return nn.functional.cross_entropy(logits, torch.tensor([4, 9, 200])[part], reduction="none")

    with pytest.raises(rp.RevprobeError):
        worst_product_error(module, dict(module.named_parameters()), loss, 3, one_by_one=False)


def test_adapters_can_be_put_on_modulations_and_projections() -> None:
    """LoRA by the modules' names; gradient products of its matrices equal autograd."""
    base = rp.load_model(FIXTURES / "mdlm-tiny").module
    config = peft.LoraConfig(r=2, target_modules=["adaLN_modulation", "q_proj", "first"])
    module = drawn(lambda: peft.get_peft_model(base, config), dtype=torch.float64)
    adapted = {name: p for name, p in module.named_parameters() if "lora" in name}
    assert len(adapted) == 2 * (2 + 2 + 1), "two blocks, and the conditioning's first layer"
    ids = REFERENCE["mdlm-tiny"]["input_ids"]

    def loss(part: slice) -> Tensor:
        logits = module(input_ids=ids[part]).logits[:, 3]
        return nn.functional.cross_entropy(logits, torch.tensor([4, 9, 200])[part], reduction="none")

    assert worst_product_error(module, adapted, loss, 3) < 1e-10


def test_adapters_of_all_projections_leave_the_norms_alone() -> None:
    """A modulation is a linear layer of a block, but no projection of its attention or MLP; named, it is adapted."""
    model = rp.load_model(FIXTURES / "bd3lm-tiny")
    assert target_modules(model) == ["down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert target_modules(model, "mlp") == ["down_proj", "up_proj"]
    assert target_modules(model, ["adaLN_modulation"]) == ["adaLN_modulation"]


# --- TransformerLens --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_bridge_has_the_published_codes_numbers_and_adds_up(name: str) -> None:
    """What attention and MLP are said to add is what the residual stream gains: behind the gates."""
    model, expected = rp.load_model(FIXTURES / name), REFERENCE[name]
    bridge, ids = model.to_bridge(), expected["input_ids"]
    logits, cache = bridge.run_with_cache(ids)
    assert apart(logits, expected["logits_nomask"]) < 1e-4
    scores = torch.stack([cache[f"blocks.{layer}.attn.hook_attn_scores"][0] for layer in range(2)])
    torch.testing.assert_close(scores, expected["scores_row0"], atol=1e-4, rtol=0)
    for layer in range(2):
        at = {key: cache[f"blocks.{layer}.hook_{key}"] for key in ("resid_pre", "attn_out", "resid_mid", "mlp_out")}
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"])
        torch.testing.assert_close(at["resid_mid"] + at["mlp_out"], cache[f"blocks.{layer}.hook_resid_post"])
    if model.block_size:
        sees = torch.tensor([[j // 4 <= i // 4 for j in range(12)] for i in range(12)])
        masked = bridge(ids, attention_mask=added_to_scores(sees, None, torch.float32))
        assert apart(masked, expected["block_logits"]) < 1e-4


@torch.no_grad()
def test_a_bridge_says_that_it_reads_the_whole_where_its_model_reads_in_blocks() -> None:
    model, ids = rp.load_model(FIXTURES / "bd3lm-tiny"), REFERENCE["bd3lm-tiny"]["input_ids"]
    with pytest.warns(UserWarning, match=r"in blocks of 4.*ProbedModel\(bridge, objective='masked', block_size=4\)"):
        bridge = model.to_bridge()
    told = {"objective": "masked", "mask_token_id": model.mask_token_id, "logit_shift": 0}
    as_told = rp.ProbedModel(bridge, **told, block_size=4)
    assert apart(as_told.logits(ids), REFERENCE["bd3lm-tiny"]["block_logits"]) < 1e-4
    assert rp.ProbedModel(bridge, **told).block_size == 4, "known of the model inside"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.in_blocks(None).to_bridge()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:AdaptiveEncoderAdapter does not support")
def test_processed_weights_leave_the_answers_as_they_are() -> None:
    """TransformerLens folds norms and centres what is written; through a gate or a shift neither leaves the model."""
    bridge, expected = rp.load_model(FIXTURES / "mdlm-tiny").to_bridge(), REFERENCE["mdlm-tiny"]
    bridge.enable_compatibility_mode()
    ours = bridge(expected["input_ids"])[..., :MASK].log_softmax(-1)
    torch.testing.assert_close(ours, expected["logits_nomask"][..., :MASK].log_softmax(-1), atol=1e-4, rtol=0)
