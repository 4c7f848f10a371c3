"""DiffuGPT: its own layout and GPT-2's, at any size, against GPT-2 without its mask written out in float64."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_files import copied, in_cache, in_shards, rewrite, set_in_config
from checkpoint_files import refusal as any_refusal
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import revprobe as rp
from revprobe.finetune.config.finetuning import LoraOptions
from revprobe.finetune.training.lora import add_lora
from revprobe.finetune.training.objectives import masked_diffusion_loss
from revprobe.models.families.diffugpt import DIFFUGPT
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.masked import Prompt
from tiny import FIXTURES, bridged, pairs_at

TINY, MASK = FIXTURES / "diffugpt-tiny", 105
REFERENCE = load_file(TINY / "reference.safetensors")
PAIRS = pairs_at((2, 5), (5, 2), count=9, length=8, vocab=100, ragged=True)
refusal = partial(any_refusal, mask_token_id=MASK)


# --- the slow model --------------------------------------------------------------------------------------------------


def norm(states: Tensor, w: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def slow_logits(weights: dict[str, Tensor], config: dict, ids: list[int], *, causal: bool = False) -> Tensor:
    """One head and one row at a time; the weights of GPT-2's linear layers are `in out`."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    eps, heads, length = config["layer_norm_epsilon"], config["n_head"], len(ids)
    states = w["embed_tokens.weight"][ids] + w["denoise_model.wpe.weight"][:length]
    width = states.shape[1]
    dim = width // heads
    for n in range(config["n_layer"]):
        at = f"denoise_model.h.{n}"
        qkv = norm(states, w, f"{at}.ln_1", eps) @ w[f"{at}.attn.c_attn.weight"] + w[f"{at}.attn.c_attn.bias"]
        mixed = torch.zeros(length, width, dtype=torch.float64)
        for head in range(heads):
            q, k, v = (qkv[:, s * width + head * dim : s * width + (head + 1) * dim] for s in range(3))
            for i in range(length):
                seen = i + 1 if causal else length
                scores = (k[:seen] @ q[i]) / math.sqrt(dim)
                scores = scores / (n + 1) if config["scale_attn_by_inverse_layer_idx"] else scores
                mixed[i, head * dim : (head + 1) * dim] = scores.softmax(0) @ v[:seen]
        states = states + mixed @ w[f"{at}.attn.c_proj.weight"] + w[f"{at}.attn.c_proj.bias"]
        inside = norm(states, w, f"{at}.ln_2", eps) @ w[f"{at}.mlp.c_fc.weight"] + w[f"{at}.mlp.c_fc.bias"]
        inside = 0.5 * inside * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inside + 0.044715 * inside**3)))
        states = states + inside @ w[f"{at}.mlp.c_proj.weight"] + w[f"{at}.mlp.c_proj.bias"]
    head_weight = w.get("lm_head.weight", w["embed_tokens.weight"])
    return norm(states, w, "denoise_model.ln_f", eps) @ head_weight.T


