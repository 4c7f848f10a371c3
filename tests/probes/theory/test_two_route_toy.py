"""Prop. C.1: the closed forms against autograd, with a rotation of our own and with the models' own attention."""

import math
from functools import partial

import pytest
import torch
import transformers as tf
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import tiny
from revprobe import ProbedModel, RevprobeError, TwoRouteToy, one_layer_gpt2

radd = partial(tiny.radd, scale=0.4)  # far from the initial weights, so that no term is lost in rounding

TOKENS = {"target": 3, "evidence": 30, "mask": 53}


# --- slow references ------------------------------------------------------------------------------------------------


def toy_loss(weights: dict[str, torch.Tensor], encoding: str, turn: float, slope: float) -> torch.Tensor:
    """The toy's loss in torch, straight from its definition, with complex numbers for the rotation."""
    query, key = weights["W_Q"] @ weights["E"][TOKENS["mask"]], weights["W_K"] @ weights["E"][TOKENS["evidence"]]
    half = len(query) // 2
    if encoding == "rope":
        angle = turn * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        as_complex = torch.complex(key[:half], key[half:]) * torch.polar(torch.ones_like(angle), angle)
        key = torch.cat([as_complex.real, as_complex.imag])
    score = query @ key / math.sqrt(len(query)) - slope * abs(turn)
    logits = score.sigmoid() * (weights["W_U"] @ weights["W_V"] @ weights["E"][TOKENS["evidence"]])
    clean = torch.arange(len(logits)) != TOKENS["mask"]
    return logits[clean].logsumexp(0) - logits[TOKENS["target"]]


def toy_weights(model: ProbedModel) -> dict[str, torch.Tensor]:
    found = {name: p.detach().double() for name, p in model.module.named_parameters()}
    attention = {letter: found[f"blocks.0.attention.{letter}_proj.weight"] for letter in "qkvo"}
    weights = {"W_U": found["lm_head.weight"], "W_V": attention["o"] @ attention["v"]}
    weights |= {"W_Q": attention["q"], "W_K": attention["k"], "E": found["embed_tokens.weight"]}
    return {name: weight.clone().requires_grad_() for name, weight in weights.items()}


@pytest.mark.parametrize(("encoding", "slope"), [("rope", 0.0), ("alibi", 0.25)])
@pytest.mark.parametrize(("forward", "reverse"), [(3, 3), (2, 11)])
def test_the_terms_of_prop_c1_are_autograds_inner_products(encoding, slope, forward, reverse) -> None:
    """Each matrix of a real model, and the two columns of E; wrong signs of the rotation move W_Q, W_K and E."""
    model = radd(encoding)
    weights = toy_weights(model)
    sides = [
        dict(
            zip(
                weights,
                torch.autograd.grad(toy_loss(weights, encoding, turn, slope), list(weights.values())),
                strict=True,
            )
        )
        for turn in (forward, -reverse)
    ]
    toy = TwoRouteToy.from_model(model, slope=slope)
    terms = toy.gradient_terms(**TOKENS, distance_forward=forward, distance_reverse=reverse)
    by_parameter = terms.groupby("parameter")["inner"].sum()
    for name in weights:
        slow = float((sides[0][name] * sides[1][name]).sum())
        assert by_parameter[name] == pytest.approx(slow, rel=1e-9), f"{name} of {encoding}"
    column = terms.query("part == 'mask'")["inner"].item()
    slow = float(sides[0]["E"][TOKENS["mask"]] @ sides[1]["E"][TOKENS["mask"]])
    assert column == pytest.approx(slow, rel=1e-9), "the mask's column is the query path alone"
    assert terms["inner"].abs().min() > 1e-8, "a term that vanishes would pass any sign"


