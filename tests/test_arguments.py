"""Wrong input at the public interface: whatever is passed for whichever argument, one line of our own comes back.

A call that is accepted is fine as well; what must not come out is an error from the inside, which says nothing of what
the caller wrote. New public functions need an entry in CALLS, or the first test names them.
"""

import inspect
import io
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from numpy.typing import ArrayLike
from torch import nn

import revprobe as rp
from revprobe import progress
from revprobe.arguments import checked, fitted
from revprobe.errors import LONGEST, shown
from revprobe.models import registry
from tiny import gpt2, in_blocks, radd

WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "3": lambda: 3,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "10**30": lambda: 10**30,
    "text": lambda: "text",
    "a long text": lambda: "a" * 5000,
    "an empty list": lambda: [],
    "a list of texts": lambda: ["text"],
    "a dict": lambda: {"key": 1},
    "a path": lambda: Path(tempfile.mkdtemp()) / "at" / "all",  # some calls write there
    "a table": lambda: pd.DataFrame({"a": [1, 2]}),
    "a tensor": lambda: torch.zeros(2, 2),
    "a generator": lambda: (one for one in ["text"]),
    "an object": object,
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public call with arguments that are right, or at least complete; cheap ones."""
    folder = tmp_path_factory.mktemp("arguments")
    model, masked = gpt2(), radd()
    pairs = rp.letter_pairs(5, model=model)[:4]
    same = rp.letter_pairs(5, model=masked)[:4]
    scores, stored = rp.probe_attention_correlation(model, pairs), rp.probe_stored_evidence(masked, same)
    terms = rp.objective_terms(masked, rp.letters(2))
    table = pd.DataFrame({"target": ["Ann", "Bob"], "evidence": ["Cy", "Di"]})
    asked = {"model": model, "pairs": pairs}
    relation = rp.invented_names()
    words = {"forward": "{target} of {evidence}", "reverse": "{evidence} has {target}", "model": model}
    ends = {"distance_forward": 1.0, "distance_reverse": 2.0}
    vectors = {"query": [0.1, 0.2], "key": [0.3, 0.4]}
    query = {"token_ids": [1, 2, 3], "target_positions": [0], "evidence_positions": [2]}
    one = rp.Query(**query)
    two = {"models": {"a": model, "b": model}}
    written = in_blocks(4)
    short = rp.letter_pairs(4, model=written, placements="mirror", alphabet=3)
    swept = rp.block_sweep(written, short, sizes=[2, None], only=["probability"])
    compared = rp.ModelComparison({"a": rp.Readings([scores]), "b": rp.Readings([scores])})
    toy = {name: np.eye(2) for name in ("embedding", "query", "key", "value", "unembedding")}
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "diagnose": (rp.diagnose, {"model": model}),
        "FirstOrderPrediction": (rp.FirstOrderPrediction, {"pairs": pairs}),
        "BlockSweep": (rp.BlockSweep, {"readings": swept.readings}),
        "BlockSweep.difference": (swept.difference, {"measure": "reverse_probability", "size": None, "against": 2}),
        "BlockSweep.save": (swept.save, {"folder": folder / "swept"}),
        "BlockSweep.load": (rp.BlockSweep.load, {"folder": folder / "none"}),
        "ModelComparison": (rp.ModelComparison, {"readings": {"a": rp.Readings([scores]), "b": rp.Readings([scores])}}),
        "ModelComparison.save": (compared.save, {"folder": folder / "compared"}),
        "ModelComparison.load": (rp.ModelComparison.load, {"folder": folder / "none"}),
        "ProbeCallback": (rp.ProbeCallback, {"pairs": pairs}),
        "ProbedModel": (rp.ProbedModel, {"module": model.module, "objective": "causal"}),
        "Query": (rp.Query, query),
        "Reading": (rp.Reading, {"name": scores.name, "frame": scores.frame, "meta": {}}),
        "Reading.summary": (scores.summary, {"by": "layer"}),
        "Reading.save": (scores.save, {"path": folder / "a.parquet"}),
        "Reading.load": (rp.Reading.load, {"path": folder / "none.parquet"}),
        "Readings": (rp.Readings, {"readings": [scores]}),
        "Readings.select": (rp.Readings([scores]).select, {"name": None, "step": None, "weights": None}),
        "Readings.save": (rp.Readings([scores]).save, {"folder": folder / "some"}),
        "Readings.load": (rp.Readings.load, {"folder": folder / "none"}),
        "ReversalPair": (rp.ReversalPair, {"forward": one, "reverse": one}),
        "ReversalPairs": (
            rp.ReversalPairs,
            {"queries": pairs.queries, "forward": pairs.forward, "reverse": pairs.reverse, "facts": pairs.facts},
        ),
        "ReversalPairs.from_pairs": (rp.ReversalPairs.from_pairs, {"pairs": list(pairs)}),
        "ReversalPairs.save": (pairs.save, {"path": folder / "a.jsonl"}),
        "ReversalPairs.load": (rp.ReversalPairs.load, {"path": folder / "none.jsonl"}),
        "TextRelation.questions": (relation.questions, {"direction": "P2C"}),
        "TwoRouteToy": (rp.TwoRouteToy, toy),
        "alibi_correlation": (rp.alibi_correlation, ends),
        "audit_assumptions": (rp.audit_assumptions, {**asked, "permutations": 40, "layers": [0]}),
        "compare": (rp.compare, {"runs": [folder / "none"]}),
        "block_sweep": (rp.block_sweep, {"model": written, "pairs": short, "sizes": [2], "only": ["probability"]}),
        "compare_models": (rp.compare_models, {**two, "pairs": pairs, "only": ["probability"]}),
        "declare_fused": (rp.declare_fused, {"model_type": "none", "pattern": "x$", "order": "blocked"}),
        "decode": (rp.decode, {"model": model, "prompts": ["a"], "max_new_tokens": 1}),
        "decoded_match": (rp.decoded_match, {"model": model, "questions": relation.questions("P2C")[:1]}),
        "edit_attention": (rp.edit_attention, {"model": model, "rows": [[3]], "columns": [[0]]}),
        "fine_tune": (rp.fine_tune, {"config": "none", "folder": folder / "f"}),
        "foretelling": (rp.foretelling, {"table": table}),
        "from_table": (rp.from_table, {"source": table, "columns": ["target", "evidence"], "templates": {}}),
        "letter_pairs": (rp.letter_pairs, {"length": 5, "model": model}),
        "letter_tokenizer": (rp.letter_tokenizer, {"alphabet": 3}),
        "letters": (rp.letters, {"length": 5, "alphabet": 3}),
        "load_model": (rp.load_model, {"source": folder / "none", "step": -1, "weights": None, "mask_token_id": None}),
        "logit_contributions": (rp.logit_contributions, {"reading": stored}),
        "look_alike_data": (rp.look_alike_data, {"folder": folder / "look_alike"}),
        "model_frequencies": (rp.model_frequencies, {"model": masked}),
        "model_theory": (rp.model_theory, {"model": masked, "distances": [1], "samples": 4}),
        "objective_classes": (rp.objective_classes, {"reading": terms, "by": "priced"}),
        "objective_steps": (rp.objective_steps, {"model": masked, "relation": rp.letters(2)}),
        "objective_terms": (rp.objective_terms, {"model": masked, "relation": rp.letters(3)}),
        "one_layer_gpt2": (rp.one_layer_gpt2, {"d_model": 8}),
        "one_step": (rp.one_step, {"run": folder / "none"}),
        "one_step_curves": (rp.one_step_curves, {"table": table}),
        "open_run": (rp.open_run, {"path": folder / "none"}),
        "open_sweep": (rp.open_sweep, {"path": folder / "none"}),
        "pair_from_text": (rp.pair_from_text, {**words, "target": "a", "evidence": "b"}),
        "pairs_from_frame": (rp.pairs_from_frame, {**words, "frame": table}),
        "parent_child": (rp.parent_child, {"path": folder / "none"}),
        "person_description": (rp.person_description, {"path": folder / "none"}),
        "placeholder_storage": (rp.placeholder_storage, {"run": folder / "none"}),
        "plan_memory": (rp.plan_memory, {"module": model.module, "batch": 1, "tokens": 4}),
        "rank_candidates": (rp.rank_candidates, {"model": model, "questions": relation.questions("P2C")[:1]}),
        "rank_heads": (rp.rank_heads, {**asked, "top": 1, "layers": [0], "heads": None}),
        "read_price": (rp.read_price, {"model": masked, "relation": rp.letters(3), "rows": 2, "samples": 1}),
        "pressure": (rp.pressure, {"run": folder / "none"}),
        "pore": (rp.pore, {"path": folder / "none"}),
        "probe": (rp.probe, {**asked, "only": ["probability"]}),
        "probe_attention_correlation": (rp.probe_attention_correlation, asked),
        "probe_gradient_cosine": (rp.probe_gradient_cosine, asked),
        "probe_in_parts": (rp.probe_in_parts, {**asked, "folder": "parts", "only": ["probability"]}),
        "probe_logit_lens": (rp.probe_logit_lens, asked),
        "probe_reverse_probability": (rp.probe_reverse_probability, asked),
        "probe_causal_trace": (rp.probe_causal_trace, {**asked, "layers": [0], "heads": None, "steps": None}),
        "probe_route_edit": (rp.probe_route_edit, {**asked, "scope": "all"}),
        "trace_denoising": (rp.trace_denoising, {"model": masked, "pairs": same}),
        "probe_stored_evidence": (rp.probe_stored_evidence, {"model": masked, "pairs": same}),
        "probe_stored_once": (rp.probe_stored_once, {**asked, "untrained": False}),
        "ray_workers": (rp.ray_workers, {"count": 1}),
        "register_model": (rp.register_model, {"name": "arguments", "loader": radd}),
        "run_sweep": (rp.run_sweep, {"config": "none", "out": folder}),
        "rope_asymmetric_bound": (rp.rope_asymmetric_bound, {"d": 8, **ends, "samples": 4}),
        "rope_conditional_correlation": (
            rp.rope_conditional_correlation,
            {"weights": [1.0, 1.0], "alignment": [1.0, 1.0], **ends},
        ),
        "rope_correlation_bound": (rp.rope_correlation_bound, {"d": 8, "distance": 1}),
        "rope_correlation_tail": (rp.rope_correlation_tail, {"d": 8, "distance": 1, "tau": 0.1}),
        "rope_limit_bound": (rp.rope_limit_bound, {"distance": 1}),
        "rope_query_bound": (rp.rope_query_bound, {"weights": [1.0, 1.0], "distance": 1}),
        "rope_transfer_condition": (rp.rope_transfer_condition, {"query": [1.0, 0.0], "distance": 1}),
        "save_figure": (rp.save_figure, {"figure": scores.plot(), "path": folder / "a.html"}),
        "simulate_alibi_transfer": (rp.simulate_alibi_transfer, {**vectors, **ends, "points": 3}),
        "simulate_rope_transfer": (rp.simulate_rope_transfer, {**vectors, **ends, "points": 3}),
        "storage_curves": (rp.storage_curves, {"run": folder / "none"}),
        "storage_gradient_cosines": (rp.storage_gradient_cosines, {"model": masked, "pairs": same}),
        "theory_tables": (rp.theory_tables, {"samples": 4}),
        "token_contributions": (rp.token_contributions, {"model": masked, "question": same[0]}),
        "token_strip": (rp.token_strip, {"model": model, "query": pairs[0]}),
        "top_predictions": (rp.top_predictions, {"model": model, "question": pairs[0]}),
        "train": (rp.train, {"config": "none", "folder": folder / "t"}),
        "trex": (rp.trex, {"path": folder / "none"}),
        "with_bounds": (rp.with_bounds, {"reading": scores, "model": model, "pairs": pairs}),
    }
    return found


# Of pydantic, of transformers, plain records that probes return, or without an argument of its own.
ELSEWHERE = {"FinetuneConfig", "RaddConfig", "RaddForMaskedLM", "RevprobeError", "RunConfig", "SweepConfig"}
ELSEWHERE |= {"Control", "Question", "TextRelation", "__version__", "invented_names", "list_models"}
NAMES = sorted(set(rp.__all__) - ELSEWHERE)
METHODS = ["Reading.summary", "Reading.save", "Reading.load", "Readings.select", "Readings.save", "Readings.load"]
METHODS += ["ModelComparison.save", "ModelComparison.load"]
METHODS += ["BlockSweep.difference", "BlockSweep.save", "BlockSweep.load"]
METHODS += ["ReversalPairs.from_pairs", "ReversalPairs.save", "ReversalPairs.load", "TextRelation.questions"]


@pytest.fixture(autouse=True)
def no_model_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `revprobe models` of a later test in this process lists those with wrong names."""
    monkeypatch.setattr(registry, "_LOADERS", {})


