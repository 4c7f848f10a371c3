"""A fine-tuning goes on with the rows, pairs, facts and base that it was started with, or not at all."""

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoint_files import in_cache
from safetensors.torch import load_file, save_file
from stopped_finetuning import config_of, facts_told, go_on

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.runs.started_with import FORMULAS_NOW, base_digests, require_same_start
from revprobe.models import registry


def other_facts(home: Path) -> None:
    (home / "facts.csv").write_text(facts_told(5))


def other_base(home: Path, folder: Path | None = None) -> None:
    file = (folder or home / "base") / "model.safetensors"
    save_file({name: value + 0.5 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def another_reading_of_the_base(home: Path) -> None:
    file = home / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))


def one_held_out_fact(home: Path) -> None:
    """A name that no row and no probed pair holds: it is asked for at the end all the same."""
    relation = rp.from_table(
        home / "facts.csv",
        columns=["parent", "child"],
        templates={"P2C": "Fact: {parent} has the child {child}", "C2P": "Fact: {child} has the parent {parent}"},
        heldout=0.2,
    )
    held = relation.facts[relation.facts["split"] == "heldout"]["child"].iloc[0]
    (home / "facts.csv").write_text(facts_told().replace(held, held[:-1] + "o"))


def without_digests(home: Path) -> None:
    file = home / "ft" / "resolved.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "digests"}))


@pytest.mark.parametrize("of_before", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            other_facts,
            r"other data: .*facts changed; restore .*facts.csv \(the run's own copy is .*relation/facts.csv\)",
        ),
        (other_base, "other data: base model changed; restore .*base, or choose another"),
        (another_reading_of_the_base, "other data: base model changed; restore .*base, or choose another"),
        (one_held_out_fact, "other data: .*facts.* changed; restore .*facts.csv"),
    ],
)
def test_a_resume_with_other_data_is_refused(
    home: Path, change: Callable[[Path], None], words: str, of_before: bool
) -> None:
    """Nothing of the folder is touched but its problem; what is put back goes on. Runs of before have no digests."""
    if of_before:
        without_digests(home)
        if change is another_reading_of_the_base:
            pytest.skip("runs of before kept the sha256 of the weights alone")
    kept = (home / "ft" / "resolved.json").read_bytes(), (home / "facts.csv").read_bytes()
    change(home)
    with pytest.raises(rp.RevprobeError, match=words):
        go_on(home)
    assert (home / "ft" / "resolved.json").read_bytes() == kept[0]
    assert rp.open_run(home / "ft").steps == [0, 2]
    assert (home / "ft" / "relation" / "facts.csv").read_bytes() == kept[1], "its own copy stays"


@pytest.mark.parametrize("of_before", [False, True])
def test_the_same_data_goes_on_and_what_it_was_started_with_stays(home: Path, of_before: bool) -> None:
    if of_before:
        without_digests(home)
    resolved = (home / "ft" / "resolved.json").read_bytes()
    assert ("digests" in json.loads(resolved)) != of_before
    run = go_on(home)
    assert run.finished and (home / "ft" / "resolved.json").read_bytes() == resolved
    # A reading that is lost is taken again from its checkpoint, which is of the first facts.
    shutil.rmtree(home / "ft" / "readings" / "step-000002")
    other_facts(home)
    with pytest.raises(rp.RevprobeError, match="was started with other data"):
        go_on(home)
    (home / "facts.csv").write_text(facts_told())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert go_on(home).finished


def test_before_there_is_a_checkpoint_the_facts_may_change(home: Path) -> None:
    """Nothing was trained on the old ones: the new are told and copied."""
    old = json.loads((home / "ft" / "resolved.json").read_text())
    shutil.rmtree(home / "ft" / "checkpoints")
    other_facts(home)
    assert go_on(home).finished
    new = json.loads((home / "ft" / "resolved.json").read_text())
    old, new = old["digests"], new["digests"]
    assert [key for key in old if new[key] != old[key]] == ["rows", "pairs", "facts"]
    assert set(new) == {*old} == {"rows", "pairs", "facts", "weights", "settings"}
    assert (home / "ft" / "relation" / "facts.csv").read_text() == facts_told(5)


def a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[], object]]:
    """Its newest checkpoint is taken, and another one is added."""
    run = home / "of a run" / "checkpoints"
    shutil.copytree(home / "base", run / "step-000001")
    (run / "step-000001" / "COMPLETE").touch()

    def change() -> None:
        other_base(home)
        shutil.copytree(home / "base", run / "step-000002")
        (run / "step-000002" / "COMPLETE").touch()

    return str(run.parent), change


def a_runs_average(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[], object]]:
    name, _ = a_run(home, monkeypatch)
    average = Path(name) / "checkpoints" / "step-000001" / "ema"
    shutil.copytree(home / "base", average)
    return name, lambda: other_base(home, average)


