"""A corpus as rows of tokens, and the order in which they are read: batches of rows of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

from ...models.probed import ProbedModel
from ..training.dataset import RowOptions, StatementRows, TokenRow
from ..training.trainer import Permutations
from .corpus import PretrainingCorpus

# Batches whose rows are sorted by length together: padding of a batch falls, and the order stays random.
_SORTED_BATCHES = 16


class CorpusRows(Dataset[TokenRow]):
    """The rows of a corpus, each part's answers filled up to the length they are decoded at."""

    def __init__(self, corpus: PretrainingCorpus, model: ProbedModel) -> None:
        self.rows: list[TokenRow] = []
        for statements in corpus.parts.values():
            ends = [one.text[one.prompt_length :] for one in statements]
            encoded = model.tokenizer(ends, add_special_tokens=False)["input_ids"]
            longest = max(map(len, encoded)) + 1
            self.rows += StatementRows(statements, model, RowOptions(answer_tokens=longest)).rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenRow:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.rows]


class LikeLengths(Sampler[int]):
    """Permutations of all rows, one after another, dealt out in batches of rows of like length.

    Every row is read equally often. Order depends on the seed alone.
    """

    def __init__(self, lengths: Sequence[int], total: int, batch_size: int, seed: int) -> None:
        self.lengths, self.total, self.batch_size, self.seed = lengths, total, batch_size, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        drawn = list(Permutations(len(self.lengths), self.total, self.seed))
        generator = torch.Generator().manual_seed(self.seed + 1)
        window = _SORTED_BATCHES * self.batch_size
        for start in range(0, self.total, window):
            some = sorted(drawn[start : start + window], key=self.lengths.__getitem__)
            batches = [some[at : at + self.batch_size] for at in range(0, len(some), self.batch_size)]
            for place in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[place]
