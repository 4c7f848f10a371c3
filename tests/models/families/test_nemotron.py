"""Nemotron-Labs-Diffusion: its three readings (whole, block by block, causal) of any size, against a slow decoder in
float64 and against transformers' Ministral 3 with a cache, written as its published sampler writes.

No outputs of the reference code were at hand; what is held here are the rules that its independent ports agree on.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from plain_gradients import worst_product_error
from safetensors.torch import load_file
from slow_decoder import draw_checkpoint, pick, slow_logits, write_checkpoint, yarn_frequencies
from torch import Tensor
from transformers import DynamicCache, Ministral3Config, Ministral3ForCausalLM

import revprobe as rp
from revprobe.finetune.training.block_diffusion import block_logits
from revprobe.models.contract.block_masks import added_to_scores, training_mask
from revprobe.models.families.nemotron import official_name
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.masked import Prompt
from tiny import pairs_at, tapped

CLOSE = 2e-5
LENGTH = 11
SEEDS = range(6)


def checkpoint(folder: Path, seed: int, **more: object) -> tuple[dict[str, Tensor], dict, int, int]:
    """A folder as it is published, with so short an original context that queries are scaled inside of LENGTH.

    Returns: our weights and config, mask token, block size.
    """
    weights, config = draw_checkpoint(seed, "llama", head_dim=True)
    rows, base = config["vocab_size"], config.pop("rope_theta")
    rotary = {"rope_type": "yarn", "rope_theta": base, "factor": pick(16.0, 4.0, 0.25), "beta_fast": 32.0}
    rotary |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": pick(0.1, 0.5)}
    rotary["original_max_position_embeddings"] = pick(3, 6)
    told = {"model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"]}
    told |= {"mask_token_id": rows - 5, "block_size": pick(2, 3, 4, 5), "rope_parameters": rotary, "bos_token_id": 1}
    told |= {"eos_token_id": 11, "attention_bias": False, "mlp_bias": False, "sliding_window": None}
    told |= {"dlm_paradigm": "bidirectional", "attn_implementation": "sdpa", "dlm_loss_weight": None}
    config |= told | more
    write_checkpoint(folder, {official_name(name): tensor for name, tensor in weights.items()}, config)
    return weights, config, config["mask_token_id"], config["block_size"]


def slow(weights: dict, config: dict, ids: list[int], sees, positions: list[int] | None = None) -> Tensor:
    rotary = config["rope_parameters"]
    original, beta = rotary["original_max_position_embeddings"], rotary["llama_4_scaling_beta"]
    turns = yarn_frequencies(config["head_dim"], float(rotary["rope_theta"]), rotary["factor"], original)
    scale = lambda position: 1 + beta * math.log(1 + position // original)  # noqa: E731
    places = list(range(len(ids))) if positions is None else positions
    settings = config | {"rope_theta": rotary["rope_theta"]}
    return slow_logits(weights, settings, ids, sees, places, frequencies=turns, query_scale=scale)


def in_blocks(ids: list[int], mask: int, size: int):
    """The rule of reading: a block with a mask in it sees all of itself, another is read from left to right."""

    def sees(i: int, j: int) -> bool:
        own = i // size
        written = mask in ids[own * size : own * size + size]
        return j // size < own or (j // size == own and (written or j <= i))

    return sees


def causally(i: int, j: int) -> bool:
    return j <= i


def text_with(mask: int, *places: int) -> list[int]:
    ids = torch.randint(12, 50, (LENGTH,)).tolist()
    return [mask if place in places else token for place, token in enumerate(ids)]


def apart(found: Tensor, expected: Tensor) -> float:
    """In units of the largest logit, where that is above 1."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1))


