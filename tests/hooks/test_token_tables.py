"""The tables that tokens are looked up in, however a module of one's own does it, and what else looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revprobe.hooks.token_tables import token_tables
from revprobe.models.contract.called import CalledModule

CPU = torch.device("cpu")


class Reader(nn.Module):
    """Tokens, and beside them whatever `beside` looks up: there are more positions, and languages, than tokens."""

    def __init__(self, beside: Callable[[Reader, Tensor], Tensor], rows: int = 56) -> None:
        super().__init__()
        self.beside = beside
        self.embed, self.places, self.langs = nn.Embedding(rows, 8), nn.Embedding(96, 8), nn.Embedding(100, 8)
        self.head = nn.Linear(8, rows)

    def words(self, ids: Tensor) -> Tensor:
        return self.embed(ids)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(F.dropout(self.words(input_ids) + self.beside(self, input_ids), 0.5, self.training))


class Functional(Reader):
    def words(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embed.weight)


class Keyword(Reader):
    def words(self, ids: Tensor) -> Tensor:
        return self.embed(input=ids)


class OneHot(Reader):
    def words(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, self.embed.num_embeddings).float() @ self.embed.weight


class Shifted(Reader):
    def words(self, ids: Tensor) -> Tensor:
        return self.embed(ids + 1)


class Turned(Reader):
    def words(self, ids: Tensor) -> Tensor:
        return self.embed(ids.T).transpose(0, 1)


def padded_places(pad: int) -> Callable[[Reader, Tensor], Tensor]:
    """RoBERTa's: counted over the tokens that are no padding, which have row 0."""
    return lambda module, ids: module.places(ids.ne(pad).long().cumsum(1) * ids.ne(pad).long())


BESIDE: dict[str, Callable[[Reader, Tensor], Tensor]] = {
    "positions": lambda module, ids: module.places(torch.arange(ids.shape[1])),
    "positions of each example": lambda module, ids: module.places(torch.arange(ids.shape[1]).expand_as(ids)),
    "positions from 2 on": lambda module, ids: module.places(torch.arange(ids.shape[1]) + 2),
    "positions that skip padding 0": padded_places(0),
    "positions that skip padding 1": padded_places(1),
    "one language": lambda module, ids: module.langs(torch.zeros_like(ids)),
    "whether it is padding": lambda module, ids: module.langs(ids.eq(0).long()),
}


@pytest.mark.parametrize("kind", [Reader, Functional, Keyword, Shifted, Turned])
@pytest.mark.parametrize("beside", BESIDE)
def test_it_is_the_table_in_which_every_token_has_its_row(kind: type[Reader], beside: str) -> None:
    module = kind(BESIDE[beside]).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = token_tables(module, CPU)
    assert found is not None and [table is module.embed.weight for table in found] == [True]
    assert torch.equal(torch.get_rng_state(), before) and module.training
    assert CalledModule(module).vocab_size == 56


def test_a_second_table_of_tokens_is_one_too() -> None:
    module = Reader(lambda own, ids: 0.1 * own.langs(ids))
    found = token_tables(module, CPU)
    assert found is not None and {len(table) for table in found} == {56, 100}
    assert CalledModule(module).vocab_size == 56, "as many as the head has"


def test_a_vocabulary_of_two_is_seen_and_one_hot_vectors_are_no_table() -> None:
    small = Reader(BESIDE["positions"], rows=2)
    assert [len(table) for table in token_tables(small, CPU) or []] == [2]
    assert token_tables(OneHot(BESIDE["positions"]), CPU) == []


def test_a_module_that_will_not_run_on_ids_alone_is_not_judged() -> None:
    class Sees(Reader):
        def forward(self, input_ids: Tensor, image: Tensor | None = None) -> Tensor:
            assert image is not None
            return super().forward(input_ids)

    assert token_tables(Sees(BESIDE["positions"]), CPU) is None
