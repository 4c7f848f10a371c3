"""A block that takes the tokens in another order is named: its rows are no rows of the query."""

import pytest
import torch
import torch.nn.functional as F
from long_cases import rest_long
from torch import nn

from revprobe import ProbedModel, probe_attention_correlation
from revprobe.hooks.attention_look import places_of
from revprobe.hooks.attention_survey import REORDERED
from revprobe.models.structure import attention_of
from tiny import drawn, pairs_at

D = 8


def whole(order):
    """An order of so many tokens, of queries of any length."""
    return lambda x: torch.tensor(order(list(range(x.shape[1])))).expand(len(x), -1)


def chunks(size, turn):
    return lambda t: [place for start in range(0, len(t), size) for place in turn(t[start : start + size])]


def riffled(t):
    return sorted(t, key=lambda place: (place % ((len(t) + 1) // 2), place))


# What a block may do before it attends, and undo behind.
ORDERS = {
    "reversed": whole(lambda t: t[::-1]),
    "all but the first reversed": whole(lambda t: t[:1] + t[:0:-1]),
    "the second half reversed": whole(lambda t: t[: len(t) // 2] + t[: len(t) // 2 - 1 : -1]),
    "the last three reversed": whole(lambda t: t[:-3] + t[:-4:-1]),
    "rolled by one": whole(lambda t: t[1:] + t[:1]),
    "rolled by half": whole(lambda t: t[len(t) // 2 :] + t[: len(t) // 2]),
    "even places first": whole(lambda t: t[::2] + t[1::2]),
    "odd places first": whole(lambda t: t[1::2] + t[::2]),
    "halves in turn": whole(riffled),
    "chunks of two reversed": whole(chunks(2, lambda t: t[::-1])),
    "chunks of three reversed": whole(chunks(3, lambda t: t[::-1])),
    "chunks of five reversed": whole(chunks(5, lambda t: t[::-1])),
    "chunks of seven reversed": whole(chunks(7, lambda t: t[::-1])),
    "two packed texts exchanged": whole(lambda t: t[7:] + t[:7]),
    "two neighbours exchanged": whole(lambda t: [*t[:4], t[5], t[4], *t[6:]] if len(t) > 5 else t),
    "the middle three reversed": whole(lambda t: [*t[:4], t[6], t[5], t[4], *t[7:]] if len(t) > 6 else t),
    "sorted by a feature": lambda x: x[:, :, 0].argsort(1),
    "sorted by norm": lambda x: x.norm(dim=2).argsort(1),
}


class Block(nn.Module):
    def __init__(self, order, by_hand: bool, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in "qkv")
        self.order, self.by_hand, self.causal = order, by_hand, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = self.order(x)[..., None].expand_as(x)
        x = x.gather(1, at)
        q, k, v = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.by_hand:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            mixed = (scores.masked_fill(later, -torch.inf) if self.causal else scores).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return torch.zeros_like(x).scatter(1, at, mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Stacks side by side, as ELMo's: every block is given the embedding, or what the one before gives."""

    def __init__(self, orders, by_hand: bool, causal: bool, along: bool) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(56, D), nn.Embedding(32, D), nn.Linear(D, 56)
        self.blocks, self.along = nn.ModuleList(Block(one, by_hand, causal) for one in orders), along

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = start = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = x + block(x if self.along else start)
        return self.head(x)


STRAIGHT = whole(lambda t: t)


def made(*orders, by_hand: bool = False, causal: bool = False, along: bool = True) -> ProbedModel:
    module = drawn(lambda: Model(orders, by_hand, causal, along), scale=0.5)
    return ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("first", rest_long([False, True]))
@pytest.mark.parametrize("order", ORDERS)
def test_a_block_that_takes_its_tokens_in_another_order_is_not_read(order, first, by_hand):
    """With one token changed, in the middle, a reversed sequence looked right, and so did whatever kept that token."""
    orders = (ORDERS[order], STRAIGHT) if first else (STRAIGHT, ORDERS[order])
    found = attention_of(made(*orders, by_hand=by_hand), required=False)
    assert f"blocks.{int(not first)}" in found.left_out, order
    assert attention_of(made(STRAIGHT, STRAIGHT, by_hand=by_hand)).heads == {0: 2, 1: 2}


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("backward", [0, 1])
def test_a_stack_from_right_to_left_is_left_out_and_the_one_beside_it_stands(backward, by_hand):
    """Evidence that such a stack sees was said to be hidden, with weight 0, and the other query's had its weight."""
    orders = [STRAIGHT, STRAIGHT]
    orders[backward] = ORDERS["reversed"]
    model = made(*orders, by_hand=by_hand, causal=True, along=False)
    reading = probe_attention_correlation(model, pairs_at((2, 5), (5, 2)), control=False)
    assert reading.meta["left_out"] == {f"blocks.{backward}": REORDERED}
    by_layer = {layer: rows for layer, rows in reading.frame.groupby("layer")}
    assert by_layer[backward].filter(like="weight").isna().all(axis=None)
    assert (by_layer[backward].reason == f"layer {backward}: {REORDERED}").all()
    assert by_layer[1 - backward].filter(like="weight").notna().all(axis=None)


def test_changes_stand_where_no_stretch_is_the_same_in_another_order():
    """What the words say: no stretch that reads the same backwards, none twice in a row; and the orders by name."""
    tokens, embeddings = map(set, places_of(11))
    word = [(place in tokens, place in embeddings) for place in range(11)]
    for start in range(11):
        for end in range(start + 2, 12):
            stretch = word[start:end]
            assert stretch != stretch[::-1], f"{start} to {end} is the same backwards"
            assert len(stretch) % 2 or stretch[: len(stretch) // 2] != stretch[len(stretch) // 2 :], "twice in a row"
    for length in range(4, 12):
        words = word[:length]
        x = torch.zeros(1, length, D)
        for name, order in ORDERS.items():
            if "sorted" not in name and (at := order(x)[0].tolist()) != list(range(length)):
                assert [words[place] for place in at] != words, f"{name} of {length} tokens keeps every change"