# --- the three readings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_any_size_equals_a_slow_decoder_in_every_reading(seed: int, tmp_path: Path) -> None:
    weights, config, mask, size = checkpoint(tmp_path / "any", seed)
    model = rp.load_model(tmp_path / "any")
    assert (model.block_size, model.logit_shift, model.mask_token_id) == (size, 0, mask)
    assert model.reads == f"in blocks of {size}, causal where finished"
    ids = text_with(mask, 7)
    shown = torch.tensor([ids])
    blocked = slow(weights, config, ids, in_blocks(ids, mask, size))
    assert apart(model.logits(shown)[0], blocked) < CLOSE
    whole = slow(weights, config, ids, lambda i, j: True)
    assert apart(model.in_blocks(None).logits(shown)[0], whole) < CLOSE
    causal = slow(weights, config, ids, causally)
    assert apart(rp.load_model(tmp_path / "any", objective="causal").logits(shown)[0], causal) < CLOSE
    finished_whole = slow(weights, config, ids, lambda i, j: j // size <= i // size)
    others = (whole, causal, finished_whole)
    assert min(apart(blocked, other) for other in others) > 5 * CLOSE, "each reading is another"
    kept = torch.arange(LENGTH + 3)[None] < LENGTH
    for filler in (0, mask):  # the mask's own id, too, leaves no block unfinished where it is padding
        padded = torch.cat([shown, torch.full((1, 3), filler)], 1)
        assert apart(model.logits(padded, kept.long())[0, :LENGTH], blocked) < CLOSE


@torch.no_grad()
def test_where_the_table_has_more_rows_than_the_config_says_the_rows_count(tmp_path: Path) -> None:
    _, config, mask, _ = checkpoint(tmp_path / "any", 0)
    ids, plain = torch.tensor([text_with(mask, 7)]), rp.load_model(tmp_path / "any")
    (tmp_path / "any" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 3}))
    model = rp.load_model(tmp_path / "any")
    assert model.vocab_size == config["vocab_size"] and torch.equal(model.logits(ids), plain.logits(ids))


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_rows_of_a_batch_are_read_by_their_own_masks(seed: int, tmp_path: Path) -> None:
    """Which blocks are finished differs from row to row."""
    weights, config, mask, size = checkpoint(tmp_path / "any", seed)
    model = rp.load_model(tmp_path / "any")
    rows = [text_with(mask, 0), text_with(mask, 5, 10), text_with(mask)]
    found = model.logits(torch.tensor(rows))
    for row, ids in zip(found, rows, strict=True):
        assert apart(row, slow(weights, config, ids, in_blocks(ids, mask, size))) < CLOSE


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_training_masks_too(seed: int, tmp_path: Path) -> None:
    """Noised blocks see themselves and the clean text before them, which is read from left to right."""
    weights, config, mask, size = checkpoint(tmp_path / "any", seed)

    def trained(i: int, j: int) -> bool:
        own, other = (i % LENGTH) // size, (j % LENGTH) // size
        if i < LENGTH:
            return own == other if j < LENGTH else other < own
        return j >= LENGTH and j <= i

    ids, places = [*text_with(mask, 2, 3, 8), *text_with(mask)], list(range(LENGTH)) * 2
    sees = training_mask(LENGTH, size, finished_causal=True)
    assert all(bool(sees[i, j]) == trained(i, j) for i in range(2 * LENGTH) for j in range(2 * LENGTH))
    module = rp.load_model(tmp_path / "any").module
    added = added_to_scores(sees, None, torch.float32)
    out = module(torch.tensor([ids]), attention_mask=added, position_ids=torch.tensor([places])).logits[0]
    assert apart(out, slow(weights, config, ids, trained, places)) < CLOSE


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_each_noised_block_is_trained_as_it_is_read(seed: int, tmp_path: Path) -> None:
    _, _, mask, size = checkpoint(tmp_path / "any", seed)
    model = rp.load_model(tmp_path / "any")
    clean = torch.randint(12, 50, (2, LENGTH))
    noised = clean.clone()
    noised[:, ::size] = mask
    trained = block_logits(model.module, noised, clean, size)
    for first in range(0, LENGTH, size):
        own = slice(first, first + size)
        read = model.logits(torch.cat([clean[:, :first], noised[:, own]], dim=1))[:, first:]
        assert apart(trained[:, own], read.double()) < CLOSE