def checkpoint(folder: Path, seed: int) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint of random size as it is published: its head left out, written twice, or its own."""
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    heads, dim, layers, rows, mlp = pick(1, 2, 3, 5), pick(3, 8, 16), pick(1, 2, 3), pick(61, 130), pick(None, 40)
    width, length = heads * dim, pick(16, 24)
    inner = mlp or 4 * width
    head = ("absent", "written twice", "its own")[seed % 3]
    config = json.loads((TINY / "config.json").read_text()) | {
        "vocab_size": rows - pick(0, 1, 3),  # the rows decide
        "n_embd": width,
        "n_head": heads,
        "n_layer": layers,
        "n_inner": mlp,
        "n_positions": length,
        "n_ctx": length,
        "layer_norm_epsilon": pick(1e-5, 1e-3),
        "scale_attn_by_inverse_layer_idx": pick(False, True),
        "bos_token_id": 3,
        "eos_token_id": 3,
    }
    config |= {"tie_word_embeddings": False} if head == "its own" else {}
    if seed % 2:  # what the hub's config says of its class is not known
        config["architectures"] = ["GPT2LMHeadModel"]
    shapes = {"embed_tokens.weight": (rows, width), "denoise_model.wpe.weight": (length, width)}
    shapes |= {f"denoise_model.ln_f.{kind}": (width,) for kind in ("weight", "bias")}
    for n in range(layers):
        at = f"denoise_model.h.{n}"
        sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        sizes |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
        for part, size in sizes.items():
            shapes |= {f"{at}.{part}.weight": size, f"{at}.{part}.bias": size[1:]}
        shapes |= {f"{at}.{part}.{kind}": (width,) for part in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    weights = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    if head != "absent":
        own = torch.randn(rows, width) if head == "its own" else weights["embed_tokens.weight"].clone()
        weights["lm_head.weight"] = own
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights, config


@torch.no_grad()
@pytest.mark.parametrize("seed", range(9))
def test_other_sizes_equal_a_forward_pass_written_out(seed: int, tmp_path: Path) -> None:
    weights, config = checkpoint(tmp_path / "sized", seed)
    rows = len(weights["embed_tokens.weight"])
    model = rp.load_model(tmp_path / "sized", mask_token_id=rows - 1, dtype="float64")
    assert (model.objective, model.logit_shift, model.vocab_size) == ("masked", 1, rows)
    assert model.max_length == config["n_positions"]
    ids = [*torch.randint(0, rows - 1, (6,)).tolist(), rows - 1]
    expected = slow_logits(weights, config, ids)
    torch.testing.assert_close(model.logits(torch.tensor([ids]))[0], expected, atol=1e-9, rtol=0)
    assert (expected - slow_logits(weights, config, ids, causal=True)).abs().max() > 1e-2, "a mask would be seen"
    # Of two lengths in one batch, and saved under the published names.
    padded, mask = torch.tensor([ids, [*ids[:4], 0, 0, 0]]), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    alone = slow_logits(weights, config, ids[:4])
    torch.testing.assert_close(model.logits(padded, mask)[1, :4], alone, atol=1e-9, rtol=0)
    model.module.save_pretrained(tmp_path / "saved")
    again = rp.load_model(tmp_path / "saved")
    torch.testing.assert_close(again.logits(torch.tensor([ids]))[0], expected, atol=1e-9, rtol=0)
    assert again.mask_token_id == rows - 1, "what was said at first is in the config"
    assert "embed_tokens.weight" in load_file(tmp_path / "saved" / "model.safetensors")


# --- GPT-2's own layout ----------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A GPT-2 as transformers writes it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=59, eos_token_id=59)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors under DiffuGPT's names."""
    renamed = {"transformer.wte.weight": "embed_tokens.weight"}
    return {renamed.get(name, name.replace("transformer.", "denoise_model.")): one for name, one in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_gpt2_folder_is_causal_and_with_bidirectional_a_diffugpt(prefix: str, plain: Path) -> None:
    """Its published files leave the prefix out."""
    weights, config = load_file(plain / "model.safetensors"), json.loads((plain / "config.json").read_text())
    short = {name.replace("transformer.", prefix): one for name, one in weights.items()}
    save_file(short, plain / "model.safetensors", {"format": "pt"})
    ids = [5, 9, 30, 7, 12]
    causal = rp.load_model(plain)
    assert type(causal.module) is GPT2LMHeadModel and causal.objective == "causal" and causal.reads == ""
    expected = slow_logits(published(weights), config, ids, causal=True)
    torch.testing.assert_close(causal.logits(torch.tensor([ids]))[0].double(), expected, atol=1e-4, rtol=0)
    whole = rp.load_model(plain, bidirectional=True, mask_token_id=58)
    assert (whole.objective, whole.logit_shift, whole.reads) == ("masked", 1, "bidirectional")
    expected = slow_logits(published(weights), config, ids)
    torch.testing.assert_close(whole.logits(torch.tensor([ids]))[0].double(), expected, atol=1e-4, rtol=0)
    ways = [rp.diagnose(model).table.set_index("check").loc["reads", "note"] for model in (causal, whole)]
    assert "left to right" in ways[0] and "bidirectional=True" in ways[0] and "every other" in ways[1]


def test_blocks_of_one_are_the_causal_parent(plain: Path) -> None:
    """The dial from causal to whole, and the line that says which."""
    causal, one = rp.load_model(plain), rp.load_model(plain, bidirectional=True, mask_token_id=58).in_blocks(1)
    ids = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one.logits(ids), causal.logits(ids), atol=1e-5, rtol=0)
    note = rp.diagnose(one.in_blocks(4)).table.set_index("check").loc["reads", "note"]
    assert note == "in blocks of 4: a token sees finished blocks and its own"