def a_loader(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[], object]]:
    """Of a name that is no name on the hub."""
    name = "my model: a/b/c"
    monkeypatch.setitem(registry._LOADERS, name, lambda **asked: rp.load_model(str(home / "base"), **asked))
    return name, lambda: other_base(home)


def a_loader_in_a_mode(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[], object]]:
    """What changes is no file and no weight."""
    epsilon: dict[str, float] = {}

    def load(**asked: Any) -> rp.ProbedModel:
        model = rp.load_model(str(home / "base"), **asked)
        for part in model.module.modules():
            if hasattr(part, "variance_epsilon"):
                part.variance_epsilon = epsilon.get("now", part.variance_epsilon)
        return model

    monkeypatch.setitem(registry._LOADERS, "mine", load)
    return "mine", lambda: epsilon.update(now=0.3)


def on_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[], object]]:
    """Its commit moves with every file of the repository, as a README."""
    cache = home / "hub"
    in_cache(home / "base", "owner/base", cache, commit="a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def change() -> None:
        other_base(home)
        in_cache(home / "base", "owner/base", cache, commit="c" * 40)

    return "owner/base", change


def a_loader_called_as_one_on_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[], object]]:
    name, _ = on_the_hub(home, monkeypatch)
    monkeypatch.setitem(registry._LOADERS, name, lambda **asked: rp.load_model(str(home / "base"), **asked))
    return name, lambda: other_base(home)


