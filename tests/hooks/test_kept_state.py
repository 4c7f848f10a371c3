"""What a forward pass leaves behind is put back, whatever kind of state it is, and `train()` and `eval()` never run."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

import revprobe as rp
from revprobe.hooks.untouched import modules_of, untouched

PAIRS = rp.ReversalPairs.from_pairs(
    [
        rp.ReversalPair(rp.Query([3, 4, 5, 6], [3], [1]), rp.Query([3, 6, 5, 4], [3], [1]), kind="swapped", fact="a"),
        rp.ReversalPair(rp.Query([7, 8, 9, 2], [3], [1]), rp.Query([7, 2, 9, 8], [3], [1]), kind="swapped", fact="b"),
    ]
)


class Merging(nn.Linear):
    """As loralib: weights are merged by `eval()` and come apart by `train()`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.down, self.up = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(width, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode is self.merged:
            self.weight.data += (-1.0 if mode else 1.0) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, words: Tensor) -> Tensor:
        out = super().forward(words)
        return out if self.merged else out + words @ self.down.T @ self.up.T


class Summing(nn.Module):
    """Left to right: each logit sees the mean of the tokens so far."""

    def __init__(self, mix: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(20, 8), mix or nn.Linear(8, 8), nn.Linear(8, 20)
        self.embed_place = nn.Embedding(12, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        words = self.embed(input_ids)
        words = words + self.embed_place(torch.arange(input_ids.shape[1]).expand_as(input_ids))
        so_far = words.cumsum(1) / torch.arange(1, 1 + input_ids.shape[1])[:, None]
        return self.head(torch.tanh(self.mix(so_far)))


class MergesInEval(Summing):
    """The same by an `eval()` of its own, which does not go through `train()`."""

    def eval(self) -> MergesInEval:
        self.mix.weight.data.mul_(2.0)
        return super().eval()


@pytest.mark.parametrize("kind", [lambda: Summing(Merging(8)), MergesInEval], ids=["train()", "eval()"])
@pytest.mark.parametrize("mode", [True, False])
def test_train_and_eval_of_a_models_own_are_never_run(kind, mode):
    module = kind()
    for part in module.modules():
        part.training = mode
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    model = rp.ProbedModel(module, objective="causal")
    reading = rp.probe_gradient_cosine(model, PAIRS, control=False)
    answers = rp.diagnose(model).probes
    assert answers["probability"] and answers["gradient"]
    assert reading.meta["coverage"]["share"] == 1.0, reading.meta["coverage"]
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert all(part.training is mode for part in module.modules())


def test_a_module_kept_beside_the_children_is_in_eval_mode_too_and_comes_back():
    """A bridge of TransformerLens keeps the original so."""
    module, original = Summing(), nn.Sequential(nn.Dropout())
    vars(module)["original"] = original
    with untouched(module):
        assert not original.training and not original[0].training
    assert original.training and original[0].training and module.training
    assert len(modules_of(module)) == len([*module.modules()]) + 2


def test_weights_that_an_adapter_caches_in_eval_mode_are_not_read_after_training_went_on():
    """DoRA keeps the weight's norm from one pass in eval mode to the next, until `train()`."""
    config = LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    torch.manual_seed(0)
    peft: Any = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"], use_dora=True, r=2))
    for parameter in peft.parameters():
        parameter.data.normal_(std=0.5)
    model = rp.ProbedModel(peft.base_model.model, objective="causal")
    rp.probe_reverse_probability(model, PAIRS, control=False)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora" in name:
                parameter.mul_(3.0)
    anew = rp.ProbedModel(copy.deepcopy(peft.base_model.model), objective="causal")
    again = [rp.probe_reverse_probability(one, PAIRS, control=False).value for one in (model, anew)]
    assert again[0] == again[1]


class Notebook:
    def __init__(self) -> None:
        self.seen, self.table = 0, {"n": [0]}


class Notes(Summing):
    """Writes something into state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Any] = [torch.zeros(2), "text"]
        self.stats = {"n": 0, "inside": {"deep": [0, 0]}}
        self.ordered, self.counts = OrderedDict(a=1, b=2), defaultdict(int, {"x": 1})
        self.last, self.words = deque([1, 2, 3], maxlen=3), {"one"}
        self.output = ModelOutput(logits=torch.zeros(2))
        self.cache, self.array = torch.zeros(4, 12, 8), np.zeros(3)
        self.held = ([torch.zeros(3)], {"kept": torch.full((2,), float("nan"))})
        self.space, self.notebook = SimpleNamespace(n=0, log=[]), Notebook()
        self.config = SimpleNamespace(rope={"factor": 1.0})
        self.draws = (torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("elsewhere", torch.zeros(3))
        self.register_buffer("unset", torch.tensor([float("nan"), 0.0]))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.maps.append(input_ids)
        self.maps[0] += 1
        self.stats["n"] += 1
        self.stats["inside"]["deep"][1] += 1
        self.ordered.move_to_end("a")
        self.counts["y"] += 1
        self.last.append(4)
        self.words.add(str(len(self.words)))
        self.output["logits"] = torch.ones(2)
        self.cache[:1, : input_ids.shape[1]] = 7.0
        self.array += 1
        self.held[0][0].data += 1
        self.held[1]["kept"][0] = 0.0
        self.space.n += 1
        self.space.log.append(1)
        self.notebook.seen += 1
        self.notebook.table["n"].append(1)
        self.config.rope["factor"] = 2.0
        torch.rand(1, generator=self.draws[0]), self.draws[1].random(), self.draws[2].random()
        self.count.data += 1
        self.elsewhere.data = torch.ones(5)
        self.unset.data[1] = 1.0
        return super().forward(input_ids)


def state_of(module: Notes) -> str:
    generators = [module.draws[0].get_state().sum(), module.draws[1].bit_generator.state, module.draws[2].getstate()]
    plain = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "draws"}
    inside = [vars(held) for held in (module.space, module.notebook, module.config)]
    return f"{plain} {inside} {dict(module.named_buffers())} {generators}"


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "tried itself"])
def test_state_written_in_place_is_put_back(monkeypatch, copied):
    if not copied:
        monkeypatch.setattr("revprobe.models.contract.skeleton._copy", lambda module: None)
    module = Notes()
    before, same = state_of(module), {key: id(value) for key, value in vars(module).items()}
    model = rp.ProbedModel(module, objective="causal")
    assert state_of(module) == before
    rp.probe(model, PAIRS, only=["probability", "gradient"])
    assert state_of(module) == before
    assert {key: id(value) for key, value in vars(module).items()} == same
    for _, buffer in module.named_buffers():
        buffer += 1  # still the module's own memory, of its own shape


def test_a_large_vocabulary_takes_the_place_of_no_other_state():
    """Plain entries cost nothing to note; what is walked is bounded by what there is to walk into."""
    module = Summing()
    module.vocabulary = {f"word {n}": n for n in range(150_000)}
    module.tables = [{n: n for n in range(4_000)} for _ in range(30)]
    module.log, module.last = [[]], {"deep": [0]}
    with untouched(module):
        module.log[0].append(1)
        module.last["deep"][0] = 1
        module.tables[29][0] = 7
        del module.vocabulary["word 3"]
    assert (module.log, module.last, module.tables[29][0]) == ([[]], {"deep": [0]}, 0)
    assert list(module.vocabulary)[3] == "word 3"


def test_what_cannot_be_put_back_leaves_nothing_else_behind():
    module, words = Summing(), torch.nn.Parameter(torch.ones(2))
    module.words, module.array, module.log = words, np.zeros(3), []
    words.register_hook(lambda grad: grad * 0)
    module.train()
    with pytest.raises(ValueError, match="read-only"), untouched(module):
        module.array += 1
        module.array.flags.writeable = False
        module.log.append(1)
        words.requires_grad_(False)
        torch.manual_seed(7)
        random.seed(7)
    assert module.training and words.requires_grad and words._backward_hooks and module.log == []


def test_what_was_not_changed_is_not_written_into():
    """Else autograd refuses to go back through a graph that the caller holds."""
    module = Summing()
    module.register_buffer("scale", torch.full((8,), float("nan")))
    words = torch.ones(8, requires_grad=True)
    held = (words * module.scale).sum()
    with untouched(module):
        pass
    held.backward()
    assert words.grad is not None


def test_a_parameter_gets_its_tensor_and_its_place_back():
    module = Summing()
    weight, values = module.mix.weight, module.mix.weight.detach().clone()
    place = weight.data_ptr()
    with untouched(module):
        weight.data = F.normalize(weight.data, dim=-1)
        module.head.weight = nn.Parameter(torch.zeros(20, 8))
    assert weight.data_ptr() == place and torch.equal(weight, values)
    assert module.head.weight.abs().sum() > 0


def test_hooks_on_parameters_change_no_reading_and_stay():
    """A mask of gradients is the training's; a gradient is the loss's own, however its parameter is read."""

    def read(module: nn.Module) -> Any:
        frame = rp.probe_gradient_cosine(rp.ProbedModel(module, objective="causal"), PAIRS, control=False).frame
        return frame.drop(columns="reason", errors="ignore")

    for one_by_one in (False, True):
        module = Summing()
        if one_by_one:
            nn.utils.parametrize.register_parametrization(module.mix, "weight", nn.Tanh())
        plain, called = read(module), []
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient, called=called: called.append(1) or gradient * 0)
        handle = module.head.bias.register_hook(lambda gradient: gradient + 1)
        assert read(module).equals(plain) and not called
        assert rp.diagnose(rp.ProbedModel(module, objective="causal")).probes["gradient"]
        handle.remove()
        module(torch.tensor([[1, 2]])).sum().backward()
        assert len(called) == len([*module.parameters()])
        assert all(float(p.grad.abs().sum()) == 0 for p in module.parameters() if p.grad is not None)
