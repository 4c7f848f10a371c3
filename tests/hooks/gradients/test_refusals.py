"""What the gradient engine must not get wrong silently: each is exact or an error that names the module.

Every model here gave wrong numbers without a word at some time, or would if a check were left out.
"""

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from plain_gradients import worst_product_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revprobe import ProbedModel, Query, ReversalPair, ReversalPairs, RevprobeError, probe_gradient_cosine
from revprobe.hooks.gradients import graph as gradient_graph
from revprobe.hooks.gradients import recorder as gradients
from revprobe.hooks.gradients import rules as gradient_rules
from revprobe.hooks.gradients.order import Order
from revprobe.hooks.gradients.recorder import record_gradients

WIDTH, SEQ = 6, 7


class Base(nn.Module):
    """Embedding, a layer, a norm, a head; subclasses put one difficulty between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.norm = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(ids)))

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(self.layer(hidden).cumsum(1).tanh())


def worst_error(
    module: nn.Module,
    *,
    batch: int = 5,
    only: tuple[str, ...] = (),
    one_by_one: bool = False,
    unread: dict[str, str] | None = None,
) -> float:
    """The largest error of any inner product, as a share of the whole gradients' norms, in float64.

    Args:
        one_by_one: whether the recorder may run examples by themselves for what the batch does not tell apart; `unread`
            then names those parameters.
    """
    module = module.double()
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 9, (batch, SEQ), generator=generator)
    weights = torch.rand(batch, SEQ, 9, generator=generator).double()

    def loss(part: slice) -> Tensor:
        return (module(ids[part]).log_softmax(-1) * weights[part]).sum((1, 2))

    parameters = {n: p for n, p in module.named_parameters() if not only or n in only}
    return worst_product_error(module, parameters, loss, batch, one_by_one=one_by_one, unread=unread)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- hooks and forwards of others -----------------------------------------------------------------------------------


def test_a_hook_that_changes_a_modules_output_comes_after_the_module():
    """Its factor belongs to what follows: recorded after it, the layer's gradient would be a third of the true one."""
    for name in ("layer", "norm"):
        module = Base()
        module.get_submodule(name).register_forward_hook(lambda m, args, output: output * 3)
        assert worst_error(module) < 1e-10


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gain


def test_a_hook_that_changes_a_replayed_modules_input_is_refused():
    """Run again on what it was given, the module would see the change twice."""
    module = Base()
    module.norm = Gain()
    module.norm.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    with pytest.raises(RevprobeError, match=r"of a Gain cannot be split .* run again it gives other outputs"):
        worst_error(module)
    module = Base()
    module.layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    assert worst_error(module) < 1e-10, "a rule runs nothing again"


def test_a_forward_put_on_the_instance_and_a_normed_weight_are_replayed():
    """Their type is Linear's, what they compute is not."""
    module = Base()
    plain = module.layer.forward
    module.layer.forward = lambda hidden: 2 * plain(hidden)
    assert worst_error(module) < 1e-10
    with pytest.warns(FutureWarning):
        module = Base()
        nn.utils.weight_norm(module.layer)
    assert {"layer.weight_g", "layer.weight_v"} <= set(dict(module.named_parameters()))
    assert worst_error(module) < 1e-10


# --- uses that no call covers ---------------------------------------------------------------------------------------


class OneCallUnused(Base):
    """Two calls, one of them for nothing, and one use outside: as many edges as calls."""

    def middle(self, hidden: Tensor) -> Tensor:
        self.layer(hidden)
        return self.norm(self.layer(hidden).tanh() @ self.layer.weight)


class Opaque(Base):
    """Its module returns an object that hides the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Boxing()

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(self.box(self.layer(hidden)).hidden)


class Boxing(Gain):
    def forward(self, hidden: Tensor) -> SimpleNamespace:
        return SimpleNamespace(hidden=super().forward(hidden))


class InPlace(Base):
    """Its own gradient is fine with autograd; at the module's output it is no more to be had."""

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(nn.functional.relu(self.layer(hidden), inplace=True))


class UsedThenOverwritten(Base):
    """Autograd sees both uses; past the overwritten view only the first comes by the place the module left it at."""

    def middle(self, hidden: Tensor) -> Tensor:
        hidden = self.layer(hidden)
        early = hidden.tanh()
        return self.norm(hidden.relu_() + early)