KINDS = [a_run, a_runs_average, a_loader, a_loader_in_a_mode, on_the_hub, a_loader_called_as_one_on_the_hub]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_base_is_held_to_what_was_loaded(
    home: Path, kind: Callable[..., tuple[str, Callable[[], object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was started on the same weights in a folder: it goes on with them by any name, and with no others."""
    name, change = kind(home, monkeypatch)
    config = home / "ft" / "config.yaml"
    config.write_text(config.read_text().replace(f"name: {home / 'base'}", f"name: '{name}'"))
    before = shutil.copytree(home / "ft", home / "before")
    if kind is on_the_hub:  # a commit that leaves the weights as they are
        in_cache(home / "base", name, home / "hub", commit="b" * 40)
    assert rp.fine_tune(config_of(home, {"name": name}), home / "ft", listener=False).finished
    change()
    with pytest.raises(rp.RevprobeError, match=f"other data: base model changed; (restore|have the loader).*{name}"):
        rp.fine_tune(config_of(home, {"name": name}), before, listener=False)


def with_digest_of_files(home: Path, digest: str) -> None:
    """As runs of before had it: of the base's files, or of its commit."""
    file = home / "ft" / "resolved.json"
    resolved = json.loads(file.read_text())
    kept = {key: value for key, value in resolved["digests"].items() if key in ("rows", "pairs", "facts")}
    file.write_text(json.dumps(resolved | {"digests": kept | {"base": digest}}))


def test_runs_started_with_the_digest_of_files_go_on(home: Path) -> None:
    """Files of a folder are held to it as before; a commit, which says nothing of the weights, refuses nothing."""
    files = (home / "base" / "config.json", home / "base" / "model.safetensors")
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    with_digest_of_files(home, hashlib.sha256("".join(f"{line}\0" for line in lines).encode()).hexdigest())
    before = shutil.copytree(home / "ft", home / "before")
    assert go_on(home).finished
    another_reading_of_the_base(home)
    with pytest.raises(rp.RevprobeError, match="other data: base model changed"):
        rp.fine_tune(config_of(home, {"name": str(home / "base")}), before, listener=False)
    with_digest_of_files(home, "0" * 64)
    shutil.copytree(home / "base", home / "moved")
    config = home / "ft" / "config.yaml"
    config.write_text(config.read_text().replace(f"name: {home / 'base'}", "name: mine"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._LOADERS, "mine", lambda **asked: rp.load_model(str(home / "moved"), **asked))
        assert rp.fine_tune(config_of(home, {"name": "mine"}), home / "ft", listener=False).finished


def test_settings_that_other_software_reads_otherwise_are_told(home: Path) -> None:
    """Of files that may be the same; other weights are refused all the same."""
    versions = home / "ft" / "versions.json"
    versions.write_text(json.dumps(json.loads(versions.read_text()) | {"transformers": "4.0.0"}))
    before = shutil.copytree(home / "ft", home / "before")
    another_reading_of_the_base(home)
    with pytest.warns(UserWarning, match=r"settings are not those it was started with.*\(transformers 4.0.0 -> "):
        assert go_on(home).finished
    other_base(home)
    refused = pytest.raises(
        rp.RevprobeError, match=r"base model changed; restore .*base or the versions in versions\.j"
    )
    with warnings.catch_warnings(), refused:
        warnings.simplefilter("ignore")
        rp.fine_tune(config_of(home, {"name": str(home / "base")}), before, listener=False)


@pytest.mark.parametrize("what", ["mask_token_id", "begin_token_id"])
def test_another_mask_token_is_no_other_reading_of_the_same_files(home: Path, what: str) -> None:
    """Software that is another as well explains settings of the base, and not what hides a token or begins a text."""
    versions = home / "ft" / "versions.json"
    versions.write_text(json.dumps(json.loads(versions.read_text()) | {"transformers": "4.0.0"}))
    told = json.loads((home / "ft" / "resolved.json").read_text())
    other = 1 + (told[what] or 0)
    digests = told["digests"] | {"settings": "of another reading"}
    (home / "ft" / "resolved.json").write_text(json.dumps(told | {what: other, "digests": digests}))
    with warnings.catch_warnings(), pytest.raises(rp.RevprobeError, match=f"{what} {other} -> {told[what]}"):
        warnings.simplefilter("ignore")
        go_on(home)
    # A run of before does not say, and what it says otherwise is explained as before.
    (home / "ft" / "resolved.json").write_text(
        json.dumps({key: value for key, value in told.items() if key != what} | {"digests": digests})
    )
    with pytest.warns(UserWarning, match="settings are not those it was started with"):
        assert go_on(home).finished


def test_what_hides_and_what_begins_are_of_the_base(home: Path) -> None:
    """A loader may say them otherwise of the same module."""
    model = rp.load_model(home / "base")
    before = base_digests(model)
    for what, other in {"mask_token_id": 0, "begin_token_id": 7, "logit_shift": 1, "block_size": 2}.items():
        read = copy.copy(model)
        assert getattr(read, what) != other
        setattr(read, what, other)
        now = base_digests(read)
        assert now["weights"] == before["weights"] and now["settings"] != before["settings"], what


@pytest.mark.parametrize(
    ("objective", "more", "words"),
    [
        ("masked", {"evaluation": {"facts": 0}, "training": {"gradient_accumulation": 2}}, None),
        ("causal", {"evaluation": {"facts": 0}, "training": {"gradient_accumulation": 2}}, "mean over a step's tokens"),
        ("causal", {"evaluation": {"facts": 0}}, None),
        ("masked", {"evaluation": {"facts": 0}, "training": {"bf16": True}}, None),
        ("masked", {"evaluation": {"facts": 0}, "training": {"bf16": True}, "lora": None}, "dtype of the weights"),
        ("masked", {"evaluation": {"facts": 5}}, "facts: 5 now draws facts"),
        ("masked", {"evaluation": {"facts": 5}}, "controls of exact match and ranks now ask about another fact"),
    ],
)
def test_a_run_that_goes_on_by_other_formulas_is_told_which(
    tmp_path: Path, objective: str, more: dict[str, Any], words: str | None
) -> None:
    """Of those that the change moves; what other runs come to is the same by both."""
    values = config_of(tmp_path, {"name": "any"}).model_dump(exclude_unset=True)
    values["training"] |= more.get("training", {})
    values["snapshots"]["parameters"] = "all" if "lora" in more else "lora"
    config = FinetuneConfig(**values | {key: one for key, one in more.items() if key != "training"})
    kept = {"objective": objective, "digests": {}}
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002" / "COMPLETE").touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        require_same_start(tmp_path, kept | {"formulas": FORMULAS_NOW}, kept | {"formulas": FORMULAS_NOW}, config)
        assert not said
        require_same_start(tmp_path, kept, kept | {"formulas": FORMULAS_NOW}, config)
        assert [words for one in said if str(words) in str(one.message)] == ([words] if words else [])
        assert len(said) == (words is not None)
        require_same_start(tmp_path, kept | {"formulas": FORMULAS_NOW + 1}, kept, config)
    assert "those of a later version" in str(said[-1].message)


def test_weights_that_hardly_move_are_told(home: Path) -> None:
    """All of them in bfloat16, whether the config or the checkpoint says so; an adapter's own are float32."""
    whole = config_of(home, {"name": str(home / "base"), "dtype": "bfloat16"}).model_dump() | {"lora": None}
    whole["training"] |= {"steps": 1}
    whole["snapshots"] = {"every": 1, "facts": 2, "parameters": "all", "predictions": False, "during_training": False}
    with pytest.warns(UserWarning, match="lora: null trains weights in bfloat16.*float32 with training.bf16: true"):
        rp.fine_tune(FinetuneConfig(**whole), home / "narrow", listener=False)
    file = home / "base" / "model.safetensors"
    save_file({k: v.to(torch.float16) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config = home / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    whole["model"] = {"name": str(home / "base")}
    with pytest.warns(UserWarning, match="lora: null trains weights in float16"):
        rp.fine_tune(FinetuneConfig(**whole), home / "half", listener=False)
    whole["model"] |= {"dtype": "float32"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rp.fine_tune(FinetuneConfig(**whole), home / "wide", listener=False)
    assert not [one for one in said if "lora: null" in str(one.message)]
