"""Readings of a model that hides tokens behind random ones: means over draws of these, with the draws' error.

Held to loops that share nothing with the passes: each query and each draw by itself through transformers' own class,
its prompt and its canvas apart, plain softmax and plain autograd.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from long_cases import rest_long
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.memory.from_config import plan_finetuning
from revprobe.models.canvas.noise import drawn_tokens
from revprobe.probes.passes.draws import standard_error
from revprobe.relations.answers import read_answers
from tiny import FIXTURES, module_at

GEMMA = module_at(Path(__file__).with_name("test_diffusion_gemma.py"))
FIXTURE, DRAWS, CANVAS, BEGIN, VOCAB = FIXTURES / "diffusiongemma-tiny", 4, 8, 2, 200


@cache
def loaded(draws: int = DRAWS) -> rp.ProbedModel:
    return rp.load_model(FIXTURE, draws=draws)


@cache
def native() -> torch.nn.Module:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(FIXTURE).eval()


def pairs(*, prompt: int = 0, target: int = 1, count: int = 5) -> rp.ReversalPairs:
    """Facts of different lengths, target of so many tokens; with a prompt of their own where one is asked for."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for fact in range(count):
        ids = (torch.randperm(VOCAB - 20, generator=draw)[:20] + 10).tolist()
        front = [] if not prompt else ids[10 : 10 + prompt]
        told = {"canvas_start": prompt} if prompt else {}
        answer, evidence, fill = ids[:target], ids[8], ids[9 : 9 + fact % 2]
        at = [len(front) + k for k in range(target)]
        one = rp.Query([*front, *answer, 7, evidence, *fill], at, [len(front) + target + 1], **told)
        at = [len(front) + 2 + k for k in range(target)]
        other = rp.Query([*front, evidence, 9, *answer, *fill], at, [len(front)], **told)
        made.append(rp.ReversalPair(one, other, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(made)


def called(query: rp.Query, draw: int, hidden: list[int]) -> tuple[Tensor, Tensor]:
    """Prompt and canvas of a query in one draw, as the design says them: hidden places and what follows are random."""
    ids, shift = list(query.token_ids), 0
    if query.canvas_start == 1:
        ids, shift = [BEGIN, *ids], 1
    prompt, known = ids[: query.canvas_start], ids[query.canvas_start :]
    canvas = drawn_tokens(DRAWS, CANVAS, VOCAB)[draw].clone()
    for place, token in enumerate(known):
        if place + query.canvas_start - shift not in hidden:
            canvas[place] = token
    return torch.tensor([prompt]), canvas[None]


def row_of(query: rp.Query, position: int) -> int:
    return position + (1 if query.canvas_start == 1 else 0) - query.canvas_start


def distribution(query: rp.Query, position: int, hidden: list[int], draw: int, module=None) -> Tensor:
    prompt, canvas = called(query, draw, hidden)
    logits = (module or native())(prompt, decoder_input_ids=canvas).logits[0, row_of(query, position)]
    return logits.double().log_softmax(-1)


# --- probability -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [0, 3])
@torch.no_grad()
def test_probabilities_are_those_of_a_slow_loop_over_draws(prompt: int) -> None:
    asked = pairs(prompt=prompt)
    reading = rp.probe_reverse_probability(loaded(), asked)
    by_draw = {"forward": [], "reverse": []}
    for row in reading.frame.to_dict("records"):
        query = getattr(asked[row["pair"]], row["direction"])
        (position,), (token,) = query.target_positions, query.target
        each = torch.stack([distribution(query, position, [position], draw) for draw in range(DRAWS)]).exp()
        mean, alone = each.mean(0), each[:, token]
        assert row["probability"] == pytest.approx(float(mean[token]), rel=1e-5)
        assert row["log_probability"] == pytest.approx(float(mean[token].log()), abs=1e-5)
        assert row["rank"] == int((mean >= mean[token] * (1 - 1e-9)).sum())
        assert row["probability_error"] == pytest.approx(float(alone.std() / DRAWS**0.5), rel=1e-4)
        by_draw[row["direction"]].append(alone)
    for direction, found in by_draw.items():
        values = torch.stack(found).mean(0)
        errors = reading.meta["draw_errors"]
        assert errors[f"{direction}_probability"] == pytest.approx(float(values.std() / DRAWS**0.5), rel=1e-4)
    assert reading.draw_error == reading.meta["draw_errors"]["reverse_probability"] > 0
    assert f"draw_error={reading.draw_error:.2g} over {DRAWS} draws" in repr(reading)
    assert reading.meta["draws"] == DRAWS and reading.meta["canvas_length"] == CANVAS


@torch.no_grad()
def test_a_chain_multiplies_conditionals_of_the_mean_over_draws_and_the_control_is_priced_alike() -> None:
    asked = pairs(target=2)
    frame = rp.probe_reverse_probability(loaded(), asked).frame
    frame = frame.set_index(["pair", "direction"])
    partners = {}
    for pair in range(len(asked)):
        for direction in ("forward", "reverse"):
            query = getattr(asked[pair], direction)
            own = chained(query, query.target)
            assert frame.loc[(pair, direction), "log_probability"] == pytest.approx(own, abs=1e-5)
            control = frame.loc[(pair, direction), "probability_control"]
            others = [n for n in range(len(asked)) if n != pair]
            found = [
                n for n in others if np.isclose(np.exp(chained(getattr(asked[n], direction), query.target)), control)
            ]
            partners.setdefault(pair, set()).update(found)
    assert all(partners.values()), "each control is this target at another fact's query, over the same draws"


def chained(query: rp.Query, target: tuple[int, ...]) -> float:
    total, ids = 0.0, list(query.token_ids)
    for position, token in zip(query.target_positions, target, strict=True):
        ids[position] = token
    seen = rp.Query.unchecked(ids, query.target_positions, query.evidence_positions)
    for k, (position, token) in enumerate(zip(query.target_positions, target, strict=True)):
        hidden = list(query.target_positions[k:])
        each = torch.stack([distribution(seen, position, hidden, draw) for draw in range(DRAWS)])
        total += float(each.exp().mean(0)[token].log())
    return total


@torch.no_grad()
def test_batches_of_any_size_and_more_draws_rest_on_the_same_tokens() -> None:
    asked = pairs()
    whole, alone = (rp.probe_reverse_probability(loaded(), asked, batch_size=size).frame for size in (None, 1))
    assert np.allclose(whole["probability"], alone["probability"], rtol=1e-5)
    one = rp.probe_reverse_probability(loaded(1), asked)
    query = asked[0].forward
    first = distribution(query, query.target_positions[0], list(query.target_positions), 0)
    assert one.frame["probability"][0] == pytest.approx(float(first[query.target[0]].exp()), rel=1e-5)
    assert np.isnan(one.draw_error) and "probability_error" not in one.frame and "over 1 draws" in repr(one)
    assert rp.probe_reverse_probability(GEMMA.loaded(), asked).meta["draws"] == 8


def test_a_saved_reading_keeps_its_draw_error_and_a_part_has_none(tmp_path: Path) -> None:
    reading = rp.probe_reverse_probability(loaded(), pairs())
    again = rp.Reading.load(reading.save(tmp_path / "one.parquet"))
    assert again.draw_error == reading.draw_error
    assert np.isnan(reading.part(reading.frame[reading.frame["pair"] < 3]).draw_error)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [0, 3])
@torch.no_grad()
def test_scores_and_weights_are_means_over_draws_of_a_slow_forwards(prompt: int) -> None:
    asked, slow = pairs(prompt=prompt), GEMMA.slow_of(FIXTURE)
    reading = rp.probe_attention_correlation(loaded(), asked)
    frame = reading.frame.set_index(["pair", "layer", "head"])
    for pair in range(len(asked)):
        for direction in ("forward", "reverse"):
            query = getattr(asked[pair], direction)
            (position,), (evidence,) = query.target_positions, query.evidence_positions
            scores, weights = [], []
            for draw in range(DRAWS):
                parts = called(query, draw, [position])
                slow.canvas(parts[0][0], parts[1][0])
                column = len(parts[0][0]) + row_of(query, evidence)
                rows = {layer: found[:, row_of(query, position)] for layer, found in slow.scores.items()}
                scores.append(torch.stack([rows[layer][:, column] for layer in sorted(rows)]))
                weights.append(torch.stack([rows[layer].softmax(-1)[:, column] for layer in sorted(rows)]))
            for name, values in (("score", scores), ("weight", weights)):
                mean = torch.stack(values).mean(0)
                for layer, head in np.ndindex(*mean.shape):
                    found = frame.loc[(pair, layer, head), f"{name}_{direction}"]
                    assert found == pytest.approx(float(mean[layer, head]), abs=2e-5)
    assert reading.draw_error > 0


def test_the_error_of_a_correlation_is_the_jackknife_over_draws() -> None:
    """From readings whose scores leave one draw out, worked out from one-draw scores."""
    asked = pairs()
    reading = rp.probe_attention_correlation(loaded(), asked)
    each = scores_by_draw(asked)
    values = []
    for out in range(DRAWS):
        kept = [each[draw] for draw in range(DRAWS) if draw != out]
        changed = {side: np.mean([one[side] for one in kept], axis=0) for side in ("score_forward", "score_reverse")}
        values.append(reading.part(reading.frame.assign(**changed)).value)
    assert reading.draw_error == pytest.approx(float(standard_error(np.array(values))), rel=1e-3)


def test_the_error_of_a_mean_is_that_of_its_draws() -> None:
    each = np.random.default_rng(0).normal(size=7)
    without = (each.sum() - each) / 6
    assert standard_error(without) == pytest.approx(each.std(ddof=1) / 7**0.5, rel=1e-12)


def scores_by_draw(asked: rp.ReversalPairs) -> list:
    """The frames of single draws: one-draw models of whom each has another of the four fillings."""
    frames = []
    for draw in range(DRAWS):
        model = rp.load_model(FIXTURE, draws=1)
        forward = model.module.forward
        model.module.forward = lambda ids, *a, _f=forward, _d=draw, **k: _f(ids + _d * (ids == VOCAB), *a, **k)
        checked = rp.ProbedModel(model.module, objective="masked", check=False)
        frames.append(rp.probe_attention_correlation(checked, asked, control=False).frame)
    return frames


@torch.no_grad()
def test_evidence_in_the_prompt_beyond_the_window_is_hidden_from_sliding_layers_alone() -> None:
    """Window 6: a canvas sees the last five tokens of its prompt there."""
    made = []
    for fact in range(3):
        prompt = [BEGIN, 30 + fact, *range(40, 47)]
        one = rp.Query([*prompt, 60, 70 + fact], [10], [1], canvas_start=9)
        other = rp.Query([*prompt, 70 + fact, 60], [9], [1], canvas_start=9)
        made.append(rp.ReversalPair(one, other, fact=str(fact)))
    frame = rp.probe_attention_correlation(loaded(), rp.ReversalPairs.from_pairs(made)).frame
    sliding, full = (frame[frame["layer"] == layer] for layer in (0, 1))
    assert (sliding["reason"] == "evidence hidden by the attention mask").all()
    assert sliding["score_forward"].isna().all() and (sliding["weight_forward"] == 0).all()
    assert (full["reason"] == "").all() and full["score_forward"].notna().all()


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(query: rp.Query, draws: list[int], module: torch.nn.Module) -> dict[str, Tensor]:
    """Of the mean loss over some draws, by plain autograd through transformers' encoder and decoder."""
    parameters = dict(module.named_parameters())
    hidden = list(query.target_positions)
    losses = [
        -torch.stack(
            [distribution(query, p, hidden, draw, module)[token] for p, token in zip(hidden, query.target, strict=True)]
        ).mean()
        for draw in draws
    ]
    loss = torch.stack(losses).mean()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    decoders = {name: decoder_name(name) for name in parameters}
    pairs_of = zip(parameters.items(), found, strict=True)
    return {decoders[name]: torch.zeros_like(p) if g is None else g for (name, p), g in pairs_of}


def decoder_name(name: str) -> str:
    """transformers' class names a tied weight by its first use, in the encoder."""
    return name.replace("encoder.language_model.", "decoder.")


def inner(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)


@pytest.mark.parametrize(("prompt", "target"), [(0, 1), (3, 2)])
def test_gradients_are_those_of_the_mean_loss_with_both_uses_of_every_tied_weight(prompt: int, target: int) -> None:
    asked = pairs(prompt=prompt, target=target, count=3)
    reading = rp.probe_gradient_cosine(loaded(), asked, control=False)
    every = list(range(DRAWS))
    cosines = []
    for pair, part in reading.frame.groupby("pair"):
        one, other = (gradients(getattr(asked[pair], side), every, native()) for side in ("forward", "reverse"))
        norms = inner(one, one) ** 0.5, inner(other, other) ** 0.5
        for row in part.to_dict("records"):
            name = row["parameter"]
            assert row["norm_forward"] == pytest.approx(float(one[name].norm()), abs=1e-5 * norms[0])
            product = float((one[name].double() * other[name].double()).sum())
            assert row["inner"] == pytest.approx(product, abs=1e-5 * norms[0] * norms[1])
        cosines.append(inner(one, other) / (norms[0] * norms[1]))
    assert reading.value == pytest.approx(np.mean(cosines), abs=1e-5)
    assert set(reading.frame["parameter"]) == {decoder_name(name) for name, _ in native().named_parameters()}


def test_the_encoders_use_of_the_weights_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off from the loss, the prompt would leave gradients that differ by far more than the tolerance above."""
    query = pairs(prompt=3)[0].forward
    whole = gradients(query, [0], native())
    layers = type(native().model.encoder)
    encode = layers.forward
    with monkeypatch.context() as patch:
        patch.setattr(layers, "forward", torch.no_grad()(encode))
        decoder = gradients(query, [0], native())
    apart = {name: whole[name] - decoder[name] for name in whole}
    assert inner(apart, apart) > 1e-2 * inner(whole, whole)


def test_the_error_of_a_cosine_is_the_jackknife_of_mean_gradients() -> None:
    asked = pairs(count=3)
    reading = rp.probe_gradient_cosine(loaded(), asked)
    values = []
    for out in range(DRAWS):
        kept = [draw for draw in range(DRAWS) if draw != out]
        cosines = []
        for pair in asked:
            one, other = (gradients(side, kept, native()) for side in (pair.forward, pair.reverse))
            cosines.append(inner(one, other) / (inner(one, one) * inner(other, other)) ** 0.5)
        values.append(np.mean(cosines))
    assert reading.draw_error == pytest.approx(float(standard_error(np.array(values))), rel=1e-3)


def test_parameters_that_no_query_reaches_are_named_and_the_fused_pass_agrees() -> None:
    asked = pairs()
    fused = rp.probe(loaded(), asked)
    for reading, probe in zip(
        fused,
        (rp.probe_attention_correlation, rp.probe_gradient_cosine, rp.probe_reverse_probability),
        strict=True,
    ):
        own = probe(loaded(), asked)
        assert reading.value == pytest.approx(own.value, abs=1e-6)
        assert reading.draw_error == pytest.approx(own.draw_error, rel=1e-3)
    left = fused["gradient_cosine"].meta["coverage"]["not_covered"]["does not reach the loss"]
    assert left and all("vision" in name for name in left)


# --- queries ---------------------------------------------------------------------------------------------------------


def test_where_the_canvas_starts_is_part_of_a_query(tmp_path: Path) -> None:
    one, other = rp.Query([4, 5, 6], [2], [0]), rp.Query([4, 5, 6], [2], [0], canvas_start=2)
    assert one != other and one.canvas_start == 1
    pair = lambda query: rp.ReversalPair(query, query, fact="a")  # noqa: E731
    lists = [rp.ReversalPairs.from_pairs([pair(query)]) for query in (one, other)]
    assert lists[0].digest != lists[1].digest
    again = rp.ReversalPairs.load(lists[1].save(tmp_path / "pairs.jsonl"))
    assert again.queries == (other,) and again.digest == lists[1].digest
    assert "canvas_start" not in (lists[0].save(tmp_path / "plain.jsonl")).read_text()
    with pytest.raises(rp.RevprobeError, match="canvas_start=3 with a target at position 2: expected at least one"):
        rp.Query([4, 5, 6], [2], [0], canvas_start=3)
    with pytest.raises(rp.RevprobeError, match="canvas_start=0 with a target"):
        rp.Query([4, 5, 6], [2], [0], canvas_start=0)


def probed(*queries: rp.Query) -> rp.Reading:
    pair = rp.ReversalPair(queries[0], queries[-1], fact="a", different_tokens=True)
    return rp.probe_reverse_probability(loaded(), rp.ReversalPairs.from_pairs([pair]))


def test_queries_that_no_canvas_holds_are_errors_with_words() -> None:
    fits = rp.Query(range(10, 18), [0], [7])
    assert probed(fits).n == 1, "eight tokens behind a begin token"
    with pytest.raises(
        rp.RevprobeError, match=r"a query of 10 tokens has 9 behind its prompt of 1, more than .* \(8\)"
    ):
        probed(rp.Query(range(10, 19), [0], [8]))
    assert probed(rp.Query(range(10, 22), [11], [0], canvas_start=4)).n == 1, "a longer prompt leaves as much canvas"
    with pytest.raises(rp.RevprobeError, match="a target is the begin token, which is the prompt"):
        probed(rp.Query([BEGIN, 20, 21], [0], [2]))
    other = rp.load_model(FIXTURES / "llada-tiny")
    asked = rp.ReversalPairs.from_pairs([rp.ReversalPair(*[rp.Query([4, 5, 6], [2], [0], canvas_start=2)] * 2)])
    with pytest.raises(rp.RevprobeError, match="canvas_start=2, and llada-tiny has no canvas behind a prompt"):
        rp.probe_reverse_probability(other, asked)


@torch.no_grad()
def test_a_begin_token_is_put_before_a_query_that_has_none() -> None:
    with_it, without = rp.Query([BEGIN, 20, 21], [1], [2]), rp.Query([20, 21], [0], [1])
    one, other = (probed(query).frame["probability"] for query in (with_it, without))
    assert one.equals(other)


def test_probing_leaves_no_trace() -> None:
    model, state = loaded(), torch.random.get_rng_state()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    rp.probe(model, pairs())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(p.grad is None for p in model.module.parameters())


# --- what is not read so ----------------------------------------------------------------------------------------------


ONE_SIGHT = "hides tokens behind random ones, and this analysis needs a mask token"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            lambda m, p: rp.probe_stored_evidence(m, p),
            ONE_SIGHT,
        ),
        (lambda m, p: rp.probe_route_edit(m, p), ONE_SIGHT),
        (lambda m, p: rp.token_strip(m, p[0]), ONE_SIGHT),
        (
            lambda m, p: rp.token_contributions(m, p[0]),
            ONE_SIGHT,
        ),
        (
            lambda m, p: rp.with_bounds(rp.probe_attention_correlation(m, p), m, p),
            ONE_SIGHT,
        ),
        (lambda m, p: rp.storage_gradient_cosines(m, p), "the stored-evidence matrix needs a mask token"),
        (lambda m, p: rp.objective_terms(m, rp.letters(5)), "needs a mask token"),
        (lambda m, p: rp.read_price(m, rp.letters(5)), "read_price needs a mask token"),
        (lambda m, p: read_answers(m, rp.letters(5)), "a table of answers needs a mask token"),
        (lambda m, p: rp.decode(m, ["ab"], max_new_tokens=2), "decoding needs a mask token"),
        (lambda m, p: rp.block_sweep(m, p, sizes=[1, 2]), "its canvas is one block, read as a whole"),
        (lambda m, p: m.in_blocks(2), "its canvas is one block, read as a whole"),
        (lambda m, p: m.to_bridge(), "TransformerLens"),
    ],
)
def test_what_needs_a_mask_token_is_refused_in_one_line(asked, words: str) -> None:
    with pytest.raises(rp.RevprobeError, match=words) as error:
        asked(with_letters(), pairs())
    assert "\n" not in str(error.value)


FINE_TUNING = """
name: canvas
model: {name: BASE}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
lora: {rank: 2, alpha: 4}
training: {steps: 1, batch_size: 2, device: cpu}
"""


def test_fine_tuning_is_refused_before_anything_is_trained_or_planned(tmp_path: Path) -> None:
    config = parse_config(FINE_TUNING.replace("BASE", str(FIXTURE)), FinetuneConfig, "test")
    for ask in (lambda: rp.fine_tune(config, tmp_path / "run"), lambda: plan_finetuning(config, tokens=8)):
        with pytest.raises(rp.RevprobeError, match="fine-tuning, which hides tokens behind it, needs a mask token"):
            ask()


def with_letters() -> rp.ProbedModel:
    """With a tokenizer that has a mask token, which the model does not."""
    return rp.load_model(FIXTURE, draws=2, tokenizer=rp.letter_tokenizer())


def test_a_tokenizers_mask_token_is_not_taken_for_the_models() -> None:
    model = with_letters()
    assert model.tokenizer.mask_token_id == 53 and model.mask_token_id == VOCAB
    readings = rp.probe(model, rp.letter_pairs(4, model=model)[:40])
    assert all(np.isfinite(reading.value) and reading.draw_error > 0 for reading in readings)


def test_eager_attention_gives_the_same_numbers() -> None:
    asked = pairs()
    eager = rp.load_model(FIXTURE, draws=DRAWS, attn_implementation="eager")
    for one, other in zip(rp.probe(eager, asked), rp.probe(loaded(), asked), strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5)


def test_transformers_class_wrapped_by_itself_is_refused_as_random() -> None:
    with pytest.raises(rp.RevprobeError, match=r"is random in eval mode|rows of logits for"):
        rp.ProbedModel(native(), objective="masked", mask_token_id=5, logit_shift=0)


@pytest.mark.parametrize("prompt", rest_long([0, 2]))
def test_controls_of_a_canvas_stay_on_it_and_are_means_over_draws(prompt: int) -> None:
    """The token beside evidence or target, asked by hand; the prompt, which no query asks for, is none to ask for."""
    model, given = loaded(), pairs(prompt=prompt)
    beside: dict[str, list[rp.ReversalPair]] = {"attention": [], "gradient": []}
    for pair in given:
        (one, other), told = (pair.forward, pair.reverse), {"canvas_start": prompt or 1}
        asked, last = {"fact": pair.fact, "different_tokens": True}, len(one.token_ids) - 1
        [at], [place] = one.evidence_positions, other.target_positions
        moved = [
            rp.Query.unchecked(one.token_ids, one.target_positions, [at + 1 if at < last else at - 1], **told),
            rp.Query.unchecked(other.token_ids, other.target_positions, [other.evidence_positions[0] + 1], **told),
        ]
        beside["attention"].append(rp.ReversalPair(*moved, **asked))
        place = place + 1 if place + 1 < len(other.token_ids) else place - 1
        target = rp.Query.unchecked(other.token_ids, [place], other.evidence_positions, **told)
        beside["gradient"].append(rp.ReversalPair(one, target, **asked))
    for name, probe in (("attention", rp.probe_attention_correlation), ("gradient", rp.probe_gradient_cosine)):
        expected = probe(model, rp.ReversalPairs.from_pairs(beside[name]), control=False)
        table = probe(model, given, controls=["neighbour", "untrained", "sink"]).controls.set_index("control")
        assert table.loc["neighbour", "value"] == pytest.approx(expected.value, abs=1e-5)
        assert table.loc["neighbour", "n"] == expected.n == 5 and np.isfinite(table.loc["untrained", "value"])
        assert np.isfinite(table.loc["sink", "value"]) == (name == "attention")