class PartlyOverwritten(Base):
    def middle(self, hidden: Tensor) -> Tensor:
        hidden = self.layer(hidden)
        total = hidden.sum(-1, keepdim=True)
        hidden[:, 0] = 0
        return self.norm(hidden + total)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (UsedThenOverwritten, r"output of module 'layer' is overwritten in place, so the gradient of 'layer.weight'"),
        (PartlyOverwritten, r"output of module 'layer' is overwritten in place, so the gradient of 'layer.weight'"),
        (OneCallUnused, r"'layer.weight' reaches the loss 2 times, but only 1 calls .* used outside its module"),
        (Opaque, r"'box.gain' reaches the loss 1 times, but only 0 calls"),
        (InPlace, r"output of module 'layer' is overwritten in place, so the gradient of 'layer.weight' is lost"),
    ],
)
def test_a_use_that_no_recorded_call_covers_is_refused(kind, message, monkeypatch):
    with pytest.raises(RevprobeError, match=message):
        worst_error(kind())
    unread: dict[str, str] = {}
    assert worst_error(kind(), one_by_one=True, unread=unread) < 1e-10
    culprit = "box" if kind is Opaque else "layer"
    assert set(unread) <= {f"{culprit}.{key}" for key in ("weight", "bias", "gain")}
    assert any(re.search(message, why) for why in unread.values())
    plain = gradients.completeness
    monkeypatch.setattr(gradients, "completeness", lambda *given: plain(*given)._replace(unread={}))
    assert worst_error(kind()) > 1e-3, "without the check the numbers are wrong"


