"""RADD's published layout: against the reference's stored outputs, and against a slow forward pass by hand.

`tests/fixtures/radd-tiny` holds a tiny checkpoint with logits and scores of the published code (float32, CPU). The
differences seen here are 3e-6; the tolerance is 2e-5.
"""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from checkpoint_files import copied, in_cache, rewrite
from plain_gradients import worst_product_error
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import revprobe as rp
from revprobe.models.families.radd import RADD
from revprobe.models.published import PUBLISHED, published_config, published_dtype
from tiny import FIXTURES, bridged, pairs_at, tapped

TINY = FIXTURES / "radd-tiny"
MASK, CLOSE = 255, 2e-5
REFERENCE = load_file(TINY / "reference.safetensors")
IDS, PADDING = REFERENCE["input_ids"], REFERENCE["attention_mask"]
PAIRS = pairs_at((2, 5), (5, 2), count=9, length=8, vocab=240, ragged=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to damage; its name does not say what it is."""
    return copied("radd-tiny", tmp_path / "checkpoint")


@torch.no_grad()
def worst_logit_error(module) -> float:
    """Over valid positions with padding and all without; the mask's own logit is excluded here and raw there."""
    padded = (module(IDS, attention_mask=PADDING).logits - REFERENCE["logits"])[PADDING.bool()][:, :MASK]
    whole = (module(IDS).logits - REFERENCE["logits_nomask"])[..., :MASK]
    return float(torch.cat([padded.flatten(), whole.flatten()]).abs().max())


# --- the reference's numbers ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_log_probabilities_equal_the_published_codes() -> None:
    model = rp.load_model(TINY)
    assert worst_logit_error(model.module) < CLOSE
    logits = model.module(IDS).logits
    assert (logits[..., MASK] == -math.inf).all(), "read, never predicted"
    ours = logits.log_softmax(-1)[..., :MASK]
    torch.testing.assert_close(ours, REFERENCE["log_probs_nomask"][..., :MASK], atol=CLOSE, rtol=0)
    known = (model.objective, model.mask_token_id, model.logit_shift, model.max_length, model.dtype)
    assert known == ("masked", MASK, 0, 64, torch.float32)


@torch.no_grad()
def test_scores_equal_the_published_codes_in_every_layer_and_head() -> None:
    everywhere = torch.arange(IDS.shape[1])[None]
    model = rp.load_model(TINY)
    with tapped(model, everywhere, everywhere, IDS.shape[1]) as tap:
        model.module(IDS[:1])
    seen = torch.stack([call.score[0] for _, call in sorted(tap.layers().items())])
    torch.testing.assert_close(seen, REFERENCE["scores_row0"], atol=CLOSE, rtol=0)


@torch.no_grad()
def test_the_bridge_gives_the_published_codes_logits_and_scores() -> None:
    bridge = rp.load_model(TINY).to_bridge()
    wanted = lambda hook: hook.endswith("hook_attn_scores")  # noqa: E731
    logits, cache = bridge.run_with_cache(IDS[:1], names_filter=wanted)
    torch.testing.assert_close(logits[..., :MASK], REFERENCE["logits_nomask"][:1, :, :MASK], atol=1e-4, rtol=0)
    scores = torch.stack([cache[f"blocks.{layer}.attn.hook_attn_scores"][0] for layer in range(2)])
    torch.testing.assert_close(scores, REFERENCE["scores_row0"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("fault", ["q and k", "heads", "norm bias", "head bias"])
def test_what_a_wrong_key_map_would_do_is_seen(fault: str, folder: Path) -> None:
    """Planted: rows of q in place of k's, rows taken per head, the LayerNorm's bias left at zero, no head bias."""

    def change(weights: dict[str, Tensor]) -> None:
        qkv = weights["blocks.0.attn_qkv.weight"]
        if fault == "q and k":
            weights["blocks.0.attn_qkv.weight"] = torch.cat([qkv[64:128], qkv[:64], qkv[128:]])
        elif fault == "heads":
            weights["blocks.0.attn_qkv.weight"] = qkv.unflatten(0, (3, 4, 16)).transpose(0, 1).flatten(0, 2)
        else:
            name = "output_layer.linear.bias" if fault == "head bias" else "blocks.0.norm1.bias"
            weights[name] = torch.zeros_like(weights[name])

    rewrite(folder, change)
    assert worst_logit_error(rp.load_model(folder).module) > 1e-2


# --- other sizes, by a slow forward pass ----------------------------------------------------------------------------


def published_checkpoint(folder: Path, seed: int) -> dict[str, Tensor]:
    """A checkpoint of random size as the published code writes it, away from every default."""
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    heads, head_dim, blocks, tokens = pick(1, 2, 3, 5), pick(2, 6, 16), pick(1, 2, 4), pick(40, 97)
    d = heads * head_dim
    shapes = {"vocab_embed.embedding": (tokens + 1, d)}
    for n in range(blocks):
        shapes |= {f"blocks.{n}.attn_qkv.weight": (3 * d, d), f"blocks.{n}.attn_out.weight": (d, d)}
        shapes |= {f"blocks.{n}.mlp.0.weight": (4 * d, d), f"blocks.{n}.mlp.0.bias": (4 * d,)}
        shapes |= {f"blocks.{n}.mlp.2.weight": (d, 4 * d), f"blocks.{n}.mlp.2.bias": (d,)}
        shapes |= {f"blocks.{n}.norm{k}.{kind}": (d,) for k in (1, 2) for kind in ("weight", "bias")}
    shapes |= {f"output_layer.norm_final.{kind}": (d,) for kind in ("weight", "bias")}
    shapes |= {"output_layer.linear.weight": (tokens + 1, d), "output_layer.linear.bias": (tokens + 1,)}
    weights = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    weights["rotary_emb.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    sizes = {"hidden_size": d, "n_heads": heads, "n_blocks": blocks, "dropout": 0.1, "use_checkpoint": False}
    config = {"tokens": tokens, "ngpus": 1, "model": sizes | {"dtype": "float16"} | pick({}, {"length": 32})}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return {name: weight.double() for name, weight in weights.items()}


def norm(states: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def slow_logits(weights: dict[str, Tensor], heads: int, ids: list[int]) -> Tensor:
    """The description of the public model, one head and one pair of positions at a time, in float64."""
    states = weights["vocab_embed.embedding"][ids]
    d, length = states.shape[1], len(ids)
    dim, blocks = d // heads, sum(name.endswith("attn_qkv.weight") for name in weights)
    for n in range(blocks):
        rows = weights[f"blocks.{n}.attn_qkv.weight"] @ norm(states, weights, f"blocks.{n}.norm1").T
        mixed = torch.zeros(length, d, dtype=torch.float64)
        for h in range(heads):
            q, k, v = (rows[start + h * dim : start + (h + 1) * dim] for start in (0, d, 2 * d))  # dim length
            scores = torch.zeros(length, length, dtype=torch.float64)
            for i in range(length):
                for j in range(length):
                    for plane in range(dim // 2):
                        turn = (i - j) * 10000 ** (-2 * plane / dim)
                        a = torch.complex(q[plane, i], q[plane + dim // 2, i])
                        b = torch.complex(k[plane, j], k[plane + dim // 2, j])
                        turned = a * b.conj() * complex(math.cos(turn), math.sin(turn))
                        scores[i, j] += turned.real / math.sqrt(dim)
            mixed[:, h * dim : (h + 1) * dim] = scores.softmax(-1) @ v.T
        states = states + mixed @ weights[f"blocks.{n}.attn_out.weight"].T
        inside = norm(states, weights, f"blocks.{n}.norm2") @ weights[f"blocks.{n}.mlp.0.weight"].T
        inside = inside + weights[f"blocks.{n}.mlp.0.bias"]
        inside = 0.5 * inside * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inside + 0.044715 * inside**3)))
        states = states + inside @ weights[f"blocks.{n}.mlp.2.weight"].T + weights[f"blocks.{n}.mlp.2.bias"]
    last = norm(states, weights, "output_layer.norm_final")
    return last @ weights["output_layer.linear.weight"].T + weights["output_layer.linear.bias"]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_other_sizes_equal_a_forward_pass_written_out(seed: int, tmp_path: Path) -> None:
    weights = published_checkpoint(tmp_path / "sized", seed)
    model = rp.load_model(tmp_path / "sized", dtype="float64")
    tokens, config = model.vocab_size - 1, json.loads((tmp_path / "sized" / "config.json").read_text())
    assert model.mask_token_id == tokens and model.max_length == config["model"].get("length", 1024)
    ids = [*torch.randint(0, tokens, (5,)).tolist(), tokens]
    expected = slow_logits(weights, model.module.config.n_heads, ids)
    # Float64 but for the angles, which are float32 in the model as in the published code: 7e-7 at most was seen.
    ours = model.logits(torch.tensor([ids]))[0, :, :tokens]
    torch.testing.assert_close(ours, expected[:, :tokens], atol=2e-6, rtol=0)


# --- the probes -----------------------------------------------------------------------------------------------------


def test_all_readings_can_be_taken_and_are_the_same_through_the_bridge() -> None:
    model = rp.load_model(TINY)
    readings, theirs = rp.probe(model, PAIRS), rp.probe(bridged(model), PAIRS)
    for ours, other in zip(readings, theirs, strict=True):
        assert (other.value, other.n) == pytest.approx((ours.value, ours.n), abs=1e-4), ours.name
    storage = rp.probe_stored_evidence(model, PAIRS)  # its parts are held against the logit, the head's bias among them
    assert math.isfinite(storage.value) and storage.meta["worst_gap"] < 1e-5
    roles = set(readings[1].frame["role"])
    assert roles == {"embed", "q", "k", "v", "o", "mlp", "norm", "unembed"}
    assert "all three probes can be trusted" in repr(rp.diagnose(model))


def test_gradient_products_equal_autograd() -> None:
    model = rp.load_model(TINY, dtype="float64").module
    rows, targets = torch.tensor([3, 7, 5]), torch.tensor([4, 9, 200])

    def loss(part: slice) -> Tensor:
        logits = model(IDS[part], attention_mask=PADDING[part]).logits
        return torch.nn.functional.cross_entropy(
            logits[torch.arange(len(logits)), rows[part]], targets[part], reduction="none"
        )

    assert worst_product_error(model, dict(model.named_parameters()), loss, 3) < 1e-10


# --- by name, in shards, saved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("JingyangOu/")])
def test_it_loads_by_name_from_the_cache(name: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = rp.load_model(name, cache_dir=in_cache(folder, name, tmp_path / "cache"))
    assert model.name == name and worst_logit_error(model.module) < CLOSE


@pytest.mark.filterwarnings("ignore:the tokenizer of")
@pytest.mark.parametrize("layout", ["published", "ours"])
def test_a_revision_brings_its_own_config(layout: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The main revision has other sizes: its config with this revision's weights would be another model, or none."""
    monkeypatch.chdir(tmp_path)
    if layout == "ours":
        shutil.rmtree(folder)
        rp.load_model(TINY).module.save_pretrained(folder)
    cache = in_cache(folder, "somebody/model", tmp_path / "cache", "first", "1" * 40)
    larger = rp.RaddForMaskedLM(rp.RaddConfig(d_model=32))
    larger.save_pretrained(tmp_path / "larger")
    in_cache(tmp_path / "larger", "somebody/model", cache)
    model = rp.load_model("somebody/model", cache_dir=cache, revision="first")
    assert worst_logit_error(model.module) < CLOSE
    assert rp.load_model("somebody/model", cache_dir=cache).module.config.d_model == 32


def test_a_name_that_cannot_be_downloaded_is_one_line(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Only config.json got into the cache: the weights are missing, not random."""
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    cache = in_cache(folder, "JingyangOu/radd-t-dce", tmp_path / "cache")
    with pytest.raises(rp.RevprobeError, match=r"holds no model\.safetensors|cannot download") as caught:
        rp.load_model("JingyangOu/radd-t-dce", cache_dir=cache)
    assert "\n" not in str(caught.value)


def test_shards_load_as_one_file_does(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    placed = {name: file for file, part in halves.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert worst_logit_error(rp.load_model(folder).module) < CLOSE
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed | {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(rp.RevprobeError, match=r"lies outside its folder"):
        rp.load_model(folder)


def test_saving_and_loading_gives_the_same_model_as_our_own_radd(tmp_path: Path) -> None:
    model = rp.load_model(TINY)
    model.module.save_pretrained(tmp_path)
    again = rp.load_model(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "radd"
    assert all(torch.equal(p, again.module.get_parameter(name)) for name, p in model.module.named_parameters())
    assert (again.mask_token_id, again.module.config.dropout_sites) == (MASK, ("attention", "mlp"))


def test_every_tensor_has_its_published_name() -> None:
    ours = rp.load_model(TINY).module.state_dict()
    published = set(load_file(TINY / "model.safetensors")) - {"rotary_emb.inv_freq"}
    assert {RADD.official_name(name) for name in ours} == published
    assert RADD.official_name("blocks.11.attention.k_proj.weight") == "blocks.11.attn_qkv.weight"
    assert RADD.official_name("elsewhere.weight") == "elsewhere.weight"


@pytest.mark.parametrize(
    ("name", "millions"), [("radd-lambda-dce", 162), ("radd-t-dce", 162), ("radd-lambda-dce-medium", 405)]
)
def test_published_shapes_have_the_published_sizes(name: str, millions: int) -> None:
    config = published_config(f"JingyangOu/{name}")
    assert config is not None and published_dtype(config) == "float32"
    with torch.device("meta"):
        module = rp.RaddForMaskedLM(config)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6) == millions
    assert (config.mask_token_id, config.vocab_size, config.max_length) == (50257, 50258, 1024)


# --- what is refused --------------------------------------------------------------------------------------------------


def settings(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def missing(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop("blocks.1.attn_qkv.weight"))


def left_over(folder: Path) -> None:
    """As in SEDD, whose config.json looks the same and whose blocks are modulated by the noise."""
    rewrite(folder, lambda weights: weights.update({"sigma_map.mlp.0.weight": torch.ones(3, 3)}))


def other_rows(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"output_layer.linear.bias": torch.ones(250)}))


def uneven(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"blocks.0.attn_qkv.weight": torch.ones(190, 64)}))


def other_angles(folder: Path) -> None:
    rewrite(folder, lambda weights: weights["rotary_emb.inv_freq"].mul_(1.001))


def other_width(folder: Path) -> None:
    settings(folder, lambda config: config["model"].update(hidden_size=128))


def no_heads(folder: Path) -> None:
    settings(folder, lambda config: config["model"].update(n_heads=5))


def truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGE = {
    missing: r"does not match its config: missing blocks\.1\.attn_qkv\.weight \(here blocks\.1\.attention\.k_proj",
    left_over: r"does not match its config: unexpected sigma_map\.mlp\.0\.weight; it is a checkpoint of another model",
    other_rows: r"mismatched output_layer\.linear\.bias|cannot load the weights",
    uneven: r"missing blocks\.0\.attn_qkv\.weight.*unexpected blocks\.0\.attn_qkv\.weight",
    other_angles: r"rotary_emb\.inv_freq \(8,\) holds other angles than base 10000 at a head dimension of 16",
    other_width: r"rotary_emb\.inv_freq \(8,\) holds other angles than base 10000 at a head dimension of 32",
    no_heads: r"d_model 64 is not divisible by n_heads 5",
    truncated: r"cannot load the weights of \S+model\.safetensors: .*; the file is cut off or no safetensors",
    pickled: r"holds only pickled weights \(pytorch_model\.bin\), which can run code when read",
    without_config: r"is no model folder: it has no config\.json",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_gets_one_line(damage, folder: Path) -> None:
    damage(folder)
    with pytest.raises(rp.RevprobeError, match=DAMAGE[damage]) as caught:
        rp.load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_config_that_only_looks_like_it_is_left_to_transformers(folder: Path) -> None:
    settings(folder, lambda config: config.pop("tokens"))
    with pytest.raises(rp.RevprobeError, match="cannot read the config of 'checkpoint'"):
        rp.load_model(folder)


def test_our_own_classes_do_not_take_it_for_a_model_of_the_default_sizes() -> None:
    """No key of theirs is in it: all sizes would be the defaults, and all weights drawn."""
    with pytest.raises(rp.RevprobeError, match=r"config\.json of RADD's published code; load_model"):
        rp.RaddForMaskedLM.from_pretrained(TINY)
    ours, read = rp.load_model(TINY).module.config.to_dict(), rp.RaddConfig.from_pretrained(TINY).to_dict()
    assert {key for key in ours if read[key] != ours[key]} <= {"_name_or_path", "dtype"}


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def byte_tokenizer(more: int = 0) -> PreTrainedTokenizerFast:
    """One token a byte, as many as the model has beside its mask and one less; `more` of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 254 if not more else 256]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(f"<{n}>" for n in range(more))])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


WORDING = {"forward": "{target}'s child is {evidence}", "reverse": "{evidence}'s parent is {target}"}
FACTS = pd.DataFrame({"target": ["Ann", "Cid"], "evidence": ["Bob", "Dan"]})


@pytest.mark.parametrize("give", ["folder", "text", "object"])
def test_a_tokenizer_from_elsewhere_makes_pairs_of_text(give: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    given = {"folder": tmp_path, "text": str(tmp_path), "object": byte_tokenizer()}[give]
    model = rp.load_model(TINY, tokenizer=given)
    assert model.mask_token_id == MASK, "the model's own: this tokenizer has none"
    pairs = rp.pairs_from_frame(FACTS, **WORDING, model=model)
    expected = [tuple(byte_tokenizer()(name).input_ids) for name in ("Ann", "Cid")]
    assert [query.target for query in pairs.queries] == expected * 2


def test_without_one_the_error_names_where_it_is() -> None:
    model = rp.load_model(TINY)
    words = r"radd-tiny has no tokenizer, so text cannot become tokens; pass load_model\(\.\.\., "
    with pytest.raises(rp.RevprobeError, match=words + r"tokenizer='openai-community/gpt2'\)"):
        rp.pairs_from_frame(FACTS, **WORDING, model=model)
    with pytest.raises(rp.RevprobeError, match=r"pass load_model\(\.\.\., tokenizer=FOLDER_OR_NAME\) or ProbedModel"):
        rp.pairs_from_frame(FACTS, **WORDING, model=rp.ProbedModel(model.module, objective="masked"))


def test_another_models_tokenizer_and_none_at_all_are_refused(tmp_path: Path) -> None:
    byte_tokenizer(more=1).save_pretrained(tmp_path / "larger")
    words = r"the tokenizer has 257 tokens and the embedding of 'radd-tiny' 256 rows"
    with pytest.raises(rp.RevprobeError, match=words):
        rp.load_model(TINY, tokenizer=tmp_path / "larger")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        rp.RevprobeError, match=r"tokenizer='.*empty' cannot be read: .*; expected a folder or hub name"
    ):
        rp.load_model(TINY, tokenizer=tmp_path / "empty")


def test_a_tokenizer_beside_the_weights_is_its_own(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)
    assert rp.load_model(folder).tokenizer("Ann").input_ids == byte_tokenizer()("Ann").input_ids