def test_only_the_headers_of_a_gpt2_are_looked_into(plain: Path, monkeypatch) -> None:
    """To tell whose the files are; no other model's are for that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from revprobe.models.families import files

    looked = []
    plain_header = files.header
    monkeypatch.setattr(files, "header", lambda path: looked.append(path) or plain_header(path))
    rp.load_model(plain)
    assert [path.name for path in looked] == ["model.safetensors"]
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(plain.parent / "llama")
    looked.clear()
    assert rp.load_model(plain.parent / "llama").objective == "causal" and not looked


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["s", "m"])
def test_published_names_bring_their_mask_token(size: str, tmp_path: Path, monkeypatch) -> None:
    """The files of the tiny one under the published names, the vocabulary as large as theirs."""
    monkeypatch.chdir(tmp_path)
    name = f"diffusionfamily/diffugpt-{size}"
    rows, mask = (50257, 10541) if size == "s" else (50258, 50257)
    weights, config = load_file(TINY / "model.safetensors"), json.loads((TINY / "config.json").read_text())
    weights["embed_tokens.weight"] = torch.randn(rows, 64)
    (tmp_path / "files").mkdir()
    save_file(weights, tmp_path / "files" / "model.safetensors", {"format": "pt"})
    (tmp_path / "files" / "config.json").write_text(json.dumps(config | {"vocab_size": 50257}))
    model = rp.load_model(name, cache_dir=in_cache(tmp_path / "files", name, tmp_path / "cache"))
    assert (model.mask_token_id, model.vocab_size, model.logit_shift) == (mask, rows, 1)
    assert DIFFUGPT.tokenizer == model.tokenizer_source == "openai-community/gpt2"


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied("diffugpt-tiny", tmp_path / "checkpoint")


def test_what_is_not_said_or_cannot_be_is_one_line(folder: Path) -> None:
    assert "names no mask token; pass mask_token_id=" in refusal(folder, mask_token_id=None)
    assert "mask token 256 is outside the vocabulary (0 to 255)" in refusal(folder, mask_token_id=256)
    assert "is DiffuGPT, a masked model; leave objective out" in refusal(folder, objective="causal")
    assert "is a file; expected the folder" in refusal(folder / "model.safetensors")


def test_tensors_are_named_as_they_are_published(folder: Path) -> None:
    name, ours = "denoise_model.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight"
    rewrite(folder, lambda w: w.update({name: w[name][:, :100].contiguous()}))
    assert f"mismatched {name} (here {ours}) ((64, 100) for (64, 256))" in refusal(folder)
    rewrite(folder, lambda w: w.pop(name))
    assert f"missing {name} (here {ours})" in refusal(folder)
    rewrite(folder, lambda w: w.update({"denoise_model.h.2.ln_1.weight": torch.zeros(64)}))
    assert "unexpected denoise_model.h.2.ln_1.weight" in refusal(folder)


def test_a_head_that_should_be_the_embedding_and_is_not_is_refused(folder: Path) -> None:
    """transformers would take it for a head of its own; the published code has one tensor for both."""
    rewrite(folder, lambda w: w.update({"lm_head.weight": w["embed_tokens.weight"] + 1}))
    assert "its head differs from its embedding" in refusal(folder)
    set_in_config(folder, tie_word_embeddings=False)
    module = rp.load_model(folder, mask_token_id=MASK).module
    assert torch.equal(module.lm_head.weight, module.transformer.wte.weight + 1)


@pytest.mark.parametrize("architecture", ["DiscreteDiffusionModel", "GPT2LMHeadModel"])
def test_a_cut_off_or_pickled_file_is_one_line(architecture: str, folder: Path) -> None:
    set_in_config(folder, architectures=[architecture])
    weights, path = load_file(TINY / "model.safetensors"), folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:9000])
    told = {} if architecture.startswith("Disc") else {"mask_token_id": None}  # nothing else says what it is
    assert "cut off" in refusal(folder, **told)
    path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    said = refusal(folder, **told)
    assert "holds only pickled weights (pytorch_model.bin)" in said
    code = said.split("`")[1]
    assert "weights_only=True" in code and "save_file" in code
    exec(code, {})
    assert rp.load_model(folder, mask_token_id=MASK).objective == "masked"


def test_a_missing_shard_is_named_that_would_say_whose_the_files_are(folder: Path) -> None:
    shards = in_shards(folder)
    assert rp.load_model(folder, mask_token_id=MASK).vocab_size == 256
    shard = next(shard for shard in shards if "embed_tokens.weight" in load_file(shard))
    shard.unlink()
    assert shard.name in refusal(folder)


# --- what is done with it ---------------------------------------------------------------------------------------------


def test_probes_storage_and_bridge_agree() -> None:
    model = rp.load_model(TINY, mask_token_id=MASK)
    theirs = bridged(model)
    for ours, other in zip(rp.probe(model, PAIRS), rp.probe(theirs, PAIRS), strict=True):
        assert (other.value, other.n) == pytest.approx((ours.value, ours.n), abs=1e-4), ours.name
    storage = rp.probe_stored_evidence(model, PAIRS)
    assert math.isfinite(storage.value) and storage.meta["worst_gap"] < 1e-5
    assert {"q", "k", "v"} <= set(rp.probe_gradient_cosine(model, PAIRS, control=False).frame["role"])
    assert "all three probes can be trusted" in repr(rp.diagnose(model))
    wanted = lambda hook: hook.endswith("hook_attn_scores")  # noqa: E731
    with torch.no_grad():
        _, cache = theirs.module.run_with_cache(REFERENCE["input_ids"][:1], names_filter=wanted)
    scores = torch.stack([cache[f"blocks.{layer}.attn.hook_attn_scores"][0] for layer in range(2)])
    torch.testing.assert_close(scores, REFERENCE["scores_row0"], atol=1e-4, rtol=0)


def test_it_is_decoded_and_fine_tuned_with_its_shift() -> None:
    model = rp.load_model(TINY, mask_token_id=MASK)
    (written,) = decode_tokens(model, [Prompt((5, 9, 7), ())], [4])
    assert len(written) == 4 and MASK not in written
    torch.manual_seed(0)
    adapted = add_lora(model, LoraOptions(rank=2))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert any(f"{part}.lora_A" in name for name in trained), part
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.randint(100, (4, 8)), []
    for _ in range(12):
        generator = torch.Generator().manual_seed(0)
        loss = masked_diffusion_loss(adapted, ids, generator=generator, mask_token_id=MASK, logit_shift=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