class InputOverwritten(Base):
    def middle(self, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        return self.norm(hidden.add_(self.layer(hidden)))


class IdsOverwritten(Base):
    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.clone()
        hidden = self.embed(ids)
        ids.fill_(3)
        return self.head(self.middle(hidden))


@pytest.mark.parametrize(
    ("kind", "only", "name"),
    [(InputOverwritten, {"layer.weight", "layer.bias", "head.weight"}, "layer"), (IdsOverwritten, None, "embed")],
)
def test_an_input_overwritten_in_place_is_refused(kind, only, name):
    """Where the module lies innermost autograd does not look at its input any more, and cannot notice."""
    with pytest.raises(RevprobeError, match=f"the input of module '{name}' was overwritten in place"):
        worst_error(kind(), only=only)
    with pytest.raises(RevprobeError, match=rf"autograd gives no gradient of '{name}.weight'.* parameters="):
        worst_error(kind(), only=only, one_by_one=True)


class BareKeyBias(nn.Module):
    """Attention of bare parameters: replayed as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.key_bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return ((hidden @ self.query) @ (hidden @ self.key + self.key_bias).mT / 3).softmax(-1) @ hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_replayed_gradient_that_is_zero_in_theory_is_below_its_floor(dtype):
    """Softmax ignores a constant added to all scores of a row: what is left of the key bias' gradient is rounding."""
    module = nn.Sequential(nn.Embedding(9, WIDTH), BareKeyBias()).to(dtype)
    ids, every = torch.randint(0, 9, (6, 12)), torch.arange(6)
    with record_gradients(module, dict(module.named_parameters()), 6) as recorder:
        squares, floor = recorder.backward(module(ids).square().sum((1, 2)), every, every)
    norm = {name: square.clamp(min=0).sqrt() for name, square in squares.items()}
    assert (norm["1.key_bias"] <= floor["1.key_bias"]).all()
    assert (norm["1.key"] > 100 * floor["1.key"]).all() and (norm["1.query"] > 100 * floor["1.query"]).all()


def test_an_output_overwritten_in_place_is_exact_where_autograd_keeps_its_place():
    """Without a bias the layer's output is no view: the gradient is asked for where the module left it."""
    module = InPlace()
    module.layer = nn.Linear(WIDTH, WIDTH, bias=False)
    assert worst_error(module) < 1e-10


def test_a_weight_used_by_the_parent_of_its_module_is_exact():
    """Qwen3.5's linear attention passes conv1d.weight to a kernel without calling conv1d: the parent answers for it."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4}
    config = transformers.Qwen3_5TextConfig(
        vocab_size=60, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=24,
        num_hidden_layers=4, linear_value_head_dim=4, **heads,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ProbedModel(transformers.AutoModelForCausalLM.from_config(config).eval(), objective="causal")
    pairs = some_pairs()
    frame = probe_gradient_cosine(model, pairs, control=False).frame
    query = pairs[0].forward
    logits = model.module(torch.tensor([query.token_ids])).logits[0, query.target_positions[0] - 1]
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor(query.target[:1]))
    named = dict(model.module.named_parameters())
    norms = frame[frame.pair == 0].set_index("parameter").norm_forward
    assert len(query.target) == 1 and any("conv1d" in name for name in named)
    for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        assert norms[name] == pytest.approx(float(gradient.norm()), rel=1e-3, abs=1e-6), name


def test_a_weight_used_by_somebody_elses_module_is_read_one_query_at_a_time():
    """The store is never called and its user keeps the bare tensor: no enclosing module answers for it truly."""

    class User(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.__dict__["kept"] = [weight]

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.kept[0].T

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.store = nn.Embedding(60, 8), nn.Linear(8, 60, bias=False)
            self.user = User(self.store.weight)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embed(ids)
            return self.user(hidden + hidden.mean(1, keepdim=True))

    model = ProbedModel(Model(), objective="masked", mask_token_id=59, logit_shift=0)
    reading = probe_gradient_cosine(model, some_pairs(), control=False)
    assert list(reading.meta["one_by_one"]) == ["store.weight"]
    assert "its weight is used outside its module" in reading.meta["one_by_one"]["store.weight"]
    query = some_pairs()[1].reverse
    logits = model.module(torch.tensor([[*query.token_ids[:3], 59]]))[0, 3]
    (gradient,) = torch.autograd.grad(-logits.log_softmax(-1)[query.target[0]], [model.module.store.weight])
    rows = reading.frame[(reading.frame.pair == 1) & (reading.frame.parameter == "store.weight")]
    assert rows.norm_reverse.item() == pytest.approx(float(gradient.norm()), rel=1e-5)


def some_pairs() -> ReversalPairs:
    pairs = [ReversalPair(Query([n, 5, 6, 7], [3], [1]), Query([n, 6, 5, 7], [3], [2]), fact=str(n)) for n in (1, 2)]
    return ReversalPairs.from_pairs(pairs)


# --- examples that are not told apart -------------------------------------------------------------------------------


class FlatPositions(Base):
    """Positions without a batch axis, as in nanoGPT: (seq, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(SEQ, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(ids) + self.positions(torch.arange(ids.shape[1]))))


class RelativeBias(Base):
    """A bias for each row and column, as in T5: (seq, seq, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(2 * SEQ, 1)

    def middle(self, hidden: Tensor) -> Tensor:
        place = torch.arange(hidden.shape[1])
        scores = self.bias(place[:, None] - place + SEQ)[..., 0]
        return self.norm(self.layer(scores.softmax(-1) @ hidden).tanh())


@pytest.mark.parametrize("batch", [SEQ, 5], ids=["as many as positions", "fewer"])
def test_a_table_without_a_batch_is_refused_or_read_one_example_at_a_time(batch, monkeypatch):
    message = r"module 'bias' \(Embedding\) gives .* its gradients cannot be told apart"
    with pytest.raises(RevprobeError, match=message):
        worst_error(RelativeBias(), batch=batch)
    unread: dict[str, str] = {}
    assert worst_error(RelativeBias(), batch=batch, one_by_one=True, unread=unread) < 1e-10
    assert list(unread) == ["bias.weight"] and re.search(message, unread["bias.weight"])
    if batch == SEQ:
        monkeypatch.setattr(gradients, "find_order", lambda *_: Order(batch))
        assert worst_error(RelativeBias(), batch=batch) > 1e-3, "without the check the numbers are wrong"


@pytest.mark.parametrize("batch", [SEQ, 5, 1])
def test_positions_without_a_batch_are_told_apart_where_they_are_added(batch):
    assert worst_error(FlatPositions(), batch=batch) < 1e-10
    assert worst_error(FlatPositions(), batch=batch, only=("positions.weight",)) < 1e-10


def test_as_many_examples_as_positions_are_fine_where_the_batch_is_first():
    assert worst_error(Base(), batch=SEQ) < 1e-10


# --- cut off from the loss ------------------------------------------------------------------------------------------


class Deep(Base):
    """Four blocks; one of them may be cut off from what is below it, inside or before the module."""

    def __init__(self, cut: int, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cutting(how == "inside" and n == cut) for n in range(4))
        self.cut, self.how = cut, how

    def middle(self, hidden: Tensor) -> Tensor:
        for n, block in enumerate(self.blocks):
            hidden = hidden.detach() if n == self.cut and self.how == "before" else hidden
            with torch.set_grad_enabled(not (n == self.cut and self.how == "no_grad")):
                hidden = block(hidden).tanh()
        return self.norm(self.layer(hidden))


class Cutting(nn.Linear):
    def __init__(self, cuts: bool) -> None:
        super().__init__(WIDTH, WIDTH)
        self.cuts = cuts

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.detach() if self.cuts else hidden)


@pytest.mark.parametrize("how", ["before", "inside"])
def test_a_detach_in_the_middle_is_an_error_that_names_where(how):
    """Autograd would give the modules below no gradient at all (None); left out, the rest is exact."""
    with pytest.raises(
        RevprobeError, match=r"'embed' ran, .* does not reach the loss: module 'blocks.2' detaches its input"
    ):
        worst_error(Deep(2, how))
    with pytest.raises(RevprobeError, match=r"module 'blocks.1' ran, .*module 'blocks.2' detaches its input"):
        worst_error(Deep(2, how), only=("blocks.1.weight", "blocks.2.weight"))
    above = ("blocks.2.weight", "blocks.2.bias", "blocks.3.weight", "layer.weight", "norm.weight", "head.bias")
    assert worst_error(Deep(2, how), only=above) < 1e-10


def test_a_module_that_runs_without_gradient_is_an_error_that_names_it():
    with pytest.raises(RevprobeError, match=r"module 'blocks.2' ran, .* runs without gradient"):
        worst_error(Deep(2, "no_grad"), only=("blocks.2.weight", "blocks.3.weight"))

    class Reentrant(Base):
        def middle(self, hidden: Tensor) -> Tensor:
            return checkpoint(super().middle, hidden, use_reentrant=True)

    with pytest.raises(RevprobeError, match=r"module 'layer' ran, .* runs without gradient"):
        worst_error(Reentrant(), only=("layer.weight", "head.weight"))


def test_a_tied_weight_keeps_the_use_that_autograd_keeps():
    """The embedding runs without gradient, the head with: half of the weight's uses count, as in autograd."""

    class HalfTied(Base):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self.embed(ids)
            return self.head(self.middle(hidden))

    assert worst_error(HalfTied()) < 1e-10


def test_a_loss_that_reaches_no_selected_parameter_is_refused():
    module = Base()
    with record_gradients(module, {"layer.weight": module.layer.weight}, 2) as recorder:
        hidden = module.embed(torch.zeros(2, 3, dtype=torch.long))
        with pytest.raises(RevprobeError, match="none of the selected parameters: no module of them ran"):
            recorder.backward(module.head(hidden).sum((1, 2)), torch.tensor([0]), torch.tensor([1]))
    model = ProbedModel(FrozenInside(), objective="causal")
    with pytest.raises(RevprobeError, match="parameters: module 'embed' ran, but is detached"):
        probe_gradient_cosine(model, some_pairs())


class FrozenInside(Base):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.embed(ids)
            return self.head(self.norm(self.layer(hidden.cumsum(1))))


# --- not finite -----------------------------------------------------------------------------------------------------


class Overflowing(Base):
    """The gradient turns infinite between the layer and the norm: sqrt at zero."""

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + (self.layer(hidden) * 0.0).abs().sqrt())


