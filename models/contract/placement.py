"""Where the input's tokens stand: virtual tokens of prompt adapters, registers and sink tokens shift rows and columns.

Found by changing one token: before anything is mixed, in the first attention call, exactly its own query row and its
own key column move.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import RevprobeError
from .trial import FirstAttention, Trial


@dataclass(frozen=True)
class Placement:
    """How many rows stand before the first token's: of the logits, of attention's queries, and of its keys.

    `rows_more`, `columns_more`: how many query rows and key columns attention has beyond one for each token.
    """

    logits: int = 0
    rows: int = 0
    columns: int = 0
    rows_more: int = 0
    columns_more: int = 0

    @property
    def ahead(self) -> tuple[int, int]:
        """Query rows and key columns before the tokens', where none stands behind them (prompts, prefixes); else none.

        What stands elsewhere is found call by call (`hooks.attention_survey`).
        """
        alone = (self.rows, self.columns) == (self.rows_more, self.columns_more)
        return (self.rows, self.columns) if alone else (0, 0)


def place_tokens(trial: Trial) -> Placement:
    """Compare the first attention call of the plain and the changed runs.

    Raises: RevprobeError, for more or fewer rows of logits than tokens where it cannot be told whose they are.
    """
    tokens, out = trial.tokens, trial.plain.logits.shape[1]
    plain, changed = trial.plain.attention, trial.changed.attention
    rows = columns = None
    size = (tokens, tokens)
    if plain is not None and changed is not None and plain.size == changed.size and plain.size != size:
        size = plain.size
        rows, columns = (_offset(*sides, tokens) for sides in _moved(plain, changed))
        size = size if rows is not None and columns is not None else (tokens, tokens)
    logits = 0 if out == tokens else rows if out == size[0] else None
    logits = _from_logits(trial) if logits is None else logits
    if logits is None:
        raise RevprobeError(
            f"{trial.called.name} gives {out} rows of logits for {tokens} tokens, and it cannot be told which row is "
            "which token's; return one row for each input token"
        )
    return Placement(logits, rows or 0, columns or 0, size[0] - tokens, size[1] - tokens)


def _moved(plain: FirstAttention, changed: FirstAttention) -> list[tuple[Tensor, Tensor]]:
    """Query rows, then key columns, that moved with the first token and with the last: `rows (bool)` each."""
    if plain.score is not None and changed.score is not None:
        places = [_moved_scores((plain.score[row] != changed.score[row]).any(0)) for row in (2, 0)]
        return [(places[0][0], places[1][0]), (places[0][1], places[1][1])]
    pairs = []
    for one, other in ((plain.query, changed.query), (plain.key, changed.key)):
        assert one is not None and other is not None
        pairs.append(tuple((one[row] != other[row]).any(-1).any(0) for row in (2, 0)))
    return pairs  # type: ignore[return-value]


def _moved_scores(apart: Tensor) -> tuple[Tensor, Tensor]:
    """A token's row and column among scores that moved: every row that sees it moves at its column, its own anywhere.

    Shapes: `rows columns (bool) -> rows, columns`.
    """
    columns = apart.sum(0) == apart.sum(0).max()
    beside = (apart & ~columns).any(1)
    own = apart.any(1).cumsum(0) == 1  # a first row may see no column but its own
    return beside if beside.any() else own & apart.any(1), columns


def _offset(first: Tensor, last: Tensor, tokens: int) -> int | None:
    """The place of the first token, if the last stands as many further on as there are tokens between them."""
    at = [moved.nonzero()[:, 0].tolist() for moved in (first, last)]
    if len(at[0]) != 1:
        return None
    if len(at[1]) == 1 and at[1][0] - at[0][0] == tokens - 1:
        return int(at[0][0])
    # Nothing can stand between tokens that fill all the places behind the first.
    return int(at[0][0]) if len(first) - at[0][0] == tokens else None


def _from_logits(trial: Trial) -> int | None:
    """A causal model's own rows: the first token moves all of them, the last token only its own."""
    apart = [(trial.plain.logits[row] != trial.changed.logits[row]).any(-1).nonzero()[:, 0] for row in (2, 0)]
    if not all(len(rows) for rows in apart):
        return None
    first, last = (int(rows.min()) for rows in apart)
    return first if last - first == trial.tokens - 1 and len(apart[1]) == 1 else None
