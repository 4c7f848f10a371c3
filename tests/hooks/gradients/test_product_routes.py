"""Products of gradients held as factors: every route gives them, none holds much, and the cheapest is taken."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import revprobe as rp
from revprobe.hooks.gradients import products as gradient_products
from revprobe.hooks.gradients.uses import FormedUse, LookupUse, OuterUse
from tiny import pairs_at, radd


@pytest.mark.parametrize(
    ("batch", "tokens", "out", "inside", "pairs", "forming"),
    [
        (2, 4, 64, 64, 2, False),
        (2, 400, 64, 64, 2, True),
        (64, 16, 512, 1376, 96, False),
        (64, 512, 512, 1376, 96, True),
        (2, 4096, 4096, 4096, 3, True),
    ],
)
def test_the_cost_model_forms_gradients_for_long_sequences_only(batch, tokens, out, inside, pairs, forming):
    """The switch is near T = out in / (out + in): 32 for 64 x 64, 2,048 for 4,096 x 4,096; no size is too large."""
    rows, columns = (torch.empty(batch, tokens, size, device="meta") for size in (out, inside))
    # As probes ask: each query with one other, and some of them with a control.
    of = gradient_products.Pairs.of(torch.arange(pairs) % (batch // 2), batch // 2 + torch.arange(pairs) % (batch // 2))
    assert gradient_products._forming_is_cheaper(OuterUse(rows, columns), of) is forming


@pytest.mark.parametrize(
    ("left", "right", "tokens", "whole"),
    [
        (*torch.triu_indices(64, 64, 1), True, True),
        # Eight draws of each side of four pairs: each draw with each of the pair's.
        (
            torch.arange(32).repeat_interleave(8),
            32 + torch.arange(32).view(4, 1, 8).expand(4, 8, 8).flatten(),
            True,
            True,
        ),
        (torch.arange(32), torch.arange(32, 64), False, True),
        (torch.arange(512), torch.arange(512, 1024), False, False),
    ],
    ids=["all with all", "draws", "pairs", "many pairs"],
)
def test_pairs_are_taken_from_the_table_of_all_where_they_nearly_fill_it(left, right, tokens, whole):
    pairs = gradient_products.Pairs.of(left, right)
    for costs, together in (
        (gradient_products._token_costs(16, 16, 1024, pairs), tokens),
        (gradient_products._whole_costs(pairs), whole),
    ):
        assert (costs[1] < costs[0]) is together


def test_where_nothing_is_gained_pairs_are_taken_one_by_one():
    assert not gradient_products._is_table_cheaper(1000, 10)
    assert gradient_products._is_table_cheaper(10**9, 10**7)
    assert not gradient_products._is_table_cheaper(10**9, 10**10)


ROUTES = [(forming, together) for forming in (False, True) for together in (False, True)]


def take(monkeypatch, forming: bool, together: bool) -> None:
    """Let the products go one route, whatever it costs."""
    monkeypatch.setattr(gradient_products, "_FEW", 0)
    monkeypatch.setattr(gradient_products, "_forming_is_cheaper", lambda *_: forming)
    for costs in ("_token_costs", "_whole_costs"):
        monkeypatch.setattr(gradient_products, costs, lambda *_: (1, 0) if together else (0, 1))


def some_uses(kinds: str, batch: int, generator: torch.Generator, columns: int = 4) -> list:
    """Uses of one weight of 6 rows: outer products, rows looked up (some of none), and whole gradients."""
    drawn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    uses = []
    for kind in kinds:
        if kind == "o":
            uses.append(OuterUse(drawn(batch, 3, 6), drawn(batch, 3, columns)))
        elif kind == "l":
            uses.append(LookupUse(torch.randint(-1, 6, (batch, 5), generator=generator), drawn(batch, 5, columns), 6))
        else:
            uses.append(FormedUse(drawn(batch, 6 * columns), drawn(batch).abs()))
    return uses


def formed_by_hand(use, batch: int) -> Tensor:
    """One example and one token after another."""
    whole = torch.zeros(batch, 6, 4, dtype=torch.float64)
    for n in range(batch):
        if isinstance(use, OuterUse):
            for row, column in zip(use.rows[n], use.columns[n], strict=True):
                whole[n] += row[:, None] * column
        elif isinstance(use, LookupUse):
            for token, grad in zip(use.ids[n].tolist(), use.grads[n], strict=True):
                if token >= 0:
                    whole[n, token] += grad
        else:
            whole[n] += use.grads[n].view(6, 4)
    return whole.flatten(1)


@pytest.mark.parametrize(("forming", "together"), ROUTES)
@given(data=st.data())
def test_every_route_gives_the_products_of_any_pairs_of_any_uses(forming, together, data):
    """Pairs may repeat, be unordered, meet themselves, or be none; slices are of any size."""
    batch = data.draw(st.integers(1, 6))
    side = st.lists(st.integers(0, batch - 1), min_size=0, max_size=12)
    left = torch.tensor(data.draw(side), dtype=torch.long)
    right = torch.tensor([data.draw(st.integers(0, batch - 1)) for _ in left], dtype=torch.long)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    uses = some_uses(
        data.draw(st.sampled_from(["o", "l", "f", "ol", "of", "lf", "oo", "olf", "llo"])), batch, generator
    )
    whole = torch.stack([formed_by_hand(use, batch) for use in uses]).sum(0)
    with pytest.MonkeyPatch.context() as patch:
        take(patch, forming, together)
        patch.setattr(gradient_products, "_CHUNK", data.draw(st.sampled_from([1, 20, 90, 2**24])))
        inner, floor = gradient_products.multiply(uses, torch.nn.Parameter(whole[0]), left, right)
    torch.testing.assert_close(inner, (whole[left] * whole[right]).sum(1), rtol=1e-10, atol=1e-12)
    assert floor.shape == (batch,)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kinds", ["formed", "long", "o", "l", "f", "ol"])
def test_no_route_holds_more_than_a_slice_at_once(kinds, together, monkeypatch):
    """The largest tensor that is made, as torch makes it: of 12 gradients of 6 x 400, whose products are 144.

    Of a long sequence, tokens by tokens are more than tokens by features.
    """
    take(monkeypatch, kinds == "formed", together)
    uses = some_uses({"formed": "o", "long": "o"}.get(kinds, kinds), 12, torch.Generator().manual_seed(0), columns=400)
    if kinds == "long":
        uses = [OuterUse(torch.ones(12, 30, 6), torch.ones(12, 30, 2))]
    pairs = gradient_products.Pairs.of(*torch.cartesian_prod(torch.arange(12), torch.arange(12)).T)

    def largest(chunk: int) -> Largest:
        monkeypatch.setattr(gradient_products, "_CHUNK", chunk)
        with Largest() as made:
            if kinds == "formed":
                gradient_products._by_forming(uses[0], pairs)
            else:
                gradient_products._cross(uses[0], uses[-1], pairs)
        return made

    made = largest(6000)
    assert made.numel <= 6000, made.name
    assert largest(2**24).numel > 6000, "without slices it is more"


@pytest.mark.parametrize(("forming", "together"), ROUTES)
@pytest.mark.parametrize("kind", [OuterUse, FormedUse])
def test_products_of_large_gradients_keep_their_digits(kind, forming, together, monkeypatch):
    """A million terms in float32, of few examples: a matrix product of few rows and torch's norm add up one by one."""
    take(monkeypatch, forming, together)
    rows, columns = torch.rand(1, 1, 1024).expand(4, -1, -1), torch.rand(1, 1, 1024).expand(4, -1, -1)
    whole = (rows.mT @ columns).flatten(1)
    use = OuterUse(rows, columns) if kind is OuterUse else FormedUse(whole, whole.pow(2).sum(1))
    left, right = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    inner, _ = gradient_products.multiply([use], torch.nn.Parameter(torch.zeros(1024, 1024)), left, right)
    true = whole[0].double().pow(2).sum().expand(16)
    torch.testing.assert_close(inner.double(), true, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("forming", "together"), ROUTES)
