"""SDAR, Fast-dLLM v2 and A2D of any size: against one slow decoder, in float64, one head and one row at a time."""

import json
from pathlib import Path

import pytest
import torch
from long_cases import rest_long
from safetensors.torch import load_file
from slow_decoder import draw_checkpoint, pick, slow_logits, write_checkpoint
from torch import Tensor

import revprobe as rp
from revprobe.models.contract.block_masks import added_to_scores, block_mask, training_mask
from tiny import FIXTURES, pairs_at

TYPES = {"a2d-qwen3": "qwen3", "a2d-qwen2": "qwen2", "a2d-llama": "llama", "sdar": "qwen3", "Fast_dLLM_Qwen": "qwen2"}


# --- any size ---------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, model_type: str, seed: int) -> tuple[dict[str, Tensor], dict, int, int]:
    """A checkpoint of random size as it is published. Returns: weights, config, mask token, block size."""
    weights, config = draw_checkpoint(seed, TYPES[model_type], model_type=model_type)
    block = pick(2, 3, 5, 6)
    config |= {"sdar": {"block_size": block}, "Fast_dLLM_Qwen": {"bd_size": block}}.get(model_type, {})
    write_checkpoint(folder, weights, config)
    return weights, config, config["vocab_size"] - 2, block


@pytest.mark.parametrize("seed", rest_long(range(5), 2))
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_any_size_equals_a_slow_decoder(model_type: str, seed: int, tmp_path: Path) -> None:
    weights, config, mask, block = checkpoint(tmp_path / "any", model_type, seed)
    said = {"block_size": block} if model_type.startswith("a2d") else {}
    model = rp.load_model(tmp_path / "any", mask_token_id=mask, **said)
    assert (model.block_size, model.vocab_size) == (block, config["vocab_size"])
    ids = torch.randint(config["vocab_size"], (11,)).tolist()
    places = list(range(11))
    blocked = slow_logits(weights, config, ids, lambda i, j: j // block <= i // block, places)
    whole = slow_logits(weights, config, ids, lambda i, j: True, places)
    close = 2e-5 * float(blocked.abs().max().clamp(min=1))
    shown = torch.tensor([ids])
    assert float((model.logits(shown)[0].double() - blocked).abs().max()) < close
    assert float((model.in_blocks(None).logits(shown)[0].double() - whole).abs().max()) < close
    assert float((blocked - whole).abs().max()) > 100 * close, "the two masks differ"
    padded, kept = torch.cat([shown, torch.zeros_like(shown[:, :3])], 1), torch.arange(14)[None] < 11
    assert float((model.logits(padded, kept.long())[0, :11].double() - blocked).abs().max()) < close
    doubled = slow_logits(weights, config, ids + ids, lambda i, j: trained(i, j, 11, block), places * 2)
    added = added_to_scores(training_mask(11, block), None, torch.float32)
    out = model.module(shown.repeat(1, 2), attention_mask=added, position_ids=torch.tensor([places * 2])).logits
    assert float((out[0].double() - doubled).abs().max()) < close


def trained(i: int, j: int, length: int, size: int) -> bool:
    """The rule of training, one pair of places at a time."""
    noised_query, noised_key = i < length, j < length
    own, other = (i % length) // size, (j % length) // size
    if noised_query:
        return own == other if noised_key else other < own
    return not noised_key and other <= own


# --- block size 1 to whole -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_block_size_one_is_the_causal_parent_up_to_the_shift(tmp_path: Path) -> None:
    """The same weights: the parent's row i sees tokens up to i, as does a row read in blocks of one."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = json.loads((FIXTURES / "a2d-qwen3-mdlm-tiny" / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "head_dim", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    names += ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    sizes = {name: config[name] for name in names}
    parent = Qwen3ForCausalLM(Qwen3Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e6})).eval()
    missing = parent.load_state_dict(load_file(FIXTURES / "a2d-qwen3-mdlm-tiny" / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    child = rp.load_model(FIXTURES / "a2d-qwen3-mdlm-tiny", mask_token_id=254, block_size=1)
    ids = torch.randint(250, (3, 12), generator=torch.Generator().manual_seed(0))
    assert float((child.logits(ids) - parent(ids).logits).abs().max()) < 1e-5
    assert float((child.in_blocks(2).logits(ids) - parent(ids).logits).abs().max()) > 1e-2


@torch.no_grad()
def test_a_block_as_long_as_the_query_is_the_whole() -> None:
    model = rp.load_model(FIXTURES / "sdar-tiny")
    ids = torch.randint(250, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = model.in_blocks(None)
    torch.testing.assert_close(model.in_blocks(9).logits(ids), whole.logits(ids), atol=1e-5, rtol=0)
    assert whole.block_size is None and model.block_size == 4, "the model itself stays as it is"


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_block_mask_reaches_every_kernel(kernel: str) -> None:
    """A mask of booleans would be added as 0 and 1 by the eager kernel, and hide nothing."""
    model = rp.load_model(FIXTURES / "sdar-tiny", attn_implementation=kernel)
    ids = torch.randint(250, (1, 12), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[0, 8] += 1
    with torch.no_grad():
        moved = (model.logits(ids) != model.logits(other)).any(-1)[0]
    assert moved.tolist() == [False] * 8 + [True] * 4
    assert model.module.config._attn_implementation == kernel


def test_flex_attention_in_the_config_loads_with_sdpa() -> None:
    stated = json.loads((FIXTURES / "sdar-tiny" / "config.json").read_text())
    assert stated["attn_implementation"] == "flex_attention"
    assert rp.load_model(FIXTURES / "sdar-tiny").module.config._attn_implementation == "sdpa"


# --- what the files do not say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told", "said"),
    [
        ("a2d-qwen3-bd3lm-tiny", {"mask_token_id": 254}, "block_size="),
        ("a2d-llama-mdlm-tiny", {"mask_token_id": 254}, "bidirectional=True"),
        ("a2d-qwen2-bd3lm-tiny", {"block_size": 4}, "mask_token_id="),
        ("fastdllm2-tiny", {}, "mask_token_id="),
        ("fastdllm2-tiny", {"mask_token_id": 256}, "outside the vocabulary"),
        ("sdar-tiny", {"block_size": 0}, "above 0"),
        ("sdar-tiny", {"block_size": True}, "expected a whole number"),
        ("sdar-tiny", {"block_size": 4, "bidirectional": True}, "leave one of them out"),
        ("sdar-tiny", {"block_size": "four"}, "'whole'"),
        ("sdar-tiny", {"objective": "causal", "block_size": 4}, "leave objective out"),
    ],
)
def test_what_is_not_said_is_asked_for_in_one_line(name: str, told: dict, said: str) -> None:
    with pytest.raises(rp.RevprobeError, match=said) as caught:
        rp.load_model(FIXTURES / name, **told)
    assert "\n" not in str(caught.value)


def test_a_config_without_its_block_size_is_asked_about(tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "sdar-tiny" / "config.json").read_text())
    del config["block_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(FIXTURES / "sdar-tiny" / "model.safetensors")
    with pytest.raises(rp.RevprobeError, match="block_size="):
        rp.load_model(tmp_path)
    assert rp.load_model(tmp_path, block_size=4).block_size == 4


def test_a_causal_model_is_not_read_in_blocks() -> None:
    from tiny import gpt2

    with pytest.raises(rp.RevprobeError, match="causal"):
        gpt2().in_blocks(4)


# --- the contract ----------------------------------------------------------------------------------------------------


class IgnoresMasks(torch.nn.Module):
    """Attends to all, whatever mask it is given."""

    logit_shift = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.embed(input_ids)
        return self.out(torch.nn.functional.scaled_dot_product_attention(states, states, states))


class CausalAnyway(IgnoresMasks):
    """Puts its own causal mask on top."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.embed(input_ids)
        own = added_to_scores(block_mask(input_ids.shape[1], 1), None, states.dtype)[:, 0]
        given = 0 if attention_mask is None else attention_mask[:, 0]
        return self.out(torch.nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=own + given))


