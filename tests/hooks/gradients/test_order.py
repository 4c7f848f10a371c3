"""Whose rows are whose: modules that hold the examples in an order of their own, against autograd one at a time."""

from collections.abc import Callable

import pytest
import torch
import transformers
from plain_gradients import worst_product_error
from torch import Tensor, nn

from revprobe.hooks.gradients import order as gradient_order
from revprobe.hooks.gradients import recorder as gradients
from revprobe.hooks.gradients.order import Order
from revprobe.hooks.gradients.recorder import record_gradients

WIDTH, SEQ, VOCAB = 6, 8, 20
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Base(nn.Module):
    """Embedding, mixing, a layer, a norm, a head; subclasses arrange what lies between embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.norm = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.arranged(ids, self.embed(ids).cumsum(1)))

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.inner(hidden)

    def inner(self, hidden: Tensor) -> Tensor:
        return self.norm(self.layer(hidden).tanh())


class SequenceFirst(Base):
    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.inner(hidden.transpose(0, 1)).transpose(0, 1)


class HeadsInTheMiddle(Base):
    """(seq, heads, batch, width of a head), and a layer for each head's width."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH // 2, WIDTH // 2), nn.LayerNorm(WIDTH // 2)

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        apart = hidden.unflatten(-1, (2, WIDTH // 2)).permute(1, 2, 0, 3)
        return self.inner(apart).permute(2, 0, 1, 3).flatten(2)


class FlattenedTheOtherWay(Base):
    """(seq batch) width: as long as (batch seq), in another order."""

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        flat = self.inner(hidden.transpose(0, 1).flatten(0, 1))
        return flat.unflatten(0, (ids.shape[1], len(ids))).transpose(0, 1)


class Sorted(Base):
    """By the content of the first token, and put back by index."""

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        order = ids[:, 0].argsort(stable=True)
        return self.inner(hidden[order])[order.argsort()]


class Swapped(Base):
    """The last two examples change places: the first stays where it is."""

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        order = [*range(len(ids) - 2), *range(len(ids) - 1, len(ids) - 3, -1)] if len(ids) > 1 else [0]
        return torch.stack([self.inner(torch.stack([hidden[n] for n in order]))[n] for n in order])


class Chunks(Base):
    """Pieces of a sequence side by side: (piece batch) of half the length."""

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        pieces = self.inner(torch.cat(hidden.chunk(2, dim=1)))
        return torch.cat(pieces.chunk(2), dim=1)


class Experts(Base):
    """Every token goes to the expert that its content picks; each expert sees the tokens of many examples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(3))

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        flat, mixed, chosen = hidden.flatten(0, 1), hidden.flatten(0, 1), (ids % 3).flatten()
        for n, expert in enumerate(self.experts):
            place = (chosen == n).nonzero()[:, 0]
            mixed = mixed.index_add(0, place, expert(flat[place]))
        return self.inner(mixed.unflatten(0, ids.shape))


def batch_of(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (size, SEQ), generator=generator), torch.rand(size, SEQ, VOCAB, generator=generator)


def worst_error(module: nn.Module, batch: int, seed: int = 0, unread: dict[str, str] | None = None) -> float:
    """The largest error of any inner product, as a share of the whole gradients' norms."""
    ids, weights = batch_of(batch, seed)
    dtype = next(module.parameters()).dtype

    def loss(part: slice) -> Tensor:
        return (module(ids[part]).log_softmax(-1) * weights[part].to(dtype)).sum((1, 2))

    return worst_product_error(module, dict(module.named_parameters()), loss, batch, unread=unread)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


KINDS = [SequenceFirst, HeadsInTheMiddle, FlattenedTheOtherWay, Sorted, Swapped, Chunks, Experts]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", [SEQ, SEQ // 2, 5, 2], ids=["as many as tokens", "a divisor", "neither", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_any_order_go_to_their_examples(kind, batch, dtype, monkeypatch):
    unread: dict[str, str] = {}
    module = kind().to(dtype)
    assert worst_error(module, batch, unread=unread) < TOLERANCE[dtype]
    assert not unread, "each row has one example, so nothing is run again"
    if batch == SEQ and dtype == torch.float64 and kind not in (HeadsInTheMiddle, Experts):
        monkeypatch.setattr(gradients, "find_order", lambda *_: Order(batch))
        assert worst_error(module, batch) > 1e-3, "without the check the numbers are wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_examples_than_powers_of_two_in_a_pass_are_told_apart(dtype):
    for kind in (Base, Sorted):
        assert worst_error(kind().to(dtype), 70) < TOLERANCE[dtype]


def test_signs_tell_examples_apart_where_powers_would_overflow():
    codes = gradient_order._codes(9, narrow=True)
    assert set(codes.flatten().tolist()) == {-1.0, 1.0} and len(set(map(tuple, codes.T.tolist()))) == 9


class Averaged(Base):
    """Each example sees the mean of the batch in its last layer's input: no row is one example's."""

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.inner(hidden) + self.layer(hidden.mean(0)).expand_as(hidden)


def test_rows_that_several_examples_reach_are_not_read_from_the_batch():
    ids, weights = batch_of(4)
    module = Averaged().double()
    parameters, every = dict(module.named_parameters()), torch.arange(4)
    with record_gradients(module, parameters, 4) as recorder, pytest.raises(Exception, match="belongs to several"):
        recorder.backward((module(ids) * weights).sum((1, 2)), every, every)


# --- asked once, where that is enough ---------------------------------------------------------------------------------


def passes(module: nn.Module, batches: list[tuple[int, int]]) -> list[int]:
    """How many weighted backward passes each batch takes. `batches`: size and seed."""
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        plain, seen = gradient_order.walk_back, []
        patch.setattr(gradient_order, "walk_back", lambda *given, **more: seen.append(1) or plain(*given, **more))
        for size, seed in batches:
            seen.clear()
            assert worst_error(module, size, seed) < 1e-10
            counts.append(len(seen))
    return counts


def test_a_graph_whose_order_cannot_depend_on_content_is_asked_once_and_other_shapes_anew():
    module = Base().double()
    assert passes(module, [(5, 0), (5, 1), (SEQ, 0), (SEQ, 1), (5, 2)]) == [2, 0, 2, 0, 0]
    assert passes(Base().double(), [(5, 0)]) == [2], "another module is asked itself"


class SortedOnce(Sorted):
    """In order already in the first batch, sorted in the second: what held once does not hold for good."""


def test_an_order_that_may_depend_on_content_is_asked_every_time():
    module = SortedOnce().double()
    in_order = next(s for s in range(200) if (batch_of(3, s)[0][:, 0].diff() >= 0).all())
    other = next(s for s in range(200) if (batch_of(3, s)[0][:, 0].diff() < 0).any())
    assert passes(module, [(3, in_order), (3, other)]) == [1, 1]


class SwappedLater(Base):
    """By plain indices, without an operation that orders: the places stand in autograd's graph."""

    order = (0, 1, 2)

    def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
        order = self.order if len(ids) == 3 else [0]
        inner = self.inner(torch.stack([hidden[n] for n in order]))
        return torch.stack([inner[list(order).index(n)] for n in range(len(ids))])


@pytest.mark.parametrize("way", ["select", "unbind"])
def test_another_order_of_the_same_operations_is_another_graph(way):
    class Unbound(SwappedLater):
        def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
            order = self.order if len(ids) == 3 else [0]
            rows = hidden.unbind()
            back = self.inner(torch.stack([rows[n] for n in order])).unbind()
            return torch.stack([back[list(order).index(n)] for n in range(len(ids))])

    module = (SwappedLater if way == "select" else Unbound)().double()
    assert passes(module, [(3, 0), (3, 1)]) == [2, 0]
    module.order = (0, 2, 1)
    assert passes(module, [(3, 0), (3, 1)]) == [3, 1], "its rows are asked for in every batch"


def test_rows_without_gradient_have_shown_nothing():
    """Read at one position, the rows of two examples that alternate may lie in the right halves by chance: 8 of 18."""

    class Mixed(FlattenedTheOtherWay):
        def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
            return super().arranged(ids, hidden + hidden.mean(1, keepdim=True))

    module = Mixed().double()
    parameters, both = dict(module.named_parameters()), torch.arange(2)
    for length in (9, 11):
        ids = torch.randint(0, VOCAB, (2, length))
        loss = lambda part, ids=ids: -module(ids[part])[:, 4].log_softmax(-1)[:, 3]  # noqa: E731
        with record_gradients(module, parameters, 2) as recorder:
            found = recorder.backward(loss(slice(None)), both, both.flip(0)).inner
        grads = [torch.autograd.grad(loss(slice(n, n + 1)).sum(), list(parameters.values())) for n in range(2)]
        for name, one, other in zip(parameters, *grads, strict=True):
            torch.testing.assert_close(found[name], (one * other).sum().expand(2), rtol=1e-9, atol=1e-14)


def test_an_example_without_gradient_has_shown_nothing():
    """An adapter at its first step: its A has no gradient yet, so that its order is asked again when it has."""

    class Adapted(SequenceFirst):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
            nn.init.zeros_(self.up.weight)

        def arranged(self, ids: Tensor, hidden: Tensor) -> Tensor:
            turned = self.up(self.down(hidden.transpose(0, 1))).transpose(0, 1)
            return self.inner(hidden + turned)

    module = Adapted().double()
    assert worst_error(module, SEQ) < 1e-10
    nn.init.normal_(module.up.weight)
    assert worst_error(module, SEQ) < 1e-10


# --- whole models ---------------------------------------------------------------------------------------------------


def xlnet() -> nn.Module:
    config = transformers.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=4, d_inner=24)
    return transformers.XLNetLMHeadModel(config)


@pytest.mark.parametrize("batch", [SEQ, 3])
def test_a_model_that_runs_sequence_first_inside_is_exact(batch):
    module = drawn(xlnet)
    unread: dict[str, str] = {}
    assert worst_error(Logits(module), batch, unread=unread) < 1e-10
    assert not any(".ff." in name or "word_embedding" in name for name in unread), "these rows have one example each"


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def drawn(made: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = made().double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return module
