"""The tab that asks the model: from what the page says to a pair and an edit, one question at a time.

Whatever is typed or named comes in as text: runs, facts and checkpoints are looked up in what the folder holds, typed
sentences are read by `asking.sentences` and shown by React, which escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from dash import ClientsideFunction, Dash, Input, Output, State, no_update
from dash.exceptions import PreventUpdate

from ...errors import RevprobeError, first_line
from ...finetune.runs.finetuning import EVALUATION
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import ReversalPair
from ...probes.readings.reading import Reading
from ..asking.answer import answer, evidence_of
from ..asking.asked_sentences import Sentences, asked_sentences
from ..asking.edits import Edit
from ..asking.sentences import read_sentence, sentence_query, typed_pair
from ..asking.turns import Turns
from .ask_answer import answered
from .choices import RECENT
from .folder import RunsFolder
from .held_model import HeldModel
from .listed_runs import Listed
from .open_pair import require_pair
from .page import notes
from .view import ALL, View
from .views import ATTENTION, reading_at

_OF_EDIT = {"transplant": ["match"], "scale": ["factor"], "mask": ["at"]}
_BOXES = ("match", "factor", "at", "other", "instead")


def shown_parts(view: View) -> dict[str, dict[str, str]]:
    """Which of the tab's controls a view has a use for, as styles by their ids."""
    pair = view.tab == "pair" or (view.tab == "ask" and view.about == "pair")
    shown = {"facts": pair, "sentences": view.about == "text"}
    shown |= {f"{name}-box": name in _of_edit(view) for name in _BOXES}
    return {name: {} if there else {"display": "none"} for name, there in shown.items()}


def what_to_ask(view: View) -> dict[str, Any]:
    """What the answer depends on, beside run and checkpoint."""
    about = ["fact", "pair"] if view.about == "pair" else ["forward", "reverse"]
    return {name: getattr(view, name) for name in ("about", "edit", *about, *_of_edit(view))}


def _of_edit(view: View) -> list[str]:
    if view.edit == "swap":
        return ["other"] if view.about == "pair" else ["instead"]
    return _OF_EDIT.get(view.edit, [])