@pytest.mark.parametrize(("module", "said"), [(IgnoresMasks, "does not heed"), (CausalAnyway, "causal")])
def test_a_module_that_does_not_heed_the_mask_is_refused(module: type, said: str) -> None:
    with pytest.raises(rp.RevprobeError, match=said):
        rp.ProbedModel(module(), objective="masked", mask_token_id=3, block_size=4)


class OfContext(torch.nn.Module):
    """nanoGPT's name for the context length, in a masked model of one's own that takes no mask."""

    logit_shift, block_size = 0, 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        return self.out(torch.nn.functional.scaled_dot_product_attention(states, states, states))


def test_a_block_size_is_tokens_of_a_block_only_in_a_class_that_writes_in_blocks() -> None:
    model = rp.ProbedModel(OfContext(), objective="masked", mask_token_id=3)
    assert (model.block_size, model.reads) == (None, "bidirectional")
    with pytest.raises(rp.RevprobeError, match="takes no attention_mask, so it cannot be read in blocks; leave"):
        model.in_blocks(4)
    writes = type("InBlocks", (CausalAnyway,), {"attention": "block", "block_size": 1})
    assert rp.ProbedModel(writes(), objective="masked", mask_token_id=3).block_size == 1


def test_a_model_is_told_apart_by_how_it_is_read() -> None:
    """The contract of one block size is not that of another, though the module is the same."""
    model = rp.load_model(FIXTURES / "a2d-qwen3-mdlm-tiny", mask_token_id=254, bidirectional=True)
    one = model.in_blocks(1)
    assert (model.contract.reaches_back, one.contract.reaches_back) == (True, False)
    pairs = pairs_at((2, 5), (3, 5), count=9, length=8, vocab=100)
    apart = rp.probe_reverse_probability(model, pairs).value - rp.probe_reverse_probability(one, pairs).value
    assert abs(apart) > 1e-5
