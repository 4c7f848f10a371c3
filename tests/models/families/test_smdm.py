"""SMDM: one bare file, its sizes from shapes, its queries fused by group, its angles rounded, its mask without a logit.

`tests/fixtures/smdm-tiny/mdm-tiny.safetensors` holds a tiny one with outputs of the reference code beside it.
"""

import json
import math
import shutil
from pathlib import Path

import checkpoint_files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import revprobe as rp
from revprobe.finetune.analysis.price import sampled_sequences
from revprobe.finetune.analysis.reverse_gradients import Candidates
from revprobe.finetune.config.finetuning import LoraOptions
from revprobe.finetune.training.lora import add_lora
from revprobe.finetune.training.objectives import masked_diffusion_loss
from revprobe.models.bases.lit_llama import LitLlamaForCausalLM, LitLlamaForMaskedDiffusion
from revprobe.models.families import smdm
from revprobe.models.families.files import Files
from revprobe.models.rotary import layer_positions
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.masked import Prompt
from revprobe.probes.passes.batches import make_batch
from revprobe.probes.passes.likelihood import readout
from revprobe.probes.theory.storage_gradient import storage_gradient_cosines
from tiny import FIXTURES, bridged, pairs_at

TINY, MASK = FIXTURES / "smdm-tiny" / "mdm-tiny.safetensors", 256
REFERENCE = load_file(FIXTURES / "smdm-tiny" / "reference.safetensors")
IDS, PADDING = REFERENCE["input_ids"], REFERENCE["attention_mask"]
PAIRS = pairs_at((2, 5), (5, 2), count=9, length=8, vocab=240, ragged=True)


# --- the slow model ---------------------------------------------------------------------------------------------------


def rms(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turns(length: int, dim: int, rounded: bool) -> Tensor:
    """Complex numbers that turn plane k at a position; the table of the reference, float32 or rounded to bfloat16."""
    theta = 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(length), theta)
    cos, sin = (table.bfloat16() if rounded else table for table in (angles.cos(), angles.sin()))
    return torch.complex(cos.double(), sin.double())