def test_a_gradient_that_is_not_finite_names_the_module_where_it_starts():
    """Everything below inherits it: the embedding, first in the model, is not to blame."""
    with pytest.raises(RevprobeError, match=r"gradient at module 'layer' is not finite"):
        worst_error(Overflowing())


def test_an_input_that_is_not_finite_names_its_module():
    class Diverging(Base):
        def middle(self, hidden: Tensor) -> Tensor:
            return self.norm(self.layer(hidden / 0.0).clamp(-1, 1).nan_to_num())

    with pytest.raises(RevprobeError, match=r"module 'layer' is not finite"):
        worst_error(Diverging(), only=("layer.weight", "head.weight"))


# --- the self-check of replays --------------------------------------------------------------------------------------


def planted(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[..., Callable[..., dict[str, Tensor]]]:
    """A vmap whose result is changed, as a kernel that it batches wrongly would."""

    def wrong(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        return lambda *inputs: change(torch.vmap(function)(*inputs))

    return wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda grads: {key: g * 1.01 for key, g in grads.items()},
        lambda grads: {key: g.sum(0, keepdim=True).expand_as(g) for key, g in grads.items()},
        lambda grads: {key: torch.zeros_like(g) for key, g in grads.items()},
        lambda grads: {key: g * (torch.arange(len(g)) > 0)[:, None] for key, g in grads.items()},
    ],
    ids=["1 % off", "summed over the batch", "zero", "one example lost"],
)
def test_a_wrong_replay_is_seen(change, monkeypatch):
    monkeypatch.setattr(gradient_rules, "vmap", planted(change))
    with pytest.raises(RevprobeError, match=r"of a LayerNorm cannot be split .* do not add up to the batch's"):
        worst_error(Base())
    monkeypatch.setattr(gradient_rules, "_check_replay", lambda *_: None)
    assert worst_error(Base()) > 1e-5, "without the check the numbers are wrong"


def test_a_right_replay_passes_the_same_check():
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        plain = gradient_rules._check_replay
        patch.setattr(gradient_rules, "_check_replay", lambda *given: calls.append(given) or plain(*given))
        assert worst_error(Base()) < 1e-10
    assert [type(given[0].module) for given in calls] == [nn.LayerNorm]


def test_the_graph_walk_finds_every_edge_between_a_modules_inputs_and_outputs():
    """By hand: x w + w has two edges into w; behind the input lies one more, which the walk leaves to others."""
    weight, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    given = other * weight
    output = given * weight + weight
    inside = gradient_graph.reach([output.grad_fn], [given.grad_fn]).edges
    assert len(inside[id(weight)]) == 2 and id(other) not in inside
    assert len(gradient_graph.reach([output.grad_fn]).edges[id(weight)]) == 3
