"""What a probe is asked, held against the model before anything is run: every probe begins here.

A pair of another vocabulary, or one whose evidence the model cannot see, gives a number like any other. So the tokens
are compared by their strings, a causal model is asked only for what stands behind its evidence, and a query of a model
that is read in blocks whose evidence lies in a later block has no number.

A query is read as the model would be asked: when a token is predicted, the blocks before are finished, those behind not
begun. So each readout row (target - shift) sees the tokens up to the end of its own block, in the one run that scores,
gradients and parallel probabilities are read from, whatever blocks a target of several tokens spans. With shift 1 the
row of a block's first token lies in the finished block before, and sees no further.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query, ReversalPair
from ..pairs.token_strings import first_difference
from .prompts import in_sight, with_prompts

CHECKED, UNCHECKED = "checked", "not checked: "
NEEDS_ONE_ENTRY = (
    "pairs of kind 'swapped' do not share an entry of S: each direction has its own; causal models have no other pairs "
    "(`token_contributions(model, pair)` takes each direction's logit apart, `probe_route_edit` changes its route)"
)


def asked_pairs(model: ProbedModel, pairs: ReversalPairs | Iterable[ReversalPair], probe: str) -> ReversalPairs:
    """The list of pairs that a probe reads, fit for the model, with the flags of `with_prompts` where facts share one.

    Args:
        probe: its short name ("attention"), for pairs that give probes lists of their own.
    Raises: RevprobeError, when the model's tokenizer has another token for one of the ids, and for a causal model
        when a target stands before its evidence.
    """
    pairs = pairs if isinstance(pairs, ReversalPairs) else ReversalPairs.from_pairs(pairs)
    own = pairs.for_probe(probe)
    require_same_tokens(model, own)
    _require_evidence_in_sight(model, own)
    return with_prompts(model, own)


def require_same_tokens(model: ProbedModel, pairs: ReversalPairs) -> None:
    """Raises: RevprobeError, with the first id that the pairs and the model's tokenizer call by different strings."""
    if not _names_tokens(model):
        return
    wrong = first_difference(pairs.tokens, model.tokenizer, pairs.token_ids)
    if wrong is not None:
        token, said, found = wrong
        known = "no token of the tokenizer" if found is None else f"{found!r} to the tokenizer"
        raise RevprobeError(
            f"token id {token} is {said!r} in these pairs and {known} of {model.name}: they were made for another "
            "model; make them with model= this one"
        )


def require_one_entry(pairs: ReversalPairs) -> None:
    """Raises: RevprobeError, for pairs whose two directions do not ask for one target from one evidence token."""
    if pairs.kind != "same_target":
        raise RevprobeError(NEEDS_ONE_ENTRY)


def tokens_note(model: ProbedModel, pairs: ReversalPairs) -> str:
    """Whether the ids of the pairs were held against the model's tokenizer; for `meta`."""
    if model.tokenizer is None:
        return f"{UNCHECKED}the model has no tokenizer"
    if not _names_tokens(model):
        return f"{UNCHECKED}the model's tokenizer does not name its tokens"
    ids = pairs.token_ids
    unsaid = sum(token not in pairs.tokens for token in ids)
    if unsaid == len(ids):
        return f"{UNCHECKED}the pairs do not say what their token ids are"
    return f"{UNCHECKED}{unsaid} of {len(ids)} token ids, which the pairs leave open" if unsaid else CHECKED


def _names_tokens(model: ProbedModel) -> bool:
    return hasattr(model.tokenizer, "convert_ids_to_tokens")


def out_of_sight(model: ProbedModel, queries: Sequence[Query]) -> np.ndarray:
    """Which queries have evidence, or part of it, in a later block than one of their readout rows. Shapes: `-> query`.

    Their numbers answer another question, and are undefined with the reason LATER_BLOCK.
    Args:
        queries: as they are run, since blocks are counted from the first token: those of `prepare_queries`.
    """
    return np.array([query.evidence_positions[-1] not in in_sight(model, query) for query in queries], dtype=bool)


def _require_evidence_in_sight(model: ProbedModel, pairs: ReversalPairs) -> None:
    if model.objective != "causal":
        return
    behind = out_of_sight(model, pairs.queries)
    count = int((behind[pairs.forward] | behind[pairs.reverse]).sum())
    if count:
        raise RevprobeError(
            f"{count} of {len(pairs)} pairs (kind {pairs.kind!r}) have a target before its evidence, which a causal "
            f"model such as {model.name} cannot see; pairs of kind 'swapped' ask for what comes last: "
            "rp.pairs_from_frame(..., model=), rp.letter_pairs(length, model=) and relation.pairs(model, ...) make them"
        )
