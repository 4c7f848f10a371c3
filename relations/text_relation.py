"""A relation told in text: its facts, what training in one direction reads, what is asked, and what is probed.

Made by the functions of `catalog`. Whatever the source, a relation is a table of facts and a list of statements;
texts, questions and pairs are chosen from these by direction, by the side of the split and by template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from torch import nn

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean
from ..models.probed import ProbedModel, as_probed
from ..probes.pairs.pairs import ReversalPairs
from ..probes.pairs.spans import REFUSALS
from ..probes.pairs.templates import Span
from .cells import Problem
from .probe_pairs import make_pairs, require_entities_fit, require_texts_fit, warn_of_names_read_alike
from .spelling import plain_name
from .splits import require_forward_only
from .statements import Statement, answer_in_prompt, require_direction

SPLITS = ("train", "heldout")
TEMPLATES = ("all", "train", "heldout")


@dataclass(frozen=True)
class Question:
    """One prompt to complete, scored by exact match against any of `answers`.

    `fact` is the label of what intervals are over, `template` the number within `direction`, and `direction` that
    of the statement asked: for training in "P2C", "P2C" is a forward question and "C2P" a reverse one. `joint` stands
    between prompt and answer where the statement is trained on.
    """

    prompt: str
    answers: tuple[str, ...]
    fact: str
    template: int
    direction: str
    joint: str = " "


@dataclass(frozen=True)
class TrainingText:
    """A statement to train on, carrier included.

    `spans` are the characters (first, one past the last) of the two entities in the order of the text, and
    `prompt_length` the characters before the completion.
    """

    text: str
    spans: tuple[Span, Span]
    fact: str
    prompt_length: int


@dataclass(frozen=True, eq=False, repr=False)
class TextRelation:
    """Facts about two kinds of entity, to be trained in one direction and asked for in both.

    Args:
        name: of the relation.
        directions: the order in which statements name the entities, e.g. ("P2C", "C2P").
        columns: the two entity columns of `table`, the one that the first direction names first being first.
        table: one row per fact, in the columns fact (its label, unique), the two entities, and whatever the source
            said besides.
        statements: every fact in every wording, both directions, held-out facts and templates included.
        heldout: for each direction of training which facts are held out. Shapes: `fact`.
        unused: for some directions of training which facts are neither trained nor asked for. Shapes: `fact`.
        carrier: text before every training text, question and pair. Behind it no name starts a text, so that in
            byte-level BPE a name is the same tokens in both directions.
        problems: what was flagged, changed or left out, cell by cell.
        ignore_case: whether names that differ by case alone are one name to the split.
    Raises: RevprobeError, when a training text of either direction is a reverse statement, or names both entities of
        a held-out fact, and when a held-out fact has a prompt in common with a trained one.
    """

    name: str
    directions: tuple[str, str]
    columns: tuple[str, str]
    table: pd.DataFrame
    statements: Mapping[str, Sequence[Statement]]
    heldout: Mapping[str, np.ndarray]
    carrier: str = ""
    problems: Sequence[Problem] = ()
    ignore_case: bool = False
    unused: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.carrier, str):
            raise RevprobeError(f"carrier={self.carrier!r} is {type(self.carrier).__name__}, expected text or ''")
        for direction in self.directions:
            self._require_forward_only(direction)

    def __repr__(self) -> str:
        held = int((self.facts["split"] == "heldout").sum())
        return (
            f"TextRelation({self.name!r}, {len(self.facts) - held} facts to train on and {held} held out, directions "
            f"{self.directions}, carrier={self.carrier!r}, report={self.report})"
        )

    @property
    def facts(self) -> pd.DataFrame:
        """The table of facts with the column `split`, "train" or "heldout", as training in the first direction has it.

        `facts_of(direction)` gives the split of a direction; only Person-Description's differs between the two.
        """
        return self.facts_of(self.directions[0])

    @checked
    def facts_of(self, direction: str) -> pd.DataFrame:
        """The table of facts with the split of training in `direction`, without those that it leaves out."""
        require_direction(direction, self.directions, self.name)
        split = self.table.assign(split=np.where(self.heldout[direction], "heldout", "train"))
        return split[~self._unused(direction)]

    @property
    def report(self) -> dict[str, int]:
        """How many cells were changed, rows left out and facts flagged, by reason; empty when nothing was."""
        return dict(Counter(problem.reason for problem in self.problems))

    @property
    def problem_table(self) -> pd.DataFrame:
        """What `report` counts, one row each: row, column, reason, detail."""
        return pd.DataFrame([vars(p) for p in self.problems], columns=["row", "column", "reason", "detail"])

    @checked
    def opposite(self, direction: str) -> str:
        """The other direction. Raises: RevprobeError, for an unknown one."""
        require_direction(direction, self.directions, self.name)
        return self.directions[1 - self.directions.index(direction)]

    @checked
    def training_texts(self, direction: str) -> list[str]:
        """What training in `direction` reads: statements of that direction only, of trained facts and templates."""
        return [row.text for row in self.training_rows(direction)]

    @checked
    def training_rows(self, direction: str) -> list[TrainingText]:
        """`training_texts` with the places of the entities, and of the completion; equal texts stand once."""
        shift, labels = len(self.carrier), self.table["fact"].tolist()
        rows: dict[str, TrainingText] = {}
        for statement in self._trained(direction):
            first, second = (tuple(shift + place for place in span) for span in statement.spans)
            text = self.carrier + statement.text
            length = shift + statement.prompt_length
            rows.setdefault(text, TrainingText(text, (first, second), labels[statement.fact], length))  # type: ignore[arg-type]
        return list(rows.values())

    @checked
    def questions(
        self, direction: str, *, reverse: bool = False, split: str = "train", templates: str = "all"
    ) -> list[Question]:
        """What a model trained in `direction` is asked, forward or in reverse.

        Each prompt is asked once, and takes the answer of every fact that shares it: any child of the parent, either
        parent of the child. Prompts that contain their answer ("Stanley Tucci, Sr.'s child is") are left out, counted
        in `report` as answer_in_prompt.

        Args:
            split: "train", or "heldout" for the floor: the same questions about facts that were never trained.
            templates: "train" (those that training in the asked direction would use), "heldout", or "all".
        Raises: RevprobeError, for an unknown direction, split or choice of templates, and when no template is held out.
        """
        opposite = self.opposite(direction)
        for name, value, known in (("split", split, SPLITS), ("templates", templates, TEMPLATES)):
            if value not in known:
                raise RevprobeError(f"unknown {name} {value!r}{did_you_mean(str(value), known)}")
        asked, labels = opposite if reverse else direction, self.table["fact"].tolist()
        answers = self._answers(asked)
        found: dict[str, Question] = {}
        for one in self._chosen(asked, direction, split, templates):
            prompt = self.carrier + one.prompt
            if prompt not in found and not answer_in_prompt(one):
                right, about = answers[self._plain(one.prompt)], labels[one.fact]
                found[prompt] = Question(prompt, right, about, one.template, asked, one.joint)
        if not found:
            raise RevprobeError(
                f"{self.name} has no question in direction {asked!r} for split={split!r}, templates={templates!r}; it "
                f"has {self._available(asked, direction)}"
            )
        return list(found.values())

    @checked
    def has_questions(
        self, direction: str, *, reverse: bool = False, split: str = "train", templates: str = "all"
    ) -> bool:
        """Whether `questions` has any: none where no fact is on that side, or all their prompts contain the answers."""
        asked = self.opposite(direction) if reverse else direction
        return any(not answer_in_prompt(one) for one in self._chosen(asked, direction, split, templates))

    @checked
    def accepted(self, fact: str, direction: str) -> tuple[str, ...]:
        """Every string that is right where a statement of `direction` about a fact is asked, the usual one first.

        Exact match compares them as `decoded_match` says: in lower case, without blanks around them.

        Args:
            fact: its label, as in `facts`.
            direction: of the statement asked: in "P2C", what comes after the parent.
        Raises: RevprobeError, for a fact or a direction there is not.
        """
        require_direction(direction, self.directions, self.name)
        labels = self.table["fact"].tolist()
        if fact not in labels:
            raise RevprobeError(f"{self.name} has no fact {fact!r}{did_you_mean(fact, labels)}")
        place = labels.index(fact)
        own = [one for one in self.statements[direction] if one.fact == place]
        prompts = {self._plain(one.prompt) for one in own}
        sharing = (one for one in self.statements[direction] if self._plain(one.prompt) in prompts)
        return tuple(dict.fromkeys(answer for one in (*own, *sharing) for answer in one.answers))

    @checked
    def entities(self, direction: str, *, reverse: bool = False, split: str = "train") -> list[tuple[str, ...]]:
        """The entities that answer what `questions` asks, each as all texts that name it in some wording.

        A candidate of `rank_candidates` each: a model that says the right name in another wording's words holds the
        right one.

        Args:
            direction, reverse, split: as in `questions`.
        """
        asked = self.opposite(direction) if reverse else direction
        names = self.table[self.columns[1 if asked == self.directions[0] else 0]].tolist()
        found: dict[str, dict[str, None]] = {}
        for one in self._chosen(asked, direction, split, "all"):
            if not answer_in_prompt(one):
                found.setdefault(self._plain(names[one.fact]), {}).update(dict.fromkeys(one.answers))
        return [tuple(texts) for texts in found.values()]

    @checked
    def has_heldout_templates(self, direction: str) -> bool:
        """Whether some wordings of this direction are never trained on."""
        require_direction(direction, self.directions, self.name)
        return any(statement.is_heldout for statement in self.statements[direction])

    @checked
    def pairs(
        self,
        model: ProbedModel | nn.Module,
        direction: str,
        *,
        split: str = "train",
        kind: str | None = None,
        templates: str = "train",
        limit: int | None = None,
        seed: int = 0,
        carrier: str | None = None,
        drop: str | Iterable[str] = REFUSALS,
        same_block: bool = False,
    ) -> ReversalPairs:
        """The forward and reverse queries that probe what training in `direction` stored.

        With P2C's "{parent}'s child is {child}" and C2P's "{child}'s parent is {parent}", a masked model is asked in
        both for the parent given the child (kind "same_target"). A causal model is asked for what each names last
        (kind "swapped"). A fact's forward wordings are paired one by one with its reverse ones, these starting over
        when they are fewer.

        Args:
            split: "train", or "heldout" for pairs about facts that were never trained.
            kind: the model's own by default; "swapped" asks a masked model too for what is named last.
            templates: which forward wordings: "train", "heldout" or "all"; where a split has none of them, all it has.
            limit: at most this many facts, drawn by `seed`, each with all its wordings.
            carrier: the relation's own by default; another one makes queries unlike the texts that were trained on.
            drop: flags and refusals that leave a pair out, counted in the pairs' `report`; () makes refusals errors.
            same_block: as in `pairs_from_frame`.
        Raises: RevprobeError, for a name, a limit or a kind that does not fit, and for an entity longer than the
            model's context, by its row and column.
        Warns: when the model's tokenizer reads two names of the relation, of other case for example, as one.
        """
        opposite, model = self.opposite(direction), as_probed(model)
        warn_of_names_read_alike(self.table, self.columns, model, self.name, ignore_case=self.ignore_case)
        if split not in SPLITS or templates not in TEMPLATES:
            raise RevprobeError(
                f"split={split!r}, templates={templates!r}: expected one of {SPLITS} and of {TEMPLATES}"
            )
        forward = self._chosen(direction, direction, split, templates)
        forward = forward or self._chosen(direction, direction, split, "all")
        if limit is not None:
            chosen = self._draw(sorted({one.fact for one in forward}), limit, seed)
            forward = [one for one in forward if one.fact in chosen]
        swap = direction != self.directions[0]
        columns = self.columns[::-1] if swap else self.columns
        return make_pairs(
            self.table, columns, forward, self.statements[opposite], model, kind=kind, swap=swap, drop=drop,
            carrier=self.carrier if carrier is None else carrier, same_block=same_block,
        )  # fmt: skip

    @checked
    def require_fit(self, model: ProbedModel | nn.Module, direction: str) -> None:
        """Raises: RevprobeError, naming row and column, for an entity longer than the model's context, and naming the
        row, for a training text that is.
        Warns: as `pairs`.
        """
        trained, model = self._trained(direction), as_probed(model)
        warn_of_names_read_alike(self.table, self.columns, model, self.name, ignore_case=self.ignore_case)
        facts = self.table.loc[sorted({one.fact for one in trained})]
        require_entities_fit(facts, self.columns, model)
        rows = self.table["row"].tolist()
        require_texts_fit([(rows[one.fact], self.carrier + one.text) for one in trained], model)

    @checked
    def take(self, facts: Iterable[str], *, name: str | None = None) -> TextRelation:
        """The relation of some of its facts, by label; answers then come from these alone.

        Raises: RevprobeError, for a label there is not.
        """
        wanted = list(facts)
        place_of = {label: place for place, label in enumerate(self.table["fact"])}
        unknown = [label for label in wanted if label not in place_of]
        if unknown:
            raise RevprobeError(f"{self.name} has no fact {unknown[0]!r}{did_you_mean(unknown[0], list(place_of))}")
        kept = sorted(place_of[label] for label in wanted)
        new_place = {old: new for new, old in enumerate(kept)}
        statements = {
            direction: [replace(one, fact=new_place[one.fact]) for one in listed if one.fact in new_place]
            for direction, listed in self.statements.items()
        }
        heldout, unused = (
            {direction: facts[kept] for direction, facts in side.items()} for side in (self.heldout, self.unused)
        )
        table = self.table.iloc[kept].reset_index(drop=True)
        return replace(self, name=name or self.name, table=table, statements=statements, heldout=heldout, unused=unused)

    def _trained(self, direction: str) -> list[Statement]:
        require_direction(direction, self.directions, self.name)
        return self._chosen(direction, direction, "train", "train")

    def _unused(self, direction: str) -> np.ndarray:
        return self.unused.get(direction, np.zeros(len(self.table), dtype=bool))

    def _chosen(self, asked: str, direction: str, split: str, templates: str) -> list[Statement]:
        """Statements of direction `asked` about the facts on this side of the split of training in `direction`."""
        held = self.heldout[direction] == (split == "heldout")
        is_there = (held & ~self._unused(direction)).tolist()
        return [
            one
            for one in self.statements[asked]
            if is_there[one.fact] and (templates == "all" or one.is_heldout == (templates == "heldout"))
        ]

    def _answers(self, asked: str) -> dict[str, tuple[str, ...]]:
        """For each prompt of a direction the answers of all facts, trained or not, that share it."""
        answers: dict[str, dict[str, None]] = {}
        for one in self.statements[asked]:
            answers.setdefault(self._plain(one.prompt), {}).update(dict.fromkeys(one.answers))
        return {prompt: tuple(found) for prompt, found in answers.items()}

    def _plain(self, text: str) -> str:
        return plain_name(text, ignore_case=self.ignore_case)

    def _available(self, asked: str, direction: str) -> str:
        counts = [
            f"{len(self._chosen(asked, direction, s, t))} for {s} facts and {t} templates"
            for s in SPLITS
            for t in TEMPLATES[1:]
        ]
        return ", ".join(counts)

    def _draw(self, facts: list[int], limit: int, seed: int) -> set[int]:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise RevprobeError(f"limit={limit!r}: expected a whole number of facts, at least 1")
        return {facts[i] for i in np.random.default_rng(seed).permutation(len(facts))[:limit]}

    def _require_forward_only(self, direction: str) -> None:
        held = self.table.loc[self.heldout[direction], ["fact", *self.columns]]
        trained, reverse = self._trained(direction), self.statements[self.opposite(direction)]
        if not trained:
            raise RevprobeError(f"{self.name} has no training text in direction {direction!r}; hold out fewer facts")
        self._require_own_prompts(direction)
        entities = list(held.itertuples(index=False, name=None))
        where = f"{self.name}, direction {direction!r}"
        require_forward_only(trained, reverse, entities, where, ignore_case=self.ignore_case)

    def _require_own_prompts(self, direction: str) -> None:
        """No question about a held-out fact takes a trained one's answer.

        Raises: RevprobeError, naming the prompt that both share.
        """
        labels = self.table["fact"].tolist()
        for asked in self.directions:
            trained = {self._plain(one.prompt): one.fact for one in self._chosen(asked, direction, "train", "all")}
            for one in self._chosen(asked, direction, "heldout", "all"):
                other = trained.get(self._plain(one.prompt))
                if other is not None:
                    raise RevprobeError(
                        f"{self.name}, direction {direction!r}: {one.prompt!r} asks about the held-out fact "
                        f"{labels[one.fact]!r} and about the trained one {labels[other]!r}; hold out both or neither"
                    )