@pytest.mark.parametrize("seed", SEEDS)
def test_it_writes_as_a_slow_sampler_does(seed: int, tmp_path: Path) -> None:
    weights, config, mask, size = checkpoint(tmp_path / "any", seed)
    prompts, lengths = [torch.randint(12, 50, (n,)).tolist() for n in (3, 5, 4)], [7, 6, 5]
    written = decode_tokens(rp.load_model(tmp_path / "any"), [Prompt(tuple(one)) for one in prompts], lengths)
    for prompt, length, answer in zip(prompts, lengths, written, strict=True):
        ids = prompt + [mask] * length
        while mask in ids:
            block = ids.index(mask) // size
            logits = slow(weights, config, ids, in_blocks(ids, mask, size)).clone()
            logits[:, mask] = -torch.inf
            sure = logits.log_softmax(-1).max(-1).values
            there = [place for place, token in enumerate(ids) if token == mask and place // size == block]
            surest = max(there, key=lambda place: (float(sure[place]), -place))
            ids[surest] = int(logits[surest].argmax())
        assert ids[len(prompt) :] == answer


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_text_without_masks_is_read_as_the_causal_model_reads_it(seed: int, tmp_path: Path) -> None:
    checkpoint(tmp_path / "any", seed)
    model, causal = rp.load_model(tmp_path / "any"), rp.load_model(tmp_path / "any", objective="causal")
    ids = torch.randint(12, 50, (2, LENGTH))
    expected = causal.logits(ids)
    for size in (1, 3, 20):
        assert apart(model.in_blocks(size).logits(ids), expected.double()) < CLOSE
    assert (causal.objective, causal.logit_shift, causal.block_size) == ("causal", 1, None)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_block_is_read_as_the_published_sampler_reads_it(seed: int, tmp_path: Path) -> None:
    """What stands before is put into a cache from left to right, and the block sees the cache and all of itself: by
    transformers' own class, with its own cache.
    """
    weights, config, mask, _ = checkpoint(tmp_path / "any", seed, block_size=4)
    settings = {key: value for key, value in config.items() if key in vars(Ministral3Config())}
    reference = Ministral3ForCausalLM(Ministral3Config(**settings)).eval()
    missing = reference.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    ids = torch.tensor([text_with(mask, 9, 10)])
    cache = DynamicCache()
    reference(ids[:, :8], past_key_values=cache, use_cache=True)
    block = reference(ids[:, 8:], past_key_values=cache, use_cache=True, attention_mask=torch.zeros(1, 1, 3, 11)).logits
    found = rp.load_model(tmp_path / "any").logits(ids)
    assert apart(found[:, 8:], block.double()) < CLOSE
    assert apart(found[:, :8], reference(ids[:, :8]).logits.double()) < CLOSE


# --- the probes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> rp.ProbedModel:
    """In blocks of four."""
    checkpoint(tmp_path / "tiny", 3, block_size=4)
    return rp.load_model(tmp_path / "tiny")


def test_the_probes_answer_inside_a_block_and_attention_sees_what_the_rule_shows(model: rp.ProbedModel) -> None:
    pairs = pairs_at((6, 5), (5, 6), count=9, length=8, vocab=50, ragged=True)
    attention, gradient, probability = rp.probe(model, pairs)
    assert all(math.isfinite(reading.value) and reading.n == 9 for reading in (attention, gradient, probability))
    ids = text_with(model.mask_token_id, 5)
    everywhere = torch.arange(LENGTH)[None]
    with torch.no_grad(), tapped(model, everywhere, everywhere, LENGTH) as tap:
        model.logits(torch.tensor([ids]))
    sees = in_blocks(ids, model.mask_token_id, 4)
    rule = torch.tensor([[sees(i, j) for j in range(LENGTH)] for i in range(LENGTH)])
    for call in tap.layers().values():
        assert all(torch.equal(head, rule) for head in call.score[0].isfinite())


def test_evidence_in_a_later_block_gives_no_number(model: rp.ProbedModel) -> None:
    """Blocks of four: forward queries see their evidence, reverse ones have it in the block behind."""
    apart_pairs = pairs_at((2, 5), (6, 1), count=9, length=8, vocab=50)
    for reading in rp.probe(model, apart_pairs):
        assert math.isnan(reading.value) and "later block" in str(reading)
    assert all(math.isfinite(reading.value) for reading in rp.probe(model.in_blocks(None), apart_pairs))


def test_gradient_products_equal_autograd_in_both_objectives(model: rp.ProbedModel, tmp_path: Path) -> None:
    causal = rp.load_model(tmp_path / "tiny", objective="causal")
    ids, places = torch.tensor([text_with(0) for _ in range(3)]), torch.tensor([2, 5, 6])
    ids[:, 3] = 11  # Ministral 3 would pad with it where the file names no other, and leave its row without a gradient
    targets = torch.tensor([7, 8, 9])
    for one in (model, causal):
        shown = one.hide(ids, torch.arange(LENGTH) == places[:, None])

        def loss(which: slice, one=one, shown=shown) -> Tensor:
            logits = one.logits(shown[which])
            read = logits[torch.arange(len(logits)), (places - one.logit_shift)[which]]
            return torch.nn.functional.cross_entropy(read, targets[which], reduction="none")

        parameters = dict(one.module.named_parameters())
        assert worst_product_error(one.module, parameters, loss, 3) < 1e-5
        loss(slice(None)).sum().backward()
        assert one.module.model.embed_tokens.weight.grad[11].abs().max() > 0


def test_transformer_lens_has_no_view_of_it_and_says_so(model: rp.ProbedModel) -> None:
    with pytest.raises(rp.RevprobeError, match="TransformerLens cannot bridge NemotronForMaskedDiffusion"):
        model.to_bridge()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_every_kernel_gets_the_mask(kernel: str, model: rp.ProbedModel, tmp_path: Path) -> None:
    ids = torch.tensor([text_with(model.mask_token_id, 6)])
    other = rp.load_model(tmp_path / "tiny", attn_implementation=kernel).logits(ids)
    assert apart(other, model.logits(ids).double()) < CLOSE


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["masked", "causal"])
@torch.no_grad()
def test_what_is_saved_has_the_published_names_and_loads_without_options(objective: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "first", 1)
    model = rp.load_model(tmp_path / "first", objective=objective)
    model.module.save_pretrained(tmp_path / "again")
    saved, published = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "first"))
    assert saved.keys() == published.keys() and all(torch.equal(saved[name], published[name]) for name in published)
    again = rp.load_model(tmp_path / "again")
    ids = torch.randint(12, 50, (1, LENGTH))
    assert again.objective == objective and torch.equal(again.logits(ids), model.logits(ids))