def slow_logits(
    weights: dict[str, Tensor], heads: int, ids: list[int], *, rounded: bool = True, causal: bool = False, eps=1e-5
) -> Tensor:
    """One head and one row at a time, each group's rows taken off the fused weight in turn."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    states = w["transformer.wte.weight"][ids]
    length, width = states.shape
    dim = width // heads
    table = turns(length, dim, rounded)
    for n in range(sum(name.endswith("norm_1.weight") for name in w)):
        at = f"transformer.h.{n}"
        normed = rms(states, w[f"{at}.norm_1.weight"], eps)
        rows = iter((w[f"{at}.attn.attn.weight"] @ normed.T).split(dim))  # dim length, one after the other
        groups = (len(w[f"{at}.attn.attn.weight"]) // dim - heads) // 2
        mixed = []
        for _ in range(groups):
            queries = [next(rows) for _ in range(heads // groups)]
            key, value = next(rows), next(rows)
            for query in queries:
                q, k = (torch.complex(x[: dim // 2].T, x[dim // 2 :].T) * table for x in (query, key))
                scores = (q @ k.conj().T).real / math.sqrt(dim)
                if causal:
                    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
                mixed.append(scores.softmax(-1) @ value.T)
        states = states + torch.cat(mixed, 1) @ w[f"{at}.attn.proj.weight"].T
        normed = rms(states, w[f"{at}.norm_2.weight"], eps)
        gate, up = (normed @ w[f"{at}.mlp.swiglu.w{k}.weight"].T for k in (1, 2))
        states = states + (gate * gate.sigmoid() * up) @ w[f"{at}.mlp.swiglu.w3.weight"].T
    return rms(states, w["transformer.ln_f.weight"], eps) @ w["lm_head.weight"].T


def drawn(
    *, heads: int, groups: int, dim: int, layers: int, mlp: int, vocab: int, mask_row: bool = True, scale: float = 0.4
) -> dict[str, Tensor]:
    width = heads * dim
    shapes = {"lm_head.weight": (vocab, width), "transformer.wte.weight": (vocab + mask_row, width)}
    shapes["transformer.ln_f.weight"] = (width,)
    for n in range(layers):
        at = f"transformer.h.{n}"
        shapes[f"{at}.attn.attn.weight"] = (heads + 2 * groups) * dim, width
        shapes[f"{at}.attn.proj.weight"] = width, width
        shapes |= {f"{at}.norm_{k}.weight": (width,) for k in (1, 2)}
        shapes |= {f"{at}.mlp.swiglu.w{k}.weight": (mlp, width) for k in (1, 2)}
        shapes[f"{at}.mlp.swiglu.w3.weight"] = (width, mlp)
    return {name: torch.randn(shape) * scale for name, shape in shapes.items()}


def some_sizes(seed: int) -> dict[str, int]:
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    groups, per = pick(1, 2, 3), pick(1, 2, 3)
    sizes = {"heads": groups * per, "groups": groups, "dim": pick(2, 6, 8, 16), "layers": pick(1, 2, 3)}
    return sizes | {"mlp": pick(20, 33, 64), "vocab": pick(40, 128, 131)}


@torch.no_grad()
@pytest.mark.parametrize("rotary", [None, "exact"])
@pytest.mark.parametrize("seed", range(8))
def test_other_sizes_equal_a_forward_pass_written_out(seed: int, rotary: str | None, tmp_path: Path) -> None:
    sizes = some_sizes(seed)
    weights, vocab, heads = drawn(**sizes), sizes["vocab"], sizes["heads"]
    save_file(weights, tmp_path / "any-name.safetensors")
    told = {"n_heads": heads, "dtype": "float64"} | ({} if rotary is None else {"rotary": rotary})
    model = rp.load_model(tmp_path / "any-name.safetensors", **told)
    assert (model.objective, model.mask_token_id, model.logit_shift) == ("masked", vocab, 0)
    assert model.module.config.num_key_value_heads == sizes["groups"]
    ids = [*torch.randint(0, vocab, (6,)).tolist(), vocab]
    expected = slow_logits(weights, heads, ids, rounded=rotary is None)
    found = model.logits(torch.tensor([ids]))[0]
    assert found.shape == (7, vocab), "no logit for the mask"
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # transformers' angles differ by their last bit
    padded, mask = torch.tensor([ids, [*ids[:4], 0, 0, 0]]), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    alone = slow_logits(weights, heads, ids[:4], rounded=rotary is None)
    torch.testing.assert_close(model.logits(padded, mask)[1, :4], alone, atol=1e-6, rtol=0)
    model.module.save_pretrained(tmp_path / "saved")
    again = rp.load_model(tmp_path / "saved")
    assert again.module.config.rotary == (rotary or "bfloat16") and again.mask_token_id == vocab
    torch.testing.assert_close(again.logits(torch.tensor([ids]))[0], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_exact_table_is_an_option_and_both_are_the_references() -> None:
    rounded, exact = rp.load_model(TINY, n_heads=4), rp.load_model(TINY, n_heads=4, rotary="exact")
    for model, suffix in ((rounded, ""), (exact, "_fp32rope")):
        apart = (model.logits(IDS) - REFERENCE[f"logits_nomask{suffix}"]).abs().max()
        padded = (model.logits(IDS, PADDING) - REFERENCE[f"logits{suffix}"])[PADDING.bool()].abs().max()
        assert max(float(apart), float(padded)) < 2e-5
    assert (rounded.logits(IDS) - exact.logits(IDS)).abs().max() > 5e-3
    assert "expected" in refusal(rotary="float8") or "closest" in refusal(rotary="float8")


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_table_is_rounded_once_whatever_the_model_computes_in(dtype: str) -> None:
    """By way of float16 some entries would be rounded twice."""
    rotary = rp.load_model(TINY, n_heads=4, dtype=dtype).module.model.rotary_emb
    places = torch.arange(2048)[None]
    cos, sin = rotary(torch.empty(0, dtype=getattr(torch, dtype)), places)
    assert cos.dtype == getattr(torch, dtype)
    expected = turns(2048, 16, rounded=True)
    for table, part in ((cos, expected.real), (sin, expected.imag)):
        # What float16 cannot hold of bfloat16 are numbers below 6e-5.
        torch.testing.assert_close(table[0, :, :8].double(), part, atol=1e-7, rtol=0)


def test_what_a_wrong_reading_of_the_fused_rows_would_do_is_seen(tmp_path: Path) -> None:
    """Planted: all queries, then all keys, then all values; and two key groups read as one."""
    torch.manual_seed(0)
    weights = drawn(heads=6, groups=2, dim=8, layers=2, mlp=32, vocab=128)
    ids = [5, 9, 128, 30, 7]
    expected = slow_logits(weights, 6, ids)
    for n in range(2):
        rows = weights[f"transformer.h.{n}.attn.attn.weight"].unflatten(0, (2, 5, 8))
        parts = [rows[:, :3], rows[:, 3:4], rows[:, 4:]]
        weights[f"transformer.h.{n}.attn.attn.weight"] = torch.cat([part.flatten(0, 2) for part in parts])
    save_file(weights, tmp_path / "smdm.safetensors")
    found = rp.load_model(tmp_path, n_heads=6).logits(torch.tensor([ids]))[0]
    assert (found.detach() - expected).abs().max() > 1e-1


# --- sizes ------------------------------------------------------------------------------------------------------------


def shapes_of(layers: int, width: int, mlp: int, *, vocab: int = 32000, more: int = 1, rows: int = 0) -> Files:
    """Files as they would be, without a tensor of them."""
    shapes = {"transformer.wte.weight": (vocab + more, width), "lm_head.weight": (vocab, width)}
    for n in range(layers):
        shapes[f"transformer.h.{n}.attn.attn.weight"] = (rows or 3 * width, width)
        shapes[f"transformer.h.{n}.mlp.swiglu.w1.weight"] = (mlp, width)
    files = Files("nowhere")
    files.__dict__["_headers"] = (shapes, {})
    return files


PUBLISHED = """6: 6,4,256,1024; 19: 8,6,384,1536; 34: 8,8,512,2048; 48: 9,9,576,2304; 66: 10,10,640,2560;
85: 13,10,640,2560; 75: 16,8,640,1600; 113: 12,12,768,3072; 142: 15,12,768,3072; 170: 18,12,768,3072;
180: 14,14,896,3584;
206: 16,14,896,3584; 231: 18,14,896,3584; 268: 16,16,1024,4096; 302: 18,16,1024,4096; 336: 20,16,1024,4096;
472: 18,10,1280,5120; 551: 21,10,1280,5120; 571: 18,11,1408,5632; 629: 24,10,1280,5120; 666: 21,11,1408,5632;
717: 19,12,1536,6144; 761: 24,11,1408,5632; 831: 22,12,1536,6144; 944: 25,12,1536,6144; 1028: 20,14,1792,7168;
1233: 24,14,1792,7168; 1476: 22,16,2048,8192; 1678: 25,16,2048,8192; 2121: 28,17,2176,8704"""


@pytest.mark.parametrize("size", [one.strip() for one in PUBLISHED.split(";")])
def test_the_heads_of_every_published_size_follow_from_its_shapes(size: str) -> None:
    """Of masked models and of their twins; `size` is layers, heads, width and MLP of Diff_LLaMA_<n>M."""
    layers, heads, width, mlp = map(int, size.partition(":")[2].split(","))
    masked, twin = shapes_of(layers, width, mlp), shapes_of(layers, width, mlp, more=0)
    for files, family in ((masked, smdm.SMDM[0]), (twin, smdm.SMDM[1])):
        assert [one.name for one in smdm.SMDM if one.recognises(files)] == [family.name]
        config = family.config(files)
        found = config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.intermediate_size
        assert found == (layers, heads, width, mlp) and config.num_key_value_heads == heads
        assert (config.max_position_embeddings, config.rms_norm_eps, config.vocab_size) == (2048, 1e-5, 32000)
        assert getattr(config, "mask_token_id", None) == (32000 if family is smdm.SMDM[0] else None)


def test_a_published_size_loads_without_options_and_says_its_number_of_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = drawn(heads=4, groups=4, dim=64, layers=6, mlp=1024, vocab=40, scale=0.05)
    save_file(weights, tmp_path / "mdm-6M.safetensors")
    model = rp.load_model(tmp_path / "mdm-6M.safetensors")
    assert model.module.config.num_attention_heads == 4 and model.max_length == 2048 and model.name == "mdm-6M"
    with pytest.warns(UserWarning, match=r"published models of \(layers, width, MLP\) \(6, 256, 1024\) have 4"):
        assert rp.load_model(tmp_path, n_heads=8).module.config.num_attention_heads == 8
    assert sum(p.numel() for p in model.module.parameters()) == sum(one.numel() for one in weights.values())
    ids = [5, 9, 40, 30]
    expected = slow_logits(weights, 4, ids)
    torch.testing.assert_close(model.logits(torch.tensor([ids]))[0].detach().double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("where", ["metadata", "config.json beside", "config.json in the folder"])
def test_heads_that_stand_somewhere_are_not_asked_for(where: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = drawn(heads=6, groups=2, dim=8, layers=2, mlp=32, vocab=128)
    said = {"n_head": 6, "n_query_groups": 2, "norm_eps": 0.01, "block_size": 64}
    path = tmp_path / "smdm.safetensors"
    save_file(weights, path, {key: str(one) for key, one in said.items()} if where == "metadata" else None)
    if where != "metadata":
        (tmp_path / "config.json").write_text(json.dumps(said))
    model = rp.load_model(tmp_path if where == "config.json in the folder" else path)
    assert model.max_length == 64
    ids = [5, 9, 128, 30]
    expected = slow_logits(weights, 6, ids, eps=0.01)
    torch.testing.assert_close(model.logits(torch.tensor([ids]))[0].double(), expected, atol=1e-4, rtol=0)


def test_a_folder_with_notes_beside_the_weights_is_that_file(tmp_path: Path) -> None:
    """The reference outputs hold no tensor that is called a weight."""
    assert rp.load_model(TINY.parent, n_heads=4).name == "smdm-tiny"
    for name in ("mdm-one", "mdm-two"):
        shutil.copy(TINY, tmp_path / f"{name}.safetensors")
        if name == "mdm-one":
            assert rp.load_model(tmp_path, n_heads=4).mask_token_id == MASK
    with pytest.raises(rp.RevprobeError, match=r"holds 2 checkpoints: mdm-one\.safetensors, mdm-two\.saf"):
        rp.load_model(tmp_path, n_heads=4)
    assert rp.load_model(tmp_path / "mdm-two.safetensors", n_heads=4).mask_token_id == MASK


# --- the autoregressive twin ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_a_twin_has_no_mask_row_and_is_causal(seed: int, tmp_path: Path) -> None:
    sizes = some_sizes(seed + 100)
    weights, heads, vocab = drawn(**sizes, mask_row=False), sizes["heads"], sizes["vocab"]
    save_file(weights, tmp_path / "ar.safetensors")
    model = rp.load_model(tmp_path / "ar.safetensors", n_heads=heads, dtype="float64")
    assert type(model.module) is LitLlamaForCausalLM
    assert (model.objective, model.logit_shift, model.vocab_size) == ("causal", 1, vocab)
    ids = torch.randint(0, vocab, (7,)).tolist()
    expected = slow_logits(weights, heads, ids, causal=True)
    torch.testing.assert_close(model.logits(torch.tensor([ids]))[0], expected, atol=1e-6, rtol=0)
    model.module.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        rp.load_model(tmp_path / "saved").logits(torch.tensor([ids]))[0], expected, atol=1e-6, rtol=0
    )
    for told, said in (
        ({"bidirectional": True}, "is a causal model"),
        ({"objective": "masked"}, "leave objective out"),
        ({"mask_token_id": 3}, "is a causal model"),
    ):
        assert said in refusal(tmp_path / "ar.safetensors", n_heads=heads, **told)


def test_a_twin_is_probed_and_bridged(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_file(drawn(heads=4, groups=2, dim=8, layers=2, mlp=32, vocab=64, mask_row=False), tmp_path / "ar.safetensors")
    model = rp.load_model(tmp_path, n_heads=4)
    pairs = pairs_at((2, 7), (4, 7), count=9, length=8, vocab=50)
    ours = rp.probe(model, pairs)
    theirs = rp.probe(bridged(model), pairs)
    for one, other in zip(ours, theirs, strict=True):
        assert np.isfinite(one.value) and other.value == pytest.approx(one.value, abs=1e-4)
    assert "all three probes can be trusted" in repr(rp.diagnose(model))


def test_a_file_that_the_hubs_client_downloaded_is_a_link_to_one_without_a_suffix(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--nieshen--SMDM" / "snapshots" / ("0" * 40) / "mdm_safetensors"
    snapshot.mkdir(parents=True)
    shutil.copy(TINY, tmp_path / "models--nieshen--SMDM" / "0123abc")
    (snapshot / "mdm-6M.safetensors").symlink_to("../../../0123abc")
    model = rp.load_model(snapshot / "mdm-6M.safetensors", n_heads=4)
    assert (model.name, model.objective) == ("mdm-6M", "masked")
    assert rp.load_model(snapshot, n_heads=4).objective == "masked"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def refusal(place: Path = TINY, **told) -> str:
    return checkpoint_files.refusal(place, **{"n_heads": 4} | told)


def test_heads_that_stand_nowhere_or_do_not_fit_are_asked_for() -> None:
    assert "pass n_heads= (its shapes fit 1, 2, 4, 8, 16, 32)" in refusal(n_heads=None)
    assert "do not fit so many heads; pass n_heads= (1, 2, 4, 8, 16, 32 fit)" in refusal(n_heads=3)
    assert "n_heads='four': expected a whole number" in refusal(n_heads="four")
    assert "n_heads=True: expected a whole number" in refusal(n_heads=True)


def test_stated_groups_that_are_not_the_rows_are_refused(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "smdm.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4, "n_query_groups": 2}))
    assert "n_query_groups 2 is stated" in refusal(tmp_path, n_heads=None)
    assert "n_heads=8: the files say n_head 4" in refusal(tmp_path, n_heads=8)


def test_no_other_token_hides(tmp_path: Path) -> None:
    assert "its mask token is 256" in refusal(mask_token_id=7)
    rp.load_model(TINY, n_heads=4).module.save_pretrained(tmp_path)
    with pytest.raises(rp.RevprobeError, match="n_heads=2: the config of"):
        rp.load_model(tmp_path, n_heads=2)
    assert rp.load_model(tmp_path, n_heads=4, rotary="exact").module.config.rotary == "exact"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_token_id": 3}))
    with pytest.raises(rp.RevprobeError, match="mask_token_id 3: SMDM's mask token is the row behind"):
        rp.load_model(tmp_path)


BLOCK = "transformer.h.1"
DAMAGES = {
    "norm": (lambda w: w.pop(f"{BLOCK}.norm_2.weight"), f"missing {BLOCK}.norm_2.weight (here model.layers.1.post_"),
    "fused": (lambda w: w.pop(f"{BLOCK}.attn.attn.weight"), f"missing {BLOCK}.attn.attn.weight (here "),
    "fused rows": (
        lambda w: w.update({f"{BLOCK}.attn.attn.weight": w[f"{BLOCK}.attn.attn.weight"][:100]}),
        f"unexpected {BLOCK}.attn.attn.weight",
    ),
    "shape": (
        lambda w: w.update({f"{BLOCK}.attn.proj.weight": w[f"{BLOCK}.attn.proj.weight"][:20]}),
        f"mismatched {BLOCK}.attn.proj.weight (here model.layers.1.self_attn.o_proj.weight) ((20, 64) for (64, 64))",
    ),
    "left over": (
        lambda w: w.update({f"{BLOCK}.attn.proj.bias": torch.zeros(64)}),
        f"unexpected {BLOCK}.attn.proj.bias",
    ),
    "head": (lambda w: w.pop("lm_head.weight"), "lm_head.weight is missing"),
    "embedding": (lambda w: w.pop("transformer.wte.weight"), "transformer.wte.weight is missing"),
    "rows": (lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:200]}), "has 257 rows and lm_head.weight 200"),
    "vector": (lambda w: w.update({"lm_head.weight": torch.zeros(256)}), "lm_head.weight has the shape (256,)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_as_the_file_has_it(damage: str, tmp_path: Path) -> None:
    weights, (change, said) = load_file(TINY), DAMAGES[damage]
    change(weights)
    save_file({name: one.contiguous() for name, one in weights.items()}, tmp_path / "smdm.safetensors")
    assert said in refusal(tmp_path / "smdm.safetensors")


def test_files_that_are_no_model_are_one_line(tmp_path: Path) -> None:
    whole = TINY.read_bytes()
    for size in (3, 5000):
        (tmp_path / "smdm.safetensors").write_bytes(whole[:size])
        assert "the file is cut off or no safetensors" in refusal(tmp_path / "smdm.safetensors")
        assert "the file is cut off or no safetensors" in refusal(tmp_path)
    assert "is a file; expected the folder" in refusal(TINY.with_name("reference.safetensors"))
    (tmp_path / "smdm.safetensors").unlink()
    torch.save(load_file(TINY), tmp_path / "mdm.pth")
    assert "holds only pickled weights (mdm.pth)" in refusal(tmp_path)


# --- what is done with it: the logits are one narrower than the embedding ---------------------------------------------


@pytest.fixture
def model() -> rp.ProbedModel:
    return rp.load_model(TINY, n_heads=4)


def test_the_mask_is_read_and_never_a_target(model: rp.ProbedModel) -> None:
    assert (model.vocab_size, model.mask_token_id) == (257, 256)
    assert model.hide(torch.tensor([[1, 2]]), torch.tensor([[False, True]])).tolist() == [[1, 256]]
    query = rp.Query([3, 256, 9, 5], [1], [3])
    pairs = rp.ReversalPairs.from_pairs([rp.ReversalPair(query, query)])
    with pytest.raises(rp.RevprobeError, match="a target is the mask token 256 itself"):
        rp.probe_reverse_probability(model, pairs)


def test_readings_equal_a_plain_softmax_over_the_logits_there_are(model: rp.ProbedModel) -> None:
    frame = rp.probe_reverse_probability(model, PAIRS, control=False).frame
    weights = load_file(TINY)
    for row in frame.itertuples():
        query = getattr(PAIRS[row.pair], row.direction)
        (place,) = query.target_positions
        shown = [256 if k == place else token for k, token in enumerate(query.token_ids)]
        own = slow_logits(weights, 4, shown)[place].softmax(0)
        assert row.probability == pytest.approx(float(own[query.token_ids[place]]), rel=1e-4)
        assert row.rank == int((own >= own[query.token_ids[place]]).sum())


def test_probes_storage_theory_and_bridge(model: rp.ProbedModel, tmp_path: Path) -> None:
    readings = rp.probe(model, PAIRS)
    for ours, other in zip(readings, rp.probe(bridged(model), PAIRS), strict=True):
        assert (other.value, other.n) == pytest.approx((ours.value, ours.n), abs=1e-4), ours.name
    storage = rp.probe_stored_evidence(model, PAIRS)
    assert math.isfinite(storage.value) and storage.meta["worst_gap"] < 1e-5
    assert np.isfinite(rp.token_contributions(model, PAIRS[0])["contribution"]).all()
    assert {positions.kind for positions in layer_positions(model).values()} == {"rope"}, "a rounded table turns too"
    torch.manual_seed(5)
    save_file(drawn(heads=2, groups=2, dim=8, layers=1, mlp=32, vocab=256), tmp_path / "one-layer.safetensors")
    cosines = storage_gradient_cosines(rp.load_model(tmp_path, n_heads=2), PAIRS)
    assert np.isfinite(cosines["cosine"]).all()
    assert "all three probes can be trusted" in repr(rp.diagnose(model))


def test_it_writes_every_token_but_the_mask(model: rp.ProbedModel) -> None:
    for written in decode_tokens(model, [Prompt((5, 9), (7,)), Prompt((1,), ())], [4, 6]):
        assert all(0 <= token < MASK for token in written)
    known = torch.randint(250, (3, 5), generator=torch.Generator().manual_seed(0))
    sampled = sampled_sequences(model, known, 4, torch.Generator().manual_seed(1))
    assert sampled.shape == (4, 5) and int(sampled.max()) < MASK
    assert torch.equal(model.without_mask(torch.zeros(2, 256)), torch.zeros(2, 256))


def test_a_loss_among_candidates_has_their_probabilities_alone(model: rp.ProbedModel) -> None:
    queries = [pair.reverse for pair in PAIRS][:4]
    batch = make_batch(model, queries)
    found = Candidates(model, queries).only(readout(model, batch), batch).detach()
    targets = sorted({query.target[0] for query in queries})
    expected = readout(model, batch).detach()[:, 0, targets].log_softmax(-1)
    torch.testing.assert_close(found[:, 0, targets], expected)


def test_it_is_fine_tuned_by_lora(model: rp.ProbedModel, tmp_path: Path) -> None:
    adapted = add_lora(model, LoraOptions(rank=2))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7, "two factors for each of seven projections in two layers"
    optimizer, ids, losses = torch.optim.AdamW(trained, lr=1e-2), torch.randint(200, (4, 8)), []
    for _ in range(10):
        generator = torch.Generator().manual_seed(0)
        loss = masked_diffusion_loss(adapted, ids, generator=generator, mask_token_id=MASK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = rp.load_model(tmp_path / "adapter", n_heads=4)
    assert again.mask_token_id == MASK
    torch.testing.assert_close(again.logits(ids), adapted.eval()(ids).logits, atol=1e-6, rtol=0)


def test_labels_are_priced_over_the_logits_there_are(model: rp.ProbedModel) -> None:
    labels = IDS[:1].clone()
    labels[labels == MASK] = -100
    out = model.module(IDS[:1], labels=labels)
    kept = labels[0] >= 0
    expected = torch.nn.functional.cross_entropy(out.logits[0, kept], labels[0, kept])
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_a_new_model_of_the_class_starts_small() -> None:
    config = rp.load_model(TINY, n_heads=4).module.config
    torch.manual_seed(0)
    embed = LitLlamaForMaskedDiffusion(config).model.embed_tokens.weight
    assert embed.shape == (257, 64) and float(embed.std()) == pytest.approx(0.02, rel=0.1)