class _ScoreSeen(TorchFunctionMode):
    """Query and key as an attention module hands them to SDPA, with their graph."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.query, self.key = args[0], args[1]
        return func(*args, **(kwargs or {}))


def loss_through_the_model(module: torch.nn.Module, turn: int) -> torch.Tensor:
    """The toy's loss with the score of the model's own attention: mask at position 30, evidence `turn` after it."""
    layer, weights = module.model.layers[0].self_attn, dict(module.named_parameters())
    embedding = weights["model.embed_tokens.weight"]
    hidden = embedding[[TOKENS["mask"], TOKENS["evidence"]]][None]
    angles = module.model.rotary_emb(hidden, torch.tensor([[30, 30 + turn]]))
    with _ScoreSeen() as seen:
        layer(hidden_states=hidden, position_embeddings=angles, attention_mask=None)
    score = seen.query[0, 0, 0] @ seen.key[0, 0, 1] / math.sqrt(seen.query.shape[-1])
    out = layer.dense if hasattr(layer, "dense") else layer.o_proj
    value = out.weight @ layer.v_proj.weight @ embedding[TOKENS["evidence"]]
    logits = score.sigmoid() * (weights["lm_head.weight"] @ value)
    clean = torch.arange(len(logits)) != TOKENS["mask"]
    return logits[clean].logsumexp(0) - logits[TOKENS["target"]]


SIZES = {"vocab_size": 56, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
HALF, QUARTER = (
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}}
    for part in (0.5, 0.25)
)
FAMILIES = {
    "phi, half the head": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZES, **HALF)),
    "stablelm, a quarter": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**SIZES, **QUARTER)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "cohere, neighbouring entries": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SIZES)),
}


def one_layer(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    module = FAMILIES[family]().eval()
    for parameter in module.parameters():
        if parameter.dim() == 2:  # biases stay at zero: the proposition has none
            parameter.data += 0.4 * torch.randn_like(parameter)
    return module.double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("forward", "reverse"), [(3, 3), (2, 11)])
def test_the_terms_are_those_of_the_models_own_rotation(family, forward, reverse) -> None:
    """Partial and interleaved rotary: planes paired otherwise than in the model move W_Q by six per cent on Phi."""
    module = one_layer(family)
    names = {"W_U": "lm_head", "W_Q": "q_proj", "W_K": "k_proj", "E": "embed_tokens"}
    weights = {
        short: parameter
        for short, part in names.items()
        for name, parameter in module.named_parameters()
        if f"{part}.weight" in name
    }
    sides = [
        torch.autograd.grad(loss_through_the_model(module, turn), list(weights.values()))
        for turn in (forward, -reverse)
    ]
    toy = TwoRouteToy.from_model(ProbedModel(module, objective="causal"))
    terms = toy.gradient_terms(**TOKENS, distance_forward=forward, distance_reverse=reverse)
    by_parameter = terms.groupby("parameter")["inner"].sum()
    for name, left, right in zip(weights, *sides, strict=True):
        slow = float((left * right).sum())
        assert by_parameter[name] == pytest.approx(slow, rel=1e-4), f"{name} of {family}"
        assert abs(slow) > 1e-8, "a term that vanishes would pass any rotation"


def test_a_slope_for_a_model_that_rotates_is_refused() -> None:
    """It would be taken off a score that has no such bias."""
    with pytest.raises(RevprobeError, match=r"slope=0\.5: .* turns its queries and has no ALiBi bias"):
        TwoRouteToy.from_model(radd(), slope=0.5)
    with pytest.raises(RevprobeError, match="slope nan"):
        TwoRouteToy.from_model(radd("alibi"), slope=math.nan)


def test_a_finite_difference_sees_the_same_gain() -> None:
    """One entry of W_Q moved by hand: the autograd reference itself is right."""
    weights = toy_weights(radd())
    (gradient,) = torch.autograd.grad(toy_loss(weights, "rope", 4, 0.0), [weights["W_Q"]])
    losses = []
    for step in (1e-6, -1e-6):
        moved = {name: weight.detach().clone() for name, weight in weights.items()}
        moved["W_Q"][2, 5] += step
        losses.append(float(toy_loss(moved, "rope", 4, 0.0)))
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(gradient[2, 5]), rel=1e-5)


def test_alibi_routes_align_exactly_and_storage_always() -> None:
    """W_U's term is positive by algebra; ALiBi's W_Q and W_K terms have the sign of the product of gains."""
    toy = TwoRouteToy.from_model(radd("alibi"), slope=0.25)
    terms = toy.gradient_terms(**TOKENS, distance_forward=2, distance_reverse=9).set_index(["parameter", "part"])[
        "inner"
    ]
    assert terms["W_U", ""] > 0 and terms["W_V", ""] > 0
    query, key = toy.query @ toy.embedding[TOKENS["mask"]], toy.key @ toy.embedding[TOKENS["evidence"]]
    e_u, e_m = toy.embedding[TOKENS["evidence"]], toy.embedding[TOKENS["mask"]]
    expected = (key @ key) * (e_m @ e_m) / ((query @ query) * (e_u @ e_u))
    assert terms["W_Q", ""] / terms["W_K", ""] == pytest.approx(expected), "R is the identity for ALiBi"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: radd(n_layers=2), "one attention layer of one head"),
        (lambda: radd(n_heads=2), "one attention layer of one head"),
        (lambda: radd("absolute"), "needs RoPE, ALiBi or no position"),
        (lambda: radd("scalar"), r"adds a learned bias to its scores \(embed_offsets.weight\)"),
        (lambda: ProbedModel(one_layer_gpt2(), objective="causal"), "needs RoPE, ALiBi or no position"),
    ],
)
def test_models_outside_the_proposition_are_refused(model, words: str) -> None:
    """A slope of 0, the advice for models without a rotation, does not get them past it."""
    for slope in (None, 0.0):
        with pytest.raises(RevprobeError, match=words):
            TwoRouteToy.from_model(model(), slope=slope)


def test_an_alibi_model_must_name_its_slope() -> None:
    """No parameter holds it, and a slope of 0 taken for granted would be a wrong number."""
    with pytest.raises(RevprobeError, match="pass slope="):
        TwoRouteToy.from_model(radd("alibi"))


def test_tokens_outside_the_tables_are_refused() -> None:
    toy = TwoRouteToy.from_model(radd())
    with pytest.raises(RevprobeError, match="target token 99: expected 0 to 55"):
        toy.gradient_terms(target=99, evidence=1, mask=53, distance_forward=1, distance_reverse=1)
    for wrong in (math.nan, -1, math.inf):
        with pytest.raises(RevprobeError, match=f"distance_reverse {float(wrong)}: expected finite numbers"):
            toy.gradient_terms(**TOKENS, distance_forward=1, distance_reverse=wrong)
    with pytest.raises(RevprobeError, match="mask token 53 is also target or evidence"):
        toy.gradient_terms(target=1, evidence=53, mask=53, distance_forward=1, distance_reverse=1)
