"""Facts that a model is shown as one prompt are one draw of it, in every measure; and no control of one another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.probes.deep.stored_once import _Tests
from revprobe.probes.passes.asked import asked_pairs
from revprobe.probes.passes.likelihood import target_partners
from revprobe.probes.passes.plan import Plan
from revprobe.probes.passes.prompts import facts_of
from revprobe.probes.passes.run import run_pass
from revprobe.probes.statistics.by_head import head_correlations
from revprobe.probes.statistics.by_part import evidence_by_pair, logit_contributions
from revprobe.probes.statistics.by_role import cell_cosines
from revprobe.probes.statistics.causal_trace import place_means
from revprobe.probes.statistics.coverage import ONE_PROMPT
from revprobe.probes.statistics.denoising import attention_table, steps_table
from revprobe.probes.statistics.estimators import NO_LIKE_TARGET, NO_UNLIKE, Control
from revprobe.probes.statistics.partners import PARTNER
from revprobe.probes.statistics.resampling import SHOWN_COLUMNS, Facts, drawn_alike, with_shown
from revprobe.probes.storage import control_partners
from tiny import MASK, gpt2, in_blocks, radd

CITIES, COUNTRIES = 12, 4


def cities(
    countries: int = COUNTRIES, *, by: str = "city", kind: str = "same_target", places: int = 1
) -> rp.ReversalPairs:
    """City i (token 10 + i) of country i % countries (30 + it), asked for the city; a fact is a city, or a country.

    places: in so many wordings, of as many groups.
    """
    pairs = []
    for city in range(CITIES):
        c, k = 10 + city, 30 + city % countries
        fact = f"c{city:02}" if by == "city" else f"c{city % countries:02}"
        for more in range(places):
            forward = rp.Query([c, 2, *[3] * more, k, 4], [0], [2 + more])
            if kind == "swapped":
                forward = rp.Query([c, 2, *[3] * more, k], [2 + more], [0])
            pairs.append(rp.ReversalPair(forward, rp.Query([k, 5, c], [2], [0]), kind, fact))
    return rp.ReversalPairs.from_pairs(pairs)


def model_of(kind: str) -> rp.ProbedModel:
    return gpt2(scale=0.4) if kind == "swapped" else radd(n_layers=2, n_heads=2, scale=0.4)


Probe = Callable[[rp.ProbedModel, rp.ReversalPairs], rp.Reading]
PROBES: dict[str, Probe] = {
    "attention": lambda model, pairs: rp.probe_attention_correlation(model, pairs, progress=False),
    "gradient": lambda model, pairs: rp.probe_gradient_cosine(model, pairs, progress=False),
    "probability": lambda model, pairs: rp.probe_reverse_probability(model, pairs, progress=False),
    "lens": lambda model, pairs: rp.probe_logit_lens(model, pairs, progress=False),
    "route edit": lambda model, pairs: rp.probe_route_edit(model, pairs, scope="head", progress=False),
    "trace": lambda model, pairs: rp.probe_causal_trace(model, pairs, progress=False),
    "storage": lambda model, pairs: rp.probe_stored_evidence(model, pairs, progress=False),
    "denoising": lambda model, pairs: rp.trace_denoising(model, pairs, progress=False),
}
BY = {"attention": "layer", "gradient": "role", "probability": "direction", "storage": "layer"}
CASES = [(name, "same_target") for name in PROBES] + [(name, "swapped") for name in [*PROBES][:5]]


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """What does not say how many facts there are."""
    return table.drop(columns=["facts", "caution", "reason", "fact"], errors="ignore").select_dtypes("number")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cities_of_one_country_are_drawn_as_facts_that_are_labelled_by_country_are(name: str, kind: str) -> None:
    """Labels alone told facts apart: 12 cities of 4 countries had the intervals of 12 facts, three times each."""
    model, probe = model_of(kind), PROBES[name]
    found, expected = (probe(model, cities(by=by, kind=kind)) for by in ("city", "country"))
    if name != "trace":
        value = ["measure", "value", "low", "high", "n"]
        tables = [one.measures()[value] for one in (found, expected)]
        # Asked for its country, each city has a prompt of its own.
        kept = [table[~table["measure"].str.startswith("forward") | (kind == "same_target")] for table in tables]
        pd.testing.assert_frame_equal(*(numbers(table) for table in kept))
    if name not in ("attention", "route edit"):  # whose partners are drawn by label
        frame = found.frame
        drawn = frame["shown"]
        if "direction" in frame:
            drawn = drawn.where(frame["direction"] == "reverse", frame["shown_forward"])
        bare = _labelled(frame, drawn).drop(columns=[*SHOWN_COLUMNS])
        expected = rp.Reading(found.name, bare, expected.meta)
    assert (found.facts, found.prompts, expected.facts, expected.prompts) == (CITIES, COUNTRIES, COUNTRIES, 0)
    pd.testing.assert_frame_equal(numbers(found.measures()), numbers(expected.measures()))
    assert f"of {CITIES} facts, drawn as {COUNTRIES} by the prompts they share" in repr(found)
    assert "shown" in found.frame and "shown" not in expected.frame
    assert found.caution == expected.caution.replace("facts", "sets of facts") and (
        "13 sets of facts on" in found.caution
    ) == (name != "attention")
    by = BY.get(name, "layer")
    pd.testing.assert_frame_equal(*(numbers(one.summary(by=by)) for one in (found, expected)))
    assert found.summary(by="shown")["facts"].tolist() == [CITIES // COUNTRIES] * COUNTRIES


def test_tables_that_are_made_in_one_pass_draw_alike() -> None:
    model = model_of("same_target")
    tables = {
        "attention": lambda one: head_correlations(one.frame),
        "gradient": lambda one: cell_cosines(one.frame, ["role"]),
        "storage": logit_contributions,
        "route edit": lambda one: place_means(one.frame, ["direction", "scope", "layer", "head"], "change"),
        "denoising": lambda one: pd.concat([steps_table(one.frame), attention_table(one.frame, ["layer"])]),
    }
    for name, table in tables.items():
        found, expected = (table(PROBES[name](model, cities(by=by))) for by in ("city", "country"))
        # Whom a control meets goes by labels.
        left = [column for column in found if "control" in column]
        pd.testing.assert_frame_equal(*(numbers(one.drop(columns=left)) for one in (found, expected)), obj=name)
        if "facts" in found:
            assert set(found["facts"]) == {CITIES}, f"{name} counts prompts as facts"
    assert "shown" in evidence_by_pair(PROBES["storage"](model, cities()))


ONE_SIDED = ["probability", "lens", "route edit", "trace"]


@pytest.mark.parametrize("name", ONE_SIDED)
def test_a_number_of_one_direction_is_drawn_by_the_prompts_of_that_direction(name: str) -> None:
    """Asked for the country, each city has a prompt of its own: they were drawn as the countries that ask for them."""
    found = PROBES[name](model_of("swapped"), cities(kind="swapped"))
    rows, bare = found.frame, found.frame.drop(columns=[*SHOWN_COLUMNS])
    country = np.array([f"k{int(fact[1:]) % COUNTRIES}" for fact in rows["fact"]])
    for direction, fact in (("forward", rows["fact"].to_numpy()), ("reverse", country)):
        there = (rows["direction"] == direction).to_numpy()
        part = found.part(rows[there])
        slow = rp.Reading(found.name, _labelled(bare, fact)[there], found.meta)
        assert part.prompts == (COUNTRIES if direction == "reverse" else 0)
        for one in ("interval", "control", "value"):
            np.testing.assert_equal(_plain(getattr(part, one)), _plain(getattr(slow, one)))
    old = rp.Reading(found.name, rows.drop(columns=[*SHOWN_COLUMNS[1:]]), found.meta)  # saved before
    assert old.prompts == COUNTRIES and old.value == found.value and np.isfinite(old.interval).all()


def _labelled(frame: pd.DataFrame, labels: Any) -> pd.DataFrame:
    """The frame with other labels of facts, also of those that controls ask about."""
    named = frame.assign(fact=np.asarray(labels))
    if PARTNER not in frame:
        return named
    rows = [frame["direction"].astype(str) if "direction" in frame else pd.Series("", frame.index)]
    of = dict(zip(zip(*rows, frame["fact"].astype(str), strict=True), named["fact"], strict=True))
    asked = zip(*rows, frame[PARTNER].astype(str), strict=True)
    return named.assign(**{PARTNER: [of.get(one, one[1]) for one in asked]})


def _plain(number: object) -> object:
    return (number.value, number.interval) if isinstance(number, Control) else number


def test_tables_of_both_directions_draw_each_by_its_own_prompts() -> None:
    """Cells of the two stand side by side; where one column says both, each is what it is alone."""
    edits = PROBES["route edit"](model_of("swapped"), cities(kind="swapped")).frame
    keys = ["direction", "scope", "layer", "head"]
    whole = place_means(edits, keys, "change")
    for direction in ("forward", "reverse"):
        alone = place_means(edits[edits["direction"] == direction], keys, "change")
        cells = whole[whole["direction"] == direction].reset_index(drop=True)
        pd.testing.assert_frame_equal(cells, alone.reset_index(drop=True), check_dtype=False)
    both = place_means(edits, ["layer"], "change")
    joined = place_means(edits.drop(columns=[*SHOWN_COLUMNS[1:]]), ["layer"], "change")
    pd.testing.assert_frame_equal(both, joined)
    pairs = cities(1)  # every reverse query is one prompt, so is every forward one
    assert set(logit_contributions(PROBES["storage"](model_of("same_target"), pairs))["facts"]) == {CITIES}


def test_halves_of_a_ranking_are_told_by_the_prompts_of_their_direction() -> None:
    options = {"top": 1, "progress": False}
    apart, joined = (
        rp.rank_heads(model_of("swapped"), cities(kind="swapped"), direction="forward", edit=edit, **options)
        for edit in ("knockout", "transplant")
    )
    assert (apart.facts, apart.prompts) == (CITIES // 2, 0)
    assert (joined.facts, joined.prompts) == (CITIES // 2, COUNTRIES // 2), "a transplant is of both queries"


def test_questions_are_joined_within_their_direction() -> None:
    """A fact's forward question shares no prompt, its reverse one that of its sibling."""
    frame = pd.DataFrame({"fact": ["a", "a", "b", "b", "c", "c"], "direction": ["F", "R"] * 3})
    found = with_shown(frame, ["fa", "r", "fb", "r", "fc", "rc"])
    assert found["shown"].tolist() == ["a", "a", "b", "a", "c", "c"]
    sizes = {one: Facts.of_rows(rows).sizes["prompts"] for one, rows in found.groupby("direction")}
    assert sizes == {"F": 0, "R": 2} and Facts.of_rows(found).sizes["prompts"] == 2
    assert "shown" not in with_shown(frame, list("abcdef"))


