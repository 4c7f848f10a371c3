"""Per-example gradient products equal those of autograd, one example at a time; faults turn this red."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from revprobe import RaddConfig, RaddForMaskedLM, RevprobeError, one_layer_gpt2
from revprobe.hooks.gradients import backward as gradient_reading
from revprobe.hooks.gradients import products as gradient_products
from revprobe.hooks.gradients.recorder import record_gradients
from revprobe.models.bases.configs import POSITION_ENCODINGS
from tiny import drawn

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PAIR = (torch.tensor([0]), torch.tensor([1]))


def worst_error(model: nn.Module, per_example_loss, batch: int) -> float:
    """Largest error of any inner product, as a share of the two whole gradients' norms."""
    parameters = dict(model.named_parameters())
    left, right = torch.cartesian_prod(torch.arange(batch), torch.arange(batch)).T
    with record_gradients(model, parameters, batch) as recorder:
        products = recorder.backward(per_example_loss(slice(None)), left, right).inner
    naive = []
    for example in range(batch):
        loss = per_example_loss(slice(example, example + 1)).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        naive.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters.values(), strict=True)])
    whole = torch.stack([torch.cat([g.flatten() for g in grads]).norm() for grads in naive])
    errors = []
    for k, name in enumerate(parameters):
        stacked = torch.stack([grads[k].flatten() for grads in naive])
        true = (stacked @ stacked.T).flatten()
        errors.append(((products[name] - true).abs() / (whole[left] * whole[right])).max())
    return float(torch.stack(errors).max().detach())


def language_model_loss(model: nn.Module, *, batch: int = 5, seq: int = 7, padded: bool = False):
    """Cross-entropy at one random readout row per example."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 56, (batch, seq), generator=generator)
    lengths = torch.randint(3, seq + 1, (batch,), generator=generator) if padded else torch.full((batch,), seq)
    mask = (torch.arange(seq) < lengths[:, None]).long()
    rows, targets = lengths - 2, torch.randint(0, 50, (batch,), generator=generator)

    def loss(part: slice) -> Tensor:
        logits = model(input_ids=ids[part], attention_mask=mask[part]).logits
        return F.cross_entropy(logits[torch.arange(len(logits)), rows[part]], targets[part], reduction="none")

    return loss


MODELS = {
    **{
        e: (lambda e=e: RaddForMaskedLM(RaddConfig(position_encoding=e, n_layers=2, n_heads=2, d_model=16)))
        for e in POSITION_ENCODINGS
    },
    "gpt2 (tied, Conv1D)": lambda: one_layer_gpt2(n_layers=2, n_heads=2, d_model=16),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_products_equal_autograd_over_all_parameters(name, padded, dtype):
    model = drawn(MODELS[name], dtype=dtype)
    assert worst_error(model, language_model_loss(model, padded=padded), 5) < TOLERANCE[dtype]


class SharedAndBare(nn.Module):
    """A layer called twice, an embedding with a padding id, a tied unembedding, and a module with a bare parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width, padding_idx=0)
        self.layer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.inner = Scaled(width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layer(self.layer(self.embed(ids)).tanh()).tanh()
        return self.head(self.norm(self.inner(hidden)))


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale + self.scale.square()


@given(width=st.integers(1, 9), seq=st.integers(1, 6), batch=st.integers(2, 5), seed=st.integers(0, 10_000))
def test_shared_layers_padding_ids_ties_and_bare_parameters_are_exact(width, seq, batch, seed):
    torch.manual_seed(seed)
    model = SharedAndBare(width).double()
    ids, weights = torch.randint(0, 9, (batch, seq)), torch.rand(batch, seq, 9, dtype=torch.float64)

    def loss(part: slice) -> Tensor:
        return (model(ids[part]).log_softmax(-1) * weights[part]).sum((1, 2))

    assert worst_error(model, loss, batch) < 1e-10


def recorded_products(model: nn.Module, loss, batch: int) -> dict[str, Tensor]:
    every = torch.arange(batch)
    with record_gradients(model, dict(model.named_parameters()), batch) as recorder:
        return recorder.backward(loss(slice(None)), every, every.roll(1)).inner


def test_both_ways_of_multiplying_agree(monkeypatch):
    """Gram matrices and formed gradients are two routes to one number."""
    model = MODELS["rope"]().double().eval()
    loss = language_model_loss(model)
    results = []
    for forming in (True, False):
        monkeypatch.setattr(gradient_products, "_forming_is_cheaper", lambda *_, forming=forming: forming)
        results.append(recorded_products(model, loss, 5))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-14, rtol=1e-9)


@pytest.mark.parametrize("forming", [False, True])
def test_slices_of_any_size_give_the_same_products(forming, monkeypatch):
    model = MODELS["rope"]().double().eval()
    loss = language_model_loss(model)
    monkeypatch.setattr(gradient_products, "_forming_is_cheaper", lambda *_: forming)
    whole = recorded_products(model, loss, 5)
    monkeypatch.setattr(gradient_products, "_CHUNK", 150)
    sliced = recorded_products(model, loss, 5)
    for name in whole:
        torch.testing.assert_close(sliced[name], whole[name], atol=1e-14, rtol=1e-9)


def test_dropping_the_cross_terms_of_a_tied_weight_is_noticed(monkeypatch):
    """Planted fault: the embedding-unembedding cross terms left out."""
    true_cross = gradient_products._cross
    monkeypatch.setattr(gradient_products, "_cross", lambda a, b, *rest: true_cross(a, b, *rest) * (type(a) is type(b)))
    model = MODELS["gpt2 (tied, Conv1D)"]().double().eval()
    assert worst_error(model, language_model_loss(model), 5) > 1e-6