@pytest.mark.parametrize("kinds", ["o", "l", "f", "olf"])
def test_the_callers_autocast_does_not_narrow_products(kinds, forming, together, monkeypatch):
    take(monkeypatch, forming, together)
    uses = [
        replace(use, **{name: factor.float() for name, factor in vars(use).items() if _is_floating(factor)})
        for use in some_uses(kinds, 5, torch.Generator().manual_seed(0))
    ]
    pairs = torch.triu_indices(5, 5)
    alone = gradient_products.multiply(uses, torch.nn.Parameter(torch.zeros(6, 4)), *pairs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradient_products.multiply(uses, torch.nn.Parameter(torch.zeros(6, 4)), *pairs)
    for one, other in zip(alone, inside, strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)


def test_a_probe_in_the_callers_autocast_reads_its_cosines():
    """Norms and biases are products of whole gradients, of which some are an example's own and some are not."""
    model, pairs = radd(), pairs_at((1, 3), (3, 1), length=8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rp.probe_gradient_cosine(model, pairs).frame
    alone = rp.probe_gradient_cosine(model, pairs).frame
    assert inside["inner"].notna().all() and len(inside) == len(alone)
    whole = [frame.groupby("pair")[["inner", "norm_forward"]].sum() for frame in (inside, alone)]
    assert abs(whole[0] / whole[1] - 1).to_numpy().max() < 0.1, "its forward pass is rounded, and no more"


def _is_floating(factor) -> bool:
    return isinstance(factor, Tensor) and factor.is_floating_point()


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made, views aside."""

    numel, name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            new = isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given
            if new and leaf.numel() > self.numel:
                self.numel, self.name = leaf.numel(), str(func)
        return out