def test_groups_are_large_enough_by_prompts_and_not_by_labels() -> None:
    """9 cities of 3 countries were nine facts, a group large enough for a correlation of its own."""
    model = model_of("same_target")
    few, many = (PROBES["attention"](model, cities(count, places=2)) for count in (4, CITIES))
    assert few.meta["statistic"] == "pooled within-group r" and "at least 8" in many.meta["statistic"]
    assert "shown" not in many.frame, "each city has a country of its own"


@pytest.mark.parametrize("kind", ["same_target", "swapped"])
def test_units_are_those_of_a_slow_search_over_what_the_model_is_given(kind: str) -> None:
    """Every two pairs compared, again and again, on the tokens a masked or causal model gets before its answer."""
    rng = np.random.default_rng(0)
    pairs = []
    for fact in range(30):
        c, k = 10 + int(rng.integers(20)), 32 + int(rng.integers(16))
        more = [3] * int(rng.integers(3))
        forward = rp.Query([c, *more, k], [len(more) + 1], [0]) if kind == "swapped" else None
        forward = forward or rp.Query([c, *more, k], [0], [len(more) + 1])
        pairs.append(rp.ReversalPair(forward, rp.Query([k, 5, *more, c], [len(more) + 2], [0]), kind, f"f{fact % 25}"))
    shown = []
    for pair in pairs:
        sides = []
        for query in (pair.forward, pair.reverse):
            (at,) = query.target_positions
            tokens = torch.tensor(query.token_ids)
            tokens[at] = MASK
            sides.append(tokens[:at].tolist() if kind == "swapped" else tokens.tolist())
        shown.append(sides)
    group = list(range(len(pairs)))
    for _ in pairs:
        for i, one in enumerate(pairs):
            for j, other in enumerate(pairs):
                if one.fact == other.fact or shown[i][0] == shown[j][0] or shown[i][1] == shown[j][1]:
                    group[i] = group[j] = min(group[i], group[j])
    found = facts_of(asked_pairs(model_of(kind), rp.ReversalPairs.from_pairs(pairs), ""))
    assert len(set(group)) == len(set(found.unit)) < 25
    assert len({*zip(group, found.unit, strict=True)}) == len(set(group))