@pytest.mark.parametrize("name", [*NAMES, *METHODS])
def test_whatever_is_wrong_is_said_in_one_line(
    name: str, calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]], tmp_path: Path, monkeypatch: Any
) -> None:
    """Every argument in turn is given everything in WRONG: an error from inside turns this red, and says from where."""
    monkeypatch.chdir(tmp_path)  # "text" is a fine name for a file
    call, right = calls[name]
    faults = []
    for argument, parameter in inspect.signature(call).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        for label, make in WRONG.items():
            try:
                with torch.random.fork_rng():
                    call(**{**right, argument: make()})
            except (rp.RevprobeError, TypeError, ValueError) as error:
                text = str(error)
                ours = isinstance(error, rp.RevprobeError) or is_ours(error)
                if not ours or "\n" in text or len(text) > LONGEST + 20 or len(text) < 15:
                    faults.append(f"{argument}={label}: {type(error).__name__}: {text[:150]}")
            except Exception as error:
                faults.append(f"{argument}={label}: {type(error).__name__}: {str(error)[:150]}")
    assert not faults, f"{len(faults)} of {name}:\n" + "\n".join(faults)


# Refused with these arguments, or nothing to run; `test_progress.py` runs those that take a run.
QUIET_HERE = {"audit_assumptions", "probe_causal_trace", "probe_stored_once", "with_bounds", "compare", "decoded_match"}
QUIET_HERE |= {
    "fine_tune",
    "foretelling",
    "one_step",
    "placeholder_storage",
    "pressure",
    "rank_candidates",
    "rank_heads",
}
QUIET_HERE |= {"storage_curves", "train"}
PROGRESS = [name for name in NAMES if {"progress", "listener"} & set(inspect.signature(getattr(rp, name)).parameters)]