@pytest.mark.parametrize("rotary", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
@torch.no_grad()
def test_a_file_that_scales_no_queries_gets_none_scaled(rotary: dict, tmp_path: Path) -> None:
    weights, config, mask, size = checkpoint(tmp_path / "any", 2, rope_parameters=rotary | {"rope_theta": 1e4})
    dim, ids = config["head_dim"], text_with(mask, 7)
    turns = 1e4 ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim) / rotary.get("factor", 1.0)
    places = list(range(LENGTH))
    expected = slow_logits(
        weights, config | {"rope_theta": 1e4}, ids, in_blocks(ids, mask, size), places, frequencies=turns
    )
    assert apart(rp.load_model(tmp_path / "any").logits(torch.tensor([ids]))[0], expected) < CLOSE


@pytest.mark.parametrize(
    ("more", "told", "said"),
    [
        ({}, {"mask_token_id": 900}, "mask token 900 is outside the vocabulary"),
        ({"mask_token_id": None}, {}, "names no mask token; pass mask_token_id="),
        ({"block_size": None}, {}, "block_size="),
        ({}, {"objective": "causal", "block_size": 4}, "causal and reads token by token"),
        ({"attention_bias": True}, {}, "attention_bias=True is not supported; expected False"),
        ({"sliding_window": 4}, {}, "sliding_window=4 is not supported; expected None"),
        ({"dlm_paradigm": "autoregressive"}, {}, "load it with objective='causal'"),
        ({"dlm_paradigm": "prefix_bidirectional"}, {}, "dlm_paradigm='prefix_bidirectional' is not supported"),
        ({"rope_parameters": None}, {}, "no rope_parameters"),
        ({"model_type": "sdar"}, {}, "does not match its config: missing .*unexpected diffusion_head.weight"),
        ({"model_type": "nemotron_labs_diffusion_vlm"}, {}, "reads images too"),
    ],
)
def test_what_is_not_read_is_said_in_one_line(more: dict, told: dict, said: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "any", 0)
    config = json.loads((tmp_path / "any" / "config.json").read_text())
    (tmp_path / "any" / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(rp.RevprobeError, match=said) as caught:
        rp.load_model(tmp_path / "any", **told)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_diffusion_model_is_read_as_the_causal_one(tmp_path: Path) -> None:
    checkpoint(tmp_path / "any", 0, dlm_paradigm="autoregressive")
    assert rp.load_model(tmp_path / "any", objective="causal").objective == "causal"


def test_a_truncated_file_a_pickled_one_and_code_alone_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "any", 0)
    weights = tmp_path / "any" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(rp.RevprobeError, match="cannot load the weights"):
        rp.load_model(tmp_path / "any")
    weights.rename(tmp_path / "any" / "pytorch_model.bin")
    with pytest.raises(rp.RevprobeError, match="only pickled weights"):
        rp.load_model(tmp_path / "any")
    (tmp_path / "any" / "pytorch_model.bin").rename(tmp_path / "any" / "modeling_nemotron_labs_diffusion.py")
    with pytest.raises(rp.RevprobeError, match=r"holds no model\.safetensors"):
        rp.load_model(tmp_path / "any")


def test_a_renaming_that_crosses_two_tensors_would_be_seen(tmp_path: Path) -> None:
    """The planted fault: the MLP's gate in the place of its up projection."""
    weights, config, mask, size = checkpoint(tmp_path / "any", 4)
    crossed = dict(weights)
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    crossed[gate], crossed[up] = weights[up], weights[gate]
    write_checkpoint(tmp_path / "any", {official_name(name): tensor for name, tensor in crossed.items()}, config)
    ids = text_with(mask, 7)
    with torch.no_grad():
        found = rp.load_model(tmp_path / "any").logits(torch.tensor([ids]))[0]
    assert apart(found, slow(weights, config, ids, in_blocks(ids, mask, size))) > 100 * CLOSE