def test_what_is_shown_is_not_what_the_model_makes_of_it() -> None:
    """A model that answers everything alike has equal scores, and facts of prompts of their own all the same."""
    model = radd()
    with torch.no_grad():
        for weight in model.module.parameters():
            weight.zero_()
    assert PROBES["probability"](model, cities(CITIES)).prompts == 0


def test_a_query_read_in_blocks_is_what_stands_in_sight_of_its_rows() -> None:
    """Of the blocks behind, nothing is shown: facts that differ there alone are one prompt."""
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(
            rp.Query([10, 11, 30 + i, 12, 40 + i], [2], [0]),
            rp.Query([10, 13, 14, 30 + i, 40 + i], [3], [0]),
            fact=str(i),
        )
        for i in range(4)
    )
    assert facts_of(asked_pairs(in_blocks(4), pairs, "")).sizes == {"facts": 4, "prompts": 1}
    assert facts_of(asked_pairs(radd(), pairs, "")).sizes == {"facts": 4, "prompts": 0}


def test_queries_whose_evidence_no_row_sees_are_one_prompt_with_no_other() -> None:
    """All that is in sight of them may be their template, and none has a number: it joined every fact of a list."""
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(
            rp.Query([40 + i, 13, 14, 15, 30 + i], [4], [0]),
            rp.Query([10, 11, 30 + i, 12, 13, 40 + i], [2], [5]),
            fact=str(i),
        )
        for i in range(9)
    )
    model = in_blocks(4)
    assert facts_of(asked_pairs(model, pairs, "")).sizes == {"facts": 9, "prompts": 0}
    table = PROBES["probability"](model, pairs).summary(by="direction").set_index("direction")
    assert table.loc["reverse", "n"] == 0 and table.loc["forward", "n"] == 9
    assert np.isfinite(table.loc["forward", ["low", "high"]].astype(float)).all()


