"""The TransformerLens view: the same logits, the right attention, shared weights, and the model left as it was."""

from functools import partial

import numpy as np
import pytest
import torch
from long_cases import rest_long
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
)

import tiny
from revprobe import (
    ProbedModel,
    RevprobeError,
    letter_pairs,
    load_model,
    probe,
)
from revprobe.models import bridge as bridges
from revprobe.models.bases.configs import POSITION_ENCODINGS
from revprobe.probes.statistics.estimators import pair_cosines
from tiny import FIXTURES, bridged, drawn, gpt2, llama, pairs_at

# With logits and scores of the published code -> TransformerLens' own adapter for the causal relative.
STOCK = {"llada-tiny": bridges.LlamaArchitectureAdapter, "dream-tiny": bridges.Qwen2ArchitectureAdapter}


radd = partial(tiny.radd, n_layers=2, n_heads=2)
MODELS = {**{e: (lambda e=e: radd(e)) for e in POSITION_ENCODINGS}, "gpt2": gpt2, "llama (grouped keys)": llama}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_pattern_are_the_models_own_also_when_padded(name):
    model = MODELS[name]()
    ids = torch.tensor([[4, 0, 53, 30, 0], [4, 0, 31, 55, 55]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    wanted = lambda hook: hook.endswith(("hook_attn_scores", "hook_pattern"))  # noqa: E731
    logits, cache = model.to_bridge().run_with_cache(ids, attention_mask=mask, names_filter=wanted)
    ours = model.logits(ids, mask)
    difference = (logits - ours)[mask.bool()].nan_to_num()  # -inf at RADD's mask token on both sides
    assert difference.abs().max() < 1e-4
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(pattern.sum(-1)[0], torch.ones(pattern.shape[1], 5), atol=1e-5, rtol=0)
        sees_later = float(pattern[0, :, 0, 1:].abs().sum()) > 0
        assert sees_later == (model.objective == "masked"), "attention in the wrong direction"
        assert (pattern[1, :, :3, 3:] < 1e-6).all(), "padding is attended to"


@pytest.mark.parametrize("name", rest_long(MODELS, 2))
def test_probes_read_the_same_numbers_through_the_bridge(name):
    """Scores come from `hook_attn_scores` there and from the SDPA call here."""
    model = MODELS[name]()
    pairs = letter_pairs(5, model=model)
    wrapped = bridged(model)
    ours = probe(model, pairs, only=["attention", "probability"])
    theirs = probe(wrapped, pairs, only=["attention", "probability"])
    for one, other in zip(ours, theirs, strict=True):
        columns = [c for c in one.frame.columns if c.startswith(("score", "weight", "log_prob"))]
        left, right = (r.frame[columns].astype(float).to_numpy() for r in (one, other))
        assert ((abs(left - right) < 1e-4) | ((left != left) & (right != right))).all()


def test_the_bridge_shares_weights_and_leaves_the_model_alone():
    model = radd("rope")
    names = list(model.module.state_dict())
    bridge = model.to_bridge()
    assert list(model.module.state_dict()) == names
    ids = torch.tensor([[4, 0, 53, 30]])
    with torch.no_grad():
        model.module.embed_tokens.weight.mul_(2)
    torch.testing.assert_close(bridge(ids)[..., :53], model.logits(ids)[..., :53], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", rest_long(MODELS, 2))
def test_a_bare_bridge_says_what_it_is(name):
    """Objective, mask token and shift are found out through the model inside it."""
    model = MODELS[name]()
    pairs = letter_pairs(5, model=model)
    ours, theirs = (probe(m, pairs, only=["probability"])[0] for m in (model, model.to_bridge()))
    assert theirs.value == pytest.approx(ours.value, abs=1e-5)
    assert theirs.meta["logit_shift"] == model.logit_shift and theirs.meta["objective"] == model.objective


def test_an_architecture_without_an_adapter_is_named():
    class Unheard(GPT2LMHeadModel):
        pass

    model = ProbedModel(Unheard(GPT2Config(vocab_size=56, n_embd=16, n_layer=1, n_head=2)), objective="causal")
    with pytest.raises(RevprobeError, match=r"TransformerLens cannot bridge Unheard: .*register an adapter"):
        model.to_bridge()


# --- LLaDA and Dream, against the published code's own numbers --------------------------------------------------------


def differences(bridge, name: str) -> dict[str, float]:
    """Bridge against published code: logits where they are valid, scores of row 0 in every layer and head."""
    expected = load_file(FIXTURES / name / "reference.safetensors")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    wanted = lambda hook: hook.endswith("hook_attn_scores")  # noqa: E731
    with torch.no_grad():
        padded = (bridge(ids, attention_mask=mask) - expected["logits"])[mask.bool()]
        plain = bridge(ids) - expected["logits_nomask"]
        _, cache = bridge.run_with_cache(ids[:1], names_filter=wanted)
    layers = [cache[f"blocks.{layer}.attn.hook_attn_scores"][0] for layer in range(len(expected["scores_row0"]))]
    scores = torch.stack(layers) - expected["scores_row0"]
    return {"padded": padded.abs().max(), "plain": plain.abs().max(), "scores": scores.abs().max()}


@pytest.mark.parametrize("name", STOCK)
def test_the_bridge_gives_the_published_codes_logits_and_scores(name):
    """Every entry of the scores is compared: a causal mask would put -inf above the diagonal."""
    model = load_model(FIXTURES / name)
    assert all(difference < 1e-4 for difference in differences(model.to_bridge(), name).values())
    ids = load_file(FIXTURES / name / "reference.safetensors")["input_ids"]
    torch.testing.assert_close(model.to_bridge()(ids), model.logits(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_adapter_would_be_seen(name, monkeypatch):
    """The planted fault: TransformerLens' own adapters put the causal mask back."""
    model = load_model(FIXTURES / name)
    monkeypatch.setitem(bridges.ArchitectureAdapterFactory._adapters, type(model.module).__name__, STOCK[name])
    found = differences(model.to_bridge(), name)
    assert found["plain"] > 1e-3 and not found["scores"] < 1e-4


@pytest.mark.parametrize("name", STOCK)
def test_all_three_readings_are_the_same_through_the_bridge(name):
    """Gradients too: the bridge's unembedding holds a buffer where a Linear without bias has None."""
    model, pairs = load_model(FIXTURES / name), pairs_at((1, 3), (3, 1), count=12, length=5, vocab=240, ragged=True)
    wrapped = bridged(model)
    for ours, theirs in zip(probe(model, pairs), probe(wrapped, pairs), strict=True):
        assert (theirs.value, theirs.n) == pytest.approx((ours.value, ours.n), abs=1e-4), ours.name
        assert theirs.interval == pytest.approx(ours.interval, abs=1e-3), ours.name


@pytest.mark.parametrize("name", rest_long(MODELS, 2))
def test_gradients_through_the_bridge_are_those_of_the_model(name):
    """TransformerLens applies a LayerNorm's weight without calling the LayerNorm: its parent answers for it."""
    model = MODELS[name]()
    wrapped, pairs = bridged(model), letter_pairs(5, model=model)
    ours, theirs = (pair_cosines(probe(m, pairs, only=["gradient"])[0].frame) for m in (model, wrapped))
    np.testing.assert_allclose(theirs.cosine, ours.cosine, atol=1e-4)
    np.testing.assert_allclose(theirs.cosine_control, ours.cosine_control, atol=1e-4)


# --- TransformerLens' own rewriting of weights ---


def mixture(name: str) -> ProbedModel:
    kind = {"mixtral": MixtralConfig, "olmoe": OlmoeConfig, "phi3": Phi3Config}[name]
    sizes = {"vocab_size": 56, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
    experts = {} if name == "phi3" else {"num_experts_per_tok": 2}
    module = drawn(AutoModelForCausalLM.from_config(kind(**sizes, **more, **experts, num_key_value_heads=2)))
    return ProbedModel(module, objective="causal")


REWRITTEN = {name: partial(mixture, name) for name in ("mixtral", "olmoe", "phi3")}
REWRITTEN |= {
    "lladamoe-tiny": lambda: load_model(FIXTURES / "lladamoe-tiny", mask_token_id=252),
    "llada2-tiny": lambda: load_model(FIXTURES / "llada2-tiny", mask_token_id=246, block_size="whole"),
    "rope": lambda: radd("rope"),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_folding_and_centring_leave_the_model_as_it_is(name):
    """Experts' weights were folded in place, in the model: its logits moved by 1 and more."""
    model, ids = REWRITTEN[name](), torch.tensor([[3, 7, 9, 12, 30, 8, 40, 44]])
    with torch.no_grad():
        before, held = model.logits(ids), {key: value.clone() for key, value in model.module.state_dict().items()}
        bridge = model.to_bridge()
        shared = {id(p) for p in model.module.parameters()}
        assert shared & {id(p) for p in bridge.parameters()}, "they were shared until now"
        bridge.enable_compatibility_mode()
        bridge.enable_compatibility_mode(no_processing=True)
        assert torch.equal(model.logits(ids), before)
        assert all(torch.equal(value, held[key]) for key, value in model.module.state_dict().items())
        told = getattr(bridge(ids), "logits", bridge(ids)).double().log_softmax(-1) - before.double().log_softmax(-1)
        assert float(told.nan_to_num().abs().max()) < 1e-4  # -inf at RADD's mask token on both sides
    assert not shared & {id(p) for p in bridge.parameters()}
