"""A parameter under two paths of one module, and tables that are constants of their model: exact, against autograd."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from revprobe import ProbedModel, Query, ReversalPair, ReversalPairs, RevprobeError, probe_gradient_cosine
from revprobe.hooks.gradients.recorder import record_gradients
from tiny import MASK, SIZES, drawn, language_model, text_like_pairs

WIDTH = 6
TABLES = {"roformer": "roformer.encoder.embed_positions.weight", "marian": "model.decoder.embed_positions.weight"}
SWAPPED = ReversalPairs.from_pairs(
    [ReversalPair(Query([7, 1, 9, 4, 2], [4], [1]), Query([5, 8, 2, 3, 6, 1], [5], [2]), kind="swapped")]
)


class AddsTheBiasOfItsChild(nn.Module):
    """Holds the bias of a layer that it does not call, as MobileBERT's head does."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(WIDTH, 9)
        self.bias = self.decoder.bias
        self.project = nn.Linear(WIDTH, 9, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.project(hidden) + self.decoder.bias


class ScalesByItsGrandchild(nn.Module):
    """The same two levels down, used by both of its names, beside a child of the same weight that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.kept = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH)})
        self.kept["norm"].weight = self.gain
        self.called = nn.LayerNorm(WIDTH)
        self.called.weight = self.gain
        self.out = nn.Linear(WIDTH, 9)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.called(hidden * self.kept["norm"].weight + self.gain.square()))


class CallsAndAdds(nn.Module):
    """Calls its child, and adds the child's bias, its own by another name, once more."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(WIDTH, 9)
        self.bias = self.decoder.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * self.decoder(hidden) + self.decoder.bias


@pytest.mark.parametrize("head", [AddsTheBiasOfItsChild, ScalesByItsGrandchild, CallsAndAdds])
def test_a_parameter_used_through_a_child_that_is_not_called_is_counted(head):
    """The replay put its value in under one path only: the bias had a gradient of exactly zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, WIDTH), head()).double()
    ids = torch.randint(0, 9, (4, 5))
    losses = lambda part: model(ids[part]).log_softmax(-1)[..., 0].square().sum(1)  # noqa: E731
    parameters = dict(model.named_parameters())
    left, right = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    with record_gradients(model, parameters, 4, loss_of=lambda n: losses(slice(n, n + 1))[0]) as recorder:
        found = recorder.backward(losses(slice(None)), left, right).inner
    alone = [torch.autograd.grad(losses(slice(n, n + 1))[0], list(parameters.values()), allow_unused=True)
             for n in range(4)]  # fmt: skip
    for place, name in enumerate(parameters):
        rows = [torch.zeros_like(parameters[name]) if one[place] is None else one[place] for one in alone]
        each = torch.stack([row.flatten() for row in rows])
        torch.testing.assert_close(found[name].double(), (each @ each.T).flatten(), msg=name)


def test_the_bias_of_mobilebert_has_its_gradient():
    """Queries of one length share a batch, which no padding could."""
    sizes = {**SIZES, "intra_bottleneck_size": 32, "embedding_size": 32, "true_hidden_size": 32}
    module = drawn(lambda: language_model(transformers.MobileBertConfig(**sizes), "masked"))
    model = ProbedModel(module, objective="masked", mask_token_id=MASK)
    queries = [Query([7, 1, 9, 4, 2, 6], [1], [4]), Query([5, 2, 8, 3, 1, 0], [4], [1])]
    pairs = ReversalPairs.from_pairs([ReversalPair(*queries)])
    frame = probe_gradient_cosine(model, pairs, control=False).frame.set_index("parameter")
    for query, side in zip(queries, ("forward", "reverse"), strict=True):
        (at,), (target,) = query.target_positions, query.target
        ids = torch.tensor([query.token_ids])
        ids[0, at] = MASK
        loss = -module(input_ids=ids).logits[0, at].log_softmax(-1)[target]
        (bias,) = torch.autograd.grad(loss, [module.cls.predictions.bias])
        assert frame.loc["cls.predictions.bias", f"norm_{side}"] == pytest.approx(float(bias.norm()), rel=1e-5)


def wrapped(kind: str) -> ProbedModel:
    if kind == "roformer":
        module = drawn(lambda: language_model(transformers.RoFormerConfig(**SIZES), "masked"))
        return ProbedModel(module, objective="masked", mask_token_id=MASK)
    config = transformers.MarianConfig(d_model=32, encoder_layers=1, decoder_layers=2, decoder_attention_heads=4,
        vocab_size=56, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=55, eos_token_id=54)  # fmt: skip
    return ProbedModel(drawn(lambda: transformers.MarianForCausalLM(config)), objective="causal")


@pytest.mark.parametrize("kind", ["roformer", "marian"])
def test_a_frozen_table_of_positions_is_a_constant_and_the_reading_says_so(kind):
    """Sines and cosines looked up without gradient: the whole model was refused for them."""
    model = wrapped(kind)
    pairs = SWAPPED if model.objective == "causal" else text_like_pairs()
    reading = probe_gradient_cosine(model, pairs, control=False)
    (names,) = reading.meta["coverage"]["not_covered"].values()  # Marian has cross attention, which is not used
    assert [name for name in names if "encoder_attn" not in name] == [TABLES[kind]]
    assert list(reading.meta["coverage"]["not_covered"]) == ["does not reach the loss"]


def test_a_table_that_is_trained_but_runs_without_gradient_is_still_refused():
    """Only what was frozen is taken for a constant."""
    model = wrapped("marian")
    model.module.model.decoder.embed_positions.weight.requires_grad_(True)
    with pytest.raises(RevprobeError, match=r"embed_positions.*runs without gradient"):
        probe_gradient_cosine(model, SWAPPED, control=False)