def test_readings_of_facts_of_one_prompt_alone_have_no_interval() -> None:
    reading = PROBES["gradient"](model_of("same_target"), cities(1))
    assert np.isnan(reading.interval).all() and reading.undefined[ONE_PROMPT] == CITIES
    assert reading.control is None and reading.undefined[NO_UNLIKE] == CITIES


def test_a_saved_reading_and_some_of_its_rows_draw_prompts(tmp_path: Path) -> None:
    reading = PROBES["gradient"](model_of("same_target"), cities())
    loaded = rp.Reading.load(reading.save(tmp_path / "one.parquet"))
    assert (loaded.interval, loaded.prompts) == (reading.interval, COUNTRIES) and repr(loaded) == repr(reading)
    some = reading.part(reading.frame[reading.frame["fact"].isin([f"c{i:02}" for i in range(6)])])
    assert (some.facts, some.prompts) == (6, 4)
    without = reading.part(reading.frame.drop(columns=[*SHOWN_COLUMNS]))  # as older files are
    assert (without.facts, without.prompts) == (CITIES, 0) and without.value == pytest.approx(reading.value)


def test_parts_share_prompts_with_one_another(tmp_path: Path) -> None:
    """Parts of three pairs hold one city of each country: each part alone has no prompt that two facts share."""
    model = model_of("same_target")
    table = rp.probe_in_parts(model, cities(), tmp_path / "parts", size=4, progress=False)
    whole = pd.concat([one.measures() for one in rp.probe(model, cities(), progress=False)], ignore_index=True)
    same = ["value", "low", "high", "n", "facts"]
    np.testing.assert_allclose(table[same].astype(float), whole[same].astype(float), rtol=1e-5, atol=1e-7)


def test_two_models_are_compared_over_prompts() -> None:
    """Differences, controls and excesses, over the prompts of both."""
    masked, other = (radd(n_layers=2, n_heads=2, scale=0.4, seed=seed) for seed in (0, 1))
    found, expected = (
        rp.compare_models({"a": masked, "b": other}, cities(by=by), progress=False).frame for by in ("city", "country")
    )
    assert set(found["measure"]) >= {"attention_correlation", "gradient_cosine", "reverse_probability"}
    columns = ["value", "low", "high", "n"]
    pd.testing.assert_frame_equal(found[columns], expected[columns])
    beside = ["control", "excess", "excess_low", "excess_high"]  # of partners by label, but of the attention's
    shuffled = found["measure"] == "attention_correlation"
    pd.testing.assert_frame_equal(found.loc[shuffled, beside], expected.loc[shuffled, beside])
    assert set(found["facts"]) == {CITIES}