@pytest.mark.parametrize("forming", [False, True])
def test_the_rounding_floor_is_that_of_the_gradients_terms(forming, monkeypatch):
    """NOISE_FLOOR eps sqrt(sum over tokens of |output gradient|^2 |input|^2), by plain hooks, one example at a time."""
    monkeypatch.setattr(gradient_products, "_forming_is_cheaper", lambda *_: forming)
    model = MODELS["rope"]().eval()
    loss, every, seen = language_model_loss(model), torch.arange(5), {}
    with record_gradients(model, dict(model.named_parameters()), 5) as recorder:
        floor = recorder.backward(loss(slice(None)), every, every).floor
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    model.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.update(given=args[0], out=out))
    for example in range(5):
        total = loss(slice(example, example + 1)).sum()
        (gradient,) = torch.autograd.grad(total, [seen["out"]])
        terms = (gradient.double().norm(dim=-1) * seen["given"].double().norm(dim=-1)).pow(2).sum()
        expected = 32 * torch.finfo(torch.float32).eps * float(terms.sqrt())
        assert float(floor[f"{layer}.weight"][example]) == pytest.approx(expected, rel=1e-4)


def test_recording_leaves_weights_flags_grads_and_hooks_alone():
    model = MODELS["rope"]()
    model.lm_head.weight.requires_grad_(False)
    model.embed_tokens.weight.grad = torch.ones_like(model.embed_tokens.weight)
    recorded_products(model.eval(), language_model_loss(model), 5)
    assert not model.lm_head.weight.requires_grad and model.embed_tokens.weight.requires_grad
    assert (model.embed_tokens.weight.grad == 1).all() and model.lm_head.weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_any_selection_of_parameters_has_the_products_it_has_in_the_whole():
    """Which outputs lie innermost depends on the selection; each is read whichever they are."""
    model = MODELS["gpt2 (tied, Conv1D)"]().double().eval()
    loss, every = language_model_loss(model), torch.arange(5)
    everything = dict(model.named_parameters())
    whole = recorded_products(model, loss, 5)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 5, 8):
        for _ in range(4):
            names = [list(everything)[k] for k in torch.randperm(len(everything), generator=generator)[:size].tolist()]
            with record_gradients(model, {name: everything[name] for name in names}, 5) as recorder:
                found = recorder.backward(loss(slice(None)), every, every.roll(1)).inner
            assert list(found) == names
            for name in names:
                torch.testing.assert_close(found[name], whole[name], rtol=1e-9, atol=1e-18)


def test_factors_are_let_go_while_the_backward_pass_goes_by(monkeypatch):
    """The point of reading in hooks: no more than the factors of a layer or two are alive at any moment."""
    alive, most = weakref.WeakSet(), []
    plain = gradient_reading.linear_use

    def watched(*args):
        use = plain(*args)
        alive.add(use)
        gc.collect()
        most.append(len(alive))
        return use

    monkeypatch.setattr(gradient_reading, "linear_use", watched)
    model = nn.Sequential(nn.Embedding(9, 8), *(nn.Linear(8, 8, bias=False) for _ in range(12)))
    ids = torch.arange(9).expand(5, 9)
    recorded_products(model, lambda part: model(ids[part]).square().sum((1, 2)), 5)
    assert len(most) == 12 and max(most) <= 2


def test_frozen_weights_give_the_same_products():
    model = MODELS["rope"]().double().eval()
    loss = language_model_loss(model)
    free = recorded_products(model, loss, 5)
    frozen = recorded_products(model.requires_grad_(False), loss, 5)
    assert all(torch.equal(free[name], frozen[name]) for name in free)


def test_a_weight_used_outside_its_module_is_an_error_that_names_it():
    """Else its gradient would be silently incomplete."""

    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(5, 3), nn.Linear(3, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.embed(ids)) @ self.embed.weight.T

    model = Sneaky()
    with pytest.raises(RevprobeError, match=r"'embed.weight' reaches the loss 2 times, but only 1 calls"):
        recorded_products(model, lambda part: model(torch.tensor([[1, 2], [3, 4]])[part]).sum((1, 2)), 2)


def test_a_loss_without_gradient_or_per_example_shape_is_refused():
    model = MODELS["rope"]().eval()
    parameters = dict(model.named_parameters())
    with (
        record_gradients(model, parameters, 2) as recorder,
        pytest.raises(RevprobeError, match="one number for each of the 2"),
    ):
        recorder.backward(torch.zeros(()), *PAIR)
    with (
        record_gradients(model, parameters, 2) as recorder,
        pytest.raises(RevprobeError, match="reaches none of the selected"),
    ):
        recorder.backward(torch.zeros(2), *PAIR)
    with pytest.raises(RevprobeError, match="no parameter was selected"), record_gradients(model, {}, 2):
        pass


def test_key_biases_have_no_gradient_beyond_rounding():
    """Softmax ignores a constant added to all scores, so a key bias has zero gradient in theory: below the floor."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.query, self.key = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embed(ids)
            return (self.query(hidden) @ self.key(hidden).mT).softmax(-1) @ hidden

    torch.manual_seed(0)
    model, ids, every = Attention(), torch.randint(0, 9, (6, 12)), torch.arange(6)
    with record_gradients(model, dict(model.named_parameters()), 6) as recorder:
        squares, floors = recorder.backward(model(ids).square().sum((1, 2)), every, every)
    norms = {name: square.clamp(min=0).sqrt() for name, square in squares.items()}
    assert (norms["key.bias"] <= floors["key.bias"]).all()
    assert (norms["query.bias"] > floors["query.bias"]).all()
