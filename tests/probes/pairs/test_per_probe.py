"""Pairs that give each probe a list of its own: which they are, and that they behave as one object."""

from pathlib import Path

import pytest

import revprobe as rp
from revprobe.finetune.config.loading import dump_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.probes.fused import PROBES
from revprobe.probes.pairs.pairs import READERS
from tiny import FIXTURES, drawn, radd

SWEEP = FIXTURES / "v0_1" / "tiny-sweep"
LISTS = ("attention", "gradient", "probability", "stored_evidence")


def arm() -> rp.ProbedModel:
    return rp.ProbedModel(drawn(rp.one_layer_gpt2), rp.letter_tokenizer(), objective="causal")


@pytest.mark.parametrize(("made", "counts"), [(radd, (16, 4, 10, 10)), (arm, (16, 4, 4, 4))], ids=["masked", "causal"])
def test_each_probe_reads_the_pairs_that_suit_it(made, counts) -> None:
    """Every distance x distance, every distance once, every placement once: counted by hand at length 5."""
    model = made()
    pairs = rp.letter_pairs(5, model=model)
    assert [len(pairs.for_probe(name)) for name in LISTS] == [26 * count for count in counts]
    distances = {name: list(zip(*map(list, pairs.for_probe(name).distances()), strict=True)) for name in LISTS}
    assert set(distances["attention"]) == {(f, r) for f in range(1, 5) for r in range(1, 5)}
    assert sorted(set(distances["gradient"])) == [(d, d) for d in range(1, 5)]
    for name, named in (("attention", "grid"), ("probability", "mirror")):
        assert pairs.for_probe(name).digest == rp.letter_pairs(5, model=model, placements=named).digest
    assert set(READERS) == set(PROBES)


@pytest.mark.parametrize("run", sorted(path.name for path in SWEEP.iterdir() if path.is_dir()))
def test_a_run_gives_the_very_pairs_of_its_stored_readings(run: str) -> None:
    """By the digests that version 0.1 wrote; without a model, and with one of the run's own."""
    opened = rp.open_run(SWEEP / run)
    for pairs in (opened.pairs(), opened.pairs(opened.load())):
        stored = {reading.name: reading.meta["pairs"] for reading in opened.readings()}
        assert set(stored) == set(PROBES.values())
        for probe, name in PROBES.items():
            assert pairs.for_probe(probe).has_digest(stored[name]), name


def test_a_run_that_has_not_begun_has_its_pairs_and_a_fine_tuning_those_of_its_model(tmp_path: Path) -> None:
    config = RunConfig(name="new", relation={"length": 4, "alphabet": 5}, training={"steps": 2})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert [len(rp.open_run(tmp_path).pairs().for_probe(name)) for name in LISTS] == [45, 15, 30, 30]
    tuned = rp.open_run(FIXTURES / "v0_1" / "lora")
    pairs = tuned.pairs(rp.load_model(FIXTURES / "v0_1" / "lora" / "base"))
    assert all(pairs.has_digest(r.meta["pairs"]) for r in tuned.readings()) and not pairs.by_probe


def test_the_fused_pass_and_the_single_probes_read_each_its_own() -> None:
    model = radd()
    pairs = rp.letter_pairs(5, model=model)
    counts = {reading.name: reading.meta["pair_count"] for reading in rp.probe(model, pairs)}
    assert counts == {"attention_correlation": 416, "gradient_cosine": 104, "reverse_probability": 260}
    assert rp.probe_attention_correlation(model, pairs).meta["pair_count"] == 416
    crossed = rp.probe_gradient_cosine(model, pairs[:10], cross=True)
    assert crossed.meta["pair_count"] == 10, "a slice is one list for all"
    assert rp.probe_stored_evidence(model, pairs).meta["pair_count"] == 260
    assert rp.probe_route_edit(model, pairs, scope="all").meta["pair_count"] == 260
    bounded = rp.with_bounds(rp.probe_attention_correlation(model, pairs), model, pairs)
    assert len(bounded.frame) == 416
    assert bounded.plot(pairs=pairs).data
    (only,) = rp.probe(model, pairs, only=["probability"])
    assert only.meta["pair_count"] == 260


def test_probes_that_share_a_list_run_each_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sizes of the batches: one pass over the shared list, one over the other."""
    model = radd()
    grid, mirror = (rp.letter_pairs(4, model=model, placements=placed) for placed in ("grid", "mirror"))
    pairs = rp.ReversalPairs(
        mirror.queries, mirror.forward, mirror.reverse, mirror.facts, tokens=mirror.tokens, by_probe={"attention": grid}
    )
    seen = []
    true = model.logits
    monkeypatch.setattr(model, "logits", lambda ids, mask=None: seen.append(len(ids)) or true(ids, mask))
    readings = rp.probe(model, pairs, control=False)
    assert [r.name for r in readings] == list(PROBES.values())
    # At the attention, one query for the parameters used unseen, and one of each first batch by itself.
    looks = [rows for rows in seen if rows <= 3]
    assert sum(seen) - sum(looks) == len(grid.queries) + len(mirror.queries) and len(looks) == 6


def test_they_print_save_and_load_as_one(tmp_path: Path) -> None:
    model = radd()
    pairs = rp.letter_pairs(4, model=model)
    assert "156 pairs of 26 facts" in repr(pairs)
    assert "attention reads 234 pairs of its own; gradient reads 78 pairs of its own" in repr(pairs)
    assert repr(pairs).replace("'", "&#x27;") in pairs._repr_html_()
    loaded = rp.ReversalPairs.load(pairs.save(tmp_path / "pairs.jsonl"), tokenizer=model.tokenizer)
    assert repr(loaded) == repr(pairs)
    for name in LISTS:
        assert loaded.for_probe(name).digest == rp.ReversalPairs.from_pairs(list(pairs.for_probe(name))).digest
        assert list(loaded.for_probe(name)) == list(pairs.for_probe(name))
    one, other = rp.probe(model, pairs), rp.probe(model, loaded)
    for here, there in zip(one, other, strict=True):
        assert here.value == pytest.approx(there.value, abs=1e-7) and here.n == there.n


def test_a_misspelt_probe_and_a_list_of_another_kind_are_refused() -> None:
    mirror = rp.letter_pairs(4, model=radd(), placements="mirror")
    swapped = rp.letter_pairs(4, model=arm(), placements="mirror")
    columns = (mirror.queries, mirror.forward, mirror.reverse, mirror.facts)
    with pytest.raises(
        rp.RevprobeError, match="no probe 'atention' reads pairs of its own; the closest is 'attention'"
    ):
        rp.ReversalPairs(*columns, by_probe={"atention": mirror})
    with pytest.raises(rp.RevprobeError, match=r"by_probe.'gradient'. is .*expected one list of pairs of the kind"):
        rp.ReversalPairs(*columns, by_probe={"gradient": swapped})


def test_one_list_for_all_probes_is_what_a_call_that_names_placements_makes() -> None:
    """The calls of before: grid at another place, all placements; and causal pairs take no offset."""
    model = radd()
    assert not rp.letter_pairs(5, model=model, placements="grid").by_probe
    moved = rp.letter_pairs(5, model=model, offset=1)
    assert not moved.by_probe and len(moved) == 26 * 9
    with pytest.raises(rp.RevprobeError, match="offset 1 for a causal model"):
        rp.letter_pairs(5, model=arm(), offset=1)