def test_facts_that_either_of_two_models_is_shown_as_one_are_one_to_both() -> None:
    """A causal model sees less of a query than a masked one. By a slow search over all rows of both, of random prompts;
    also where a model lacks some of the other's facts.
    """
    rng = np.random.default_rng(0)
    for _ in range(20):
        sides = []
        for _ in range(2):
            facts = rng.permutation(12)[: rng.integers(4, 12)]
            size = 1 + int(rng.integers(3))
            prompt = {fact: min(one for one in facts if one // size == fact // size) for fact in facts}
            rows = rng.choice(facts, 30)
            label, unit = (np.array([f"f{one:02}" for one in of]) for of in (rows, [prompt[row] for row in rows]))
            sides.append((label, unit))
        group = {fact: fact for label, _ in sides for fact in label}
        for _ in range(24):
            for label, unit in sides:
                for i, one in enumerate(label):
                    for j, other in enumerate(label):
                        if unit[i] == unit[j]:
                            group[one] = group[other] = min(group[one], group[other])
        found = drawn_alike(*(Facts(*side) for side in sides))
        for side, (label, _) in zip(found, sides, strict=True):
            assert side.label.tolist() == label.tolist()
            assert side.unit.tolist() == [group[one] for one in label]


def test_rows_of_two_readings_may_give_a_fact_two_prompts() -> None:
    facts = Facts.of(np.array(["a", "b", "c", "d", "a"]), np.array(["a", "a", "c", None, "c"], dtype=object))
    assert facts.unit.tolist() == ["a", "a", "a", "d", "a"] and facts.sizes == {"facts": 4, "prompts": 2}


def controls_of(pairs: rp.ReversalPairs, model: rp.ProbedModel) -> dict[str, np.ndarray]:
    """Whose query, or evidence, each control takes: of each probe, the partners of the pairs."""
    asked = asked_pairs(model, pairs, "")
    priced = target_partners(asked, model.logit_shift)
    return {
        "gradient": run_pass(model, pairs, Plan(attention=True, progress=False)).partner,
        "storage": control_partners(asked, model.logit_shift),
        "stored once": _Tests.of(model, asked, Plan(progress=False), 0.1, None).partner,
        **priced,
    }


@pytest.mark.parametrize("kind", ["same_target", "swapped"])
def test_no_control_meets_its_own_question_evidence_or_target(kind: str) -> None:
    """Siblings of two kinds at once: cities share countries, and every city is told of twice."""
    pairs = []
    for city in range(CITIES):
        for k in {30 + city % 3, 30 + (city + 3 * (city > 5)) % 3}:
            for c in (10 + city, 40 + city % 6):
                forward = rp.Query([c, 2, k], [2], [0]) if kind == "swapped" else rp.Query([c, 2, k], [0], [2])
                pairs.append(rp.ReversalPair(forward, rp.Query([k, 5, c], [2], [0]), kind, f"{c} of {k}"))
    made, model = rp.ReversalPairs.from_pairs(pairs), model_of(kind)
    for name, partner in controls_of(made, model).items():
        assert (partner >= 0).any(), f"{name} has no control at all"
        for own, other in zip(made, [None if j < 0 else made[int(j)] for j in partner], strict=True):
            if other is not None:
                for mine, theirs in ((own.forward, other.forward), (own.reverse, other.reverse)):
                    assert mine.target != theirs.target, f"{name}: the same target"
                    assert mine.evidence != theirs.evidence, f"{name}: the same evidence"


def test_a_control_at_the_same_evidence_was_the_value_itself() -> None:
    """Where all ask from one country, S of the control was S of the value, to the digit, and so was a probability."""
    model = model_of("same_target")
    for name in ("storage", "probability", "gradient", "lens"):
        reading = PROBES[name](model, cities(1))
        assert reading.control is None and reading.excess is None, name
        why = NO_UNLIKE if name == "gradient" else NO_LIKE_TARGET
        assert reading.undefined[why] == CITIES, name


def test_a_ranking_of_heads_shows_no_prompt_that_it_ranked_by() -> None:
    """The halves were told apart by query, whose hidden target made two of one."""
    found = rp.rank_heads(model_of("same_target"), cities(), top=1, progress=False)
    halves = found.meta["training_facts"], found.frame["fact"]
    countries = [{int(fact[1:]) % COUNTRIES for fact in half} for half in halves]
    assert not countries[0] & countries[1] and len(countries[0] | countries[1]) == COUNTRIES
    assert found.prompts == len(countries[1]) < found.facts


def test_an_audit_has_each_prompt_once() -> None:
    """The same keys again and again are no further facts of a covariance."""
    model = model_of("same_target")
    found, expected = (
        rp.audit_assumptions(model, at_equal_distance(by), permutations=40) for by in ("city", "country")
    )
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert found.meta["pairs_audited"] == COUNTRIES and sum(found.meta["pairs_left_out"].values()) == 8


def at_equal_distance(by: str) -> rp.ReversalPairs:
    """`cities`, asked as the theorem speaks of them; of a country the first city alone, where that is the fact."""
    pairs = []
    for city in range(CITIES if by == "city" else COUNTRIES):
        c, k = 10 + city, 30 + city % COUNTRIES
        pairs.append(rp.ReversalPair(rp.Query([c, 2, k], [0], [2]), rp.Query([k, 5, c], [2], [0]), fact=f"c{city:02}"))
    return rp.ReversalPairs.from_pairs(pairs)