class Asker:
    """Asks the models of a folder's runs."""

    def __init__(self, folder: RunsFolder, held: HeldModel) -> None:
        self.folder, self.held, self.turns = folder, held, Turns()
        self._sentences: dict[tuple[object, ...], dict[str, Sentences]] = {}

    def answer(self, asked: Mapping[str, Any], page: str) -> list[Any]:
        """What is shown of one question. Raises: RevprobeError, when it cannot be asked, or not now."""
        if asked["run"] is None:
            return notes(["Choose a run in the list."])
        if asked["about"] == "text" and not asked["forward"].strip():
            return notes(["Type a sentence, or start from a question that the run was asked."])
        if asked["about"] == "pair" and asked["pair"] is None:
            return notes(["Choose a fact: the checkpoint is asked in both directions."])
        run = self.folder.run(str(asked["run"]), within=RECENT)
        with self.turns.turn(page, run.name) as turn, self.held.lock:
            turn.check()
            reading = reading_at(self.folder, run, ATTENTION, asked["step"], asked["stored"])
            step, weights = int(reading.meta.get("step") or 0), str(reading.meta.get("weights") or "raw")
            model = self.held.model(run, step, weights)
            turn.check()
            places = {name: None if asked[name] in (None, ALL) else int(asked[name]) for name in ("layer", "head")}
            if asked["about"] == "text":
                pair = typed_pair(model, asked["forward"], asked["reverse"])
                edit = self._typed_edit(model, asked, places, pair)
            else:
                pairs = self._pairs(run, reading, step, weights)
                require_pair(pairs, reading, int(asked["pair"]), run.key)
                pair = pairs[int(asked["pair"])]
                edit = self._pair_edit(pairs, asked, places, pair)
            return answered(answer(model, pair, edit, check=turn.check), **places)

    def _pairs(self, run: Listed, reading: Reading, step: int, weights: str) -> ReversalPairs:
        try:
            return self.held.pairs(run, step, weights)
        except RevprobeError as error:
            raise RevprobeError(f"{first_line(error, with_type=False)}; ask about typed sentences instead") from None

    def _pair_edit(
        self, pairs: ReversalPairs, asked: Mapping[str, Any], places: Mapping[str, int | None], pair: ReversalPair
    ) -> Edit:
        edit = _edit(asked, places)
        if edit.name != "swap" or not asked.get("other"):
            return edit
        found = np.flatnonzero(pairs.facts.astype(str) == str(asked["other"]))
        if not len(found):
            raise RevprobeError(f"no fact {asked['other']!r} among the pairs; choose another")
        others = [pairs[int(place)] for place in found]
        fits = [one for one in others if len(one.forward.evidence) == len(pair.forward.evidence)]
        return replace(edit, evidence=evidence_of(pair, (fits or others)[0]), called=f"that of {asked['other']}")

    def _typed_edit(
        self, model: ProbedModel, asked: Mapping[str, Any], places: Mapping[str, int | None], pair: ReversalPair
    ) -> Edit:
        edit, text = _edit(asked, places), str(asked.get("instead") or "").strip()
        if edit.name != "swap" or not text:
            return edit
        if set("[]{}") & set(text):
            raise RevprobeError(f"other evidence {text!r}: expected a name without brackets and braces")
        queries = []
        for name in ("forward", "reverse"):
            if asked[name].strip():
                sentence = read_sentence(asked[name], called=f"the {name} sentence")
                queries.append(sentence_query(model, replace(sentence, given=text)))
        other = {"forward": queries[0].evidence, "reverse": queries[-1].evidence}
        single = pair.forward == pair.reverse
        return replace(edit, evidence={"query": queries[0].evidence} if single else other, called=text)

    def sentences(self, key: str) -> dict[str, Sentences]:
        """What the run was asked, as sentences with marks, by fact; none where that cannot be told."""
        try:
            run = self.folder.run(key, within=RECENT)
            place = self.folder.confined(self.folder.folder_of(run) / EVALUATION)
            files = [self.folder.confined(file) for file in sorted(place.glob("decoded_match.*.parquet"))]
            stamps = (key, *((str(file), file.stat().st_mtime_ns) for file in files))
            if stamps not in self._sentences:
                self._sentences = {stamps: asked_sentences(map(Reading.load, files), str(run.axes.get("objective")))}
            return self._sentences[stamps]
        except Exception:  # nothing to start from; the page stays
            return {}


def _edit(asked: Mapping[str, Any], places: Mapping[str, int | None]) -> Edit:
    given: dict[str, Any] = {name: asked[name] for name in ("match", "factor", "at") if name in asked}
    return Edit(asked["edit"], places["layer"], places["head"], **given)


def add_ask(app: Dash, asker: Asker) -> None:
    """The callbacks of the tab."""

    @app.callback(
        Output("answer", "children"),
        Input("ask-asked", "data"),
        Input("ask-again", "n_clicks"),
        State("page-name", "data"),
    )
    def _answer(asked: dict[str, Any] | None, _: int | None, page: str | None) -> Any:
        if asked is None:
            raise PreventUpdate
        try:
            return asker.answer(asked, str(page))
        except RevprobeError as error:
            return notes([first_line(error, with_type=False)], problem=True)
        except Exception as error:  # weights that cannot be loaded raise what their library raises
            return notes([f"cannot be asked: {first_line(error)}"], problem=True)

    @app.callback(
        Output("cancelled", "data"), Input("cancel", "data"), State("page-name", "data"), prevent_initial_call=True
    )
    def _cancel(_: int | None, page: str | None) -> Any:
        asker.turns.cancel(str(page))
        return no_update

    named = ClientsideFunction("revprobe", "named")
    app.clientside_callback(named, Output("page-name", "data"), Input("root", "id"))
    drawn = ClientsideFunction("revprobe", "answered")
    app.clientside_callback(drawn, Output("answered", "data"), Input("answer", "children"))