@pytest.mark.parametrize("name", PROGRESS)
def test_progress_is_a_bar_nothing_or_a_function(
    name: str,
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Each call takes None, False, True and a function; what is refused for another reason is refused for that one."""
    screen = io.StringIO()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "DELAY", -1.0)
    call, right = calls[name]
    argument = "listener" if "listener" in inspect.signature(call).parameters else "progress"
    shown, told = {}, []
    for label, value in {"False": False, "function": lambda *at: told.append(at), "None": None, "True": True}.items():
        before = len(screen.getvalue())
        try:
            call(**{**right, argument: value})
        except rp.RevprobeError as error:
            assert argument not in str(error), f"{argument}={label}: {error}"
            continue  # refused for what else is in `right`, such as a run that is not there
        shown[label] = name in screen.getvalue()[before:]
    ran = bool(told)  # some have nothing to run here: no layer turns, no two pairs of a group
    assert shown in ({}, {"False": False, "function": False, "None": ran, "True": ran}), shown
    assert all(isinstance(one, int) for at in told for one in at[-2:]), f"the function was called with {told[:1]}"
    assert ran or name in QUIET_HERE, "it was never told how far the call is"


def is_ours(error: BaseException) -> bool:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(str(Path(rp.__file__).parent)) and "raise" in (last.line or "")


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (Sequence[str], "attention", r"x='attention': expected a list of texts, such as x=\['attention'\]"),
        (Iterable[int] | None, 0, r"x=0: expected a list of whole numbers or None, such as x=\[0\]"),
        (Iterable[int], [1, "a"], r"x=\[1, 'a'\]: expected a list of whole numbers"),
        (Iterable[int], {0: 1}, "expected a list of whole numbers"),
        (Iterable[int], pd.DataFrame({"a": [1]}), "expected a list of whole numbers, got a DataFrame of shape"),
        (int, True, "x=True: expected a whole number"),
        (int, 10**30, "expected a whole number"),
        (bool, 1, "x=1: expected True or False"),
        (float, "1", "x='1': expected a number"),
        (str | Path, "a" * 5000, r"x='a+\.\.\.a+': expected a name or a path"),
        (ArrayLike, ["a"], "a number or an array of numbers"),
        (Mapping[str, str], ["a"], "expected a mapping"),
        (Callable[[int], int], 3, "x=3: expected a function"),
        (nn.Module, torch.zeros(2), r"x: expected a Module, got a Tensor of shape \(2,\)"),
    ],
)
def test_a_misfit_is_named_with_what_was_expected(kind: Any, given: Any, words: str) -> None:
    with pytest.raises(rp.RevprobeError, match=words):
        fitted("x", given, kind)


@pytest.mark.parametrize(
    ("kind", "given", "arrives"),
    [
        (Iterable[int], range(3), range(3)),
        (Iterable[int], (i for i in range(3)), [0, 1, 2]),
        (Iterable[int], torch.tensor([1, 2]), [1, 2]),
        (int, np.int64(3), 3),
        (bool, np.bool_(True), True),
        (float, np.float32(0.5), 0.5),
        (str | Sequence[str], "a", "a"),
        (int | Sequence[int], 4, 4),
    ],
)
def test_what_fits_arrives_as_it_was_given(kind: Any, given: Any, arrives: Any) -> None:
    found = fitted("x", given, kind)
    assert found == arrives and type(found) in (type(arrives), type(given))


def test_pairs_by_probe_are_a_mapping_though_pairs_alone_are_tried_as_a_list() -> None:
    """`ReversalPairs | Mapping`: what a class makes of a value comes after the kinds that fit as they are."""
    pairs = rp.letter_pairs(5, model=radd())
    by_probe = {"attention": pairs}
    kind = rp.ReversalPairs | Mapping[str, rp.ReversalPairs]
    assert fitted("pairs", by_probe, kind) is by_probe and fitted("pairs", pairs, kind) is pairs
    assert len(fitted("pairs", [pairs[0]], kind)) == 1


def test_pythons_own_words_stand_where_the_signature_is_not_met() -> None:
    @checked
    def ask(length: int, *, seed: int = 0) -> int:
        return length + seed

    assert ask(3, seed=np.int64(4)) == 7
    with pytest.raises(TypeError, match=r"ask\(\) missing 1 required positional argument: 'length'"):
        ask()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        ask(3, sed=4)  # type: ignore[call-arg]
    with pytest.raises(rp.RevprobeError, match="seed=-1: expected a whole number of at least 0"):
        ask(3, seed=-1)


def test_a_misspelt_argument_names_the_nearest_and_a_pair_of_things_is_shown_as_one() -> None:
    pairs = rp.letter_pairs(5, model=radd())
    for given, nearest in ({"controls": "twin"}, "control"), ({"batchsize": 4}, "batch_size"):
        with pytest.raises(rp.RevprobeError, match=f"unexpected keyword argument .*; the closest is '{nearest}'"):
            rp.probe_reverse_probability(radd(), pairs, **given)  # type: ignore[arg-type]
    with pytest.raises(
        rp.RevprobeError, match=r"expected a ProbedModel or a Module or \(a ProbedModel or a Module, ReversalPairs\)"
    ):
        rp.probe_attention_correlation(radd(), pairs, controls="parent", parent=5)  # type: ignore[arg-type]


def test_an_error_is_one_line_of_readable_length_and_keeps_its_fix() -> None:
    error = rp.RevprobeError("a\nb " + "x" * 10_000 + "; do this")
    assert "\n" not in str(error) and len(str(error)) < LONGEST and str(error).endswith("; do this")
    assert len(shown(["a" * 500] * 500)) < 1000 and "\n" not in shown({"a": pd.DataFrame({"b": [1, 2]})})


class Returns(nn.Module):
    """A language model whose forward returns its logits in another wrapping."""

    def __init__(self, inner: nn.Module, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self.wrap(self.inner(input_ids, attention_mask=attention_mask).logits)


def test_logits_are_found_in_a_tuple_and_a_mapping() -> None:
    model = gpt2()
    pairs = rp.letter_pairs(5, model=model)[:6]
    right = rp.probe_reverse_probability(model, pairs).frame["probability"]
    for wrap in (lambda logits: (logits, None), lambda logits: {"logits": logits}, lambda logits: logits):
        found = rp.probe_reverse_probability(Returns(model.module, wrap), pairs).frame["probability"]
        assert found.equals(right)
    with pytest.raises(rp.RevprobeError, match="Returns returns no logits; expected a tensor"):
        rp.ProbedModel(Returns(model.module, lambda logits: {"scores": logits}), objective="causal")


def test_a_wrapped_model_stands_for_its_module_and_one_pair_for_a_list() -> None:
    model = radd()
    again = rp.ProbedModel(model, objective="masked")
    assert again.module is model.module and again.tokenizer is model.tokenizer
    assert (again.mask_token_id, again.logit_shift) == (model.mask_token_id, model.logit_shift)
    pairs = rp.letter_pairs(5, model=model)
    assert (
        rp.probe(model, pairs[3], only=["probability"])[0]
        .frame["probability"]
        .equals(rp.probe(model, pairs[3:4], only=["probability"])[0].frame["probability"])
    )
    assert rp.load_model(model) is model
    with pytest.raises(rp.RevprobeError, match="step= does not apply to a model that is loaded already"):
        rp.load_model(model.module, step=3)


def test_the_options_of_load_model_are_those_it_names(tmp_path: Path) -> None:
    gpt2().module.save_pretrained(tmp_path / "models" / "a")
    with pytest.raises(rp.RevprobeError, match="no option 'mask_token'; the closest is 'mask_token_id'"):
        rp.load_model(tmp_path / "models" / "a", mask_token=3)
    with pytest.raises(rp.RevprobeError, match="leave these out or change them"):
        rp.load_model(tmp_path / "models" / "a", attn_implementation="sdpda")
    with pytest.raises(rp.RevprobeError, match=r"step=3: .* is a model and no run"):
        rp.load_model(tmp_path / "models" / "a", step=3)
    with pytest.raises(rp.RevprobeError, match=r"no model but a folder of 1; name one of them: .*models/a"):
        rp.load_model(tmp_path / "models")
    with pytest.raises(rp.RevprobeError, match=r"pass objective='causal'"):
        rp.load_model(tmp_path / "models" / "a", objective="masked")
    small = {"vocab_size": 56, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**small)).save_pretrained(tmp_path / "t5")
    for options in ({}, {"objective": "causal"}, {"objective": "masked"}):
        with pytest.raises(rp.RevprobeError, match="neither a masked nor a causal language model"):
            rp.load_model(tmp_path / "t5", **options)
