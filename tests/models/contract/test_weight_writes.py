"""A module that writes into its weights is refused before it has: the weights come out to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import revprobe as rp
from revprobe import RevprobeError


class Words(nn.Module):
    """Tokens mixed by their mean so far; two tables of different lengths, so that it is run to see its vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(20, 8), nn.Embedding(12, 8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 20)
        self.view = self.mix.weight.detach()

    def forward(self, input_ids: Tensor) -> Tensor:
        self.write()
        words = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]).expand_as(input_ids))
        so_far = words.cumsum(1) / torch.arange(1, 1 + input_ids.shape[1])[:, None]
        return self.head(torch.tanh(self.mix(so_far)))

    def write(self) -> None: ...


class Under(Words):
    """Writes as the version counter sees it."""

    @torch.no_grad()
    def write(self) -> None:
        self.mix.weight.mul_(0.5)


class Data(Words):
    def write(self) -> None:
        self.mix.weight.data.mul_(0.5)


class DataCopy(Words):
    def write(self) -> None:
        self.mix.weight.data.copy_(F.normalize(self.mix.weight.data, dim=-1))


class OtherTensor(Words):
    def write(self) -> None:
        self.mix.weight.data = F.normalize(self.mix.weight.data, dim=-1)


class OtherParameter(Words):
    def write(self) -> None:
        self.mix.weight = nn.Parameter(F.normalize(self.mix.weight.detach(), dim=-1))


class View(Words):
    """Through a tensor it keeps, which lies in the weight's memory."""

    def write(self) -> None:
        self.view[0] += 1.0


class Out(Words):
    def write(self) -> None:
        torch.mul(self.mix.weight.data, 0.5, out=self.mix.weight.data)


class ForEach(Words):
    def write(self) -> None:
        torch._foreach_mul_([p.data for p in self.parameters()], 0.5)


class Array(Words):
    """Past torch: an array over the same memory."""

    def write(self) -> None:
        array = self.mix.weight.detach().numpy()
        array *= 0.5


class Renorms(Words):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, max_norm=0.5)


class Catches(Words):
    def write(self) -> None:
        try:
            self.mix.weight.data.mul_(0.5)
        except Exception:
            return


class Once(Words):
    """As RWKV: on the first pass in eval mode, noted in a flag."""

    done = False

    def write(self) -> None:
        if self.training == self.done:
            self.mix.weight.data *= 2.0 if self.training else 0.5
            self.done = not self.training


WRITING = [Under, Data, DataCopy, OtherTensor, OtherParameter, View, Out, ForEach, Array, Renorms, Catches, Once]


def bits(module: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in module.named_parameters()}


def require_same(module: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, parameter in module.named_parameters():
        place, values = before[name]
        assert torch.equal(parameter, values) and parameter.data_ptr() == place, name


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "tried itself"])
@pytest.mark.parametrize("kind", WRITING)
def test_writes_into_weights_are_refused_before_they_are_made(kind, copied, monkeypatch):
    if not copied:
        monkeypatch.setattr("revprobe.models.contract.skeleton._copy", lambda module: None)
    module = kind()
    before = bits(module)
    with pytest.raises(RevprobeError, match=r"writes into its own '(mix|embed|places)\.weight' when it is run"):
        rp.ProbedModel(module, objective="causal")
    require_same(module, before)
    assert torch.equal(module.view, before["mix.weight"][1]) and module.training


def rwkv() -> Any:
    config = transformers.RwkvConfig(
        vocab_size=20, hidden_size=8, attention_hidden_size=8, intermediate_size=8, num_hidden_layers=4, rescale_every=2
    )
    torch.manual_seed(0)
    return transformers.RwkvForCausalLM(config)


@pytest.mark.parametrize("make", [Once, rwkv], ids=["hand-made", "RWKV"])
def test_what_is_written_once_can_be_written_before(make):
    """And is asked again when the model has been trained since: its first pass would write once more."""
    module, ids = make(), torch.tensor([[3, 4, 5]])
    module.eval()
    with torch.no_grad():
        module(ids)
    before = bits(module)
    model = rp.ProbedModel(module, objective="causal")
    one, other = rp.Query([3, 4, 5, 6], [3], [1]), rp.Query([3, 6, 5, 4], [3], [1])
    pairs = rp.ReversalPairs.from_pairs([rp.ReversalPair(one, other, kind="swapped", fact="a")])
    rp.probe_reverse_probability(model, pairs, control=False)
    require_same(module, before)
    module.train()
    module(ids)
    before = bits(module)
    with pytest.raises(RevprobeError, match="writes into its own"):
        rp.probe_reverse_probability(model, pairs, control=False)
    require_same(module, before)


class Same(Words):
    """Gives a weight another tensor of the same values, as quantised layers do."""

    def write(self) -> None:
        self.mix.weight.data = self.mix.weight.data.clone()


class Fills(Words):
    """Writes into fresh tensors, a buffer and a table made at the first pass."""

    table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def write(self) -> None:
        self.count += 1
        if self.table is None:
            self.table = torch.empty(4)
        self.table.fill_(1.0)
        self.mix.weight.detach().clone().mul_(2.0)


class Chooses(Words):
    """Calls an operator on functions, which has no schema."""

    def write(self) -> None:
        torch.cond(self.mix.weight.sum() > 0, torch.sin, torch.cos, (self.mix.weight.detach(),))


class Flexes(Words):
    def write(self) -> None:
        heads = torch.randn(1, 1, 16, 8, generator=torch.Generator().manual_seed(0))
        flex_attention(heads, heads, heads)


@pytest.mark.parametrize("kind", [Words, Same, Fills, Chooses, Flexes])
def test_what_writes_into_no_weight_is_accepted(kind):
    module = kind()
    before = bits(module)
    rp.ProbedModel(module, objective="causal")
    require_same(module, before)


@pytest.mark.parametrize("first", ["wrapped", "run"])
def test_a_compiled_model_is_wrapped_and_stays_compiled(first):
    graphs: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module, ids = Words().eval(), torch.tensor([[3, 4, 5]])
    compiled: Any = torch.compile(module, backend=backend)
    with torch.no_grad():
        if first == "run":
            compiled(ids)
        rp.ProbedModel(compiled, objective="causal")
        graphs.clear()
        torch._dynamo.reset()
        assert torch.equal(compiled(ids), module(ids)) and graphs
