"""`revprobe probe --controls`: a table of them, in the readings that are written too; a wrong one is one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

import revprobe as rp
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig

TRAINING = "training: {steps: 4, batch_size: 16, warmup_steps: 2, device: cpu}\nsnapshots: {every: 4}\n"
RUN = f"name: NAME\nrelation: {{length: 4}}\nmodel: {{d_model: 16, family: FAMILY}}\n{TRAINING}"
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("trained")
    made = {}
    for name, family in (("child", "radd"), ("elder", "gpt2")):
        text = RUN.replace("NAME", name).replace("FAMILY", family)
        made[name] = rp.train(parse_config(text, RunConfig, "test"), home / name).path
    return made


def test_every_control_stands_in_the_table_and_in_the_readings(
    cli: Cli, trained: dict[str, Path], tmp_path: Path
) -> None:
    asked = ["probe", trained["child"], "--pairs", "letters:4", "--out", "readings"]
    code, out, err = cli(*asked, "--controls", "all", "--parent", trained["elder"])
    assert (code, err) == (0, "")
    for words in ("shuffled facts", "untrained twin", "neighbour", "attention sink", "parent", "elder"):
        assert words in out, words
    assert "a gradient is of parameters and attends to no position" in out
    assert "asked with pairs of kind swapped, so without a difference" in out
    attention, gradient, probability = rp.Readings.load(tmp_path / "readings")
    names = ["shuffled", "untrained", "neighbour", "sink", "parent"]
    assert attention.controls["control"].tolist() == gradient.controls["control"].tolist() == names
    assert "controls" not in probability.meta
    elder = rp.load_model(trained["elder"])
    expected = rp.probe_gradient_cosine(elder, rp.letter_pairs(4, model=elder).for_probe("gradient"), control=False)
    table = gradient.controls.set_index("control")
    assert table.loc["parent", "value"] == pytest.approx(expected.value)


def test_without_controls_no_table_is_shown(cli: Cli, trained: dict[str, Path]) -> None:
    code, out, _ = cli("probe", trained["child"], "--pairs", "letters:4", "--probes", "gradient")
    assert code == 0 and "reading - control" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--controls", "neighbor"], "unknown control 'neighbor'; the closest is 'neighbour'"),
        (["--controls", "parent"], "--controls parent needs the parent; name it with --parent MODEL"),
        (["--parent", "gpt2"], "--parent gpt2 is not asked for; add parent to --controls, or let it be all"),
        (["--parent", "gpt2", "--controls", "sink"], "--parent gpt2 is not asked for"),
        (["--controls", "all", "--parent-pairs", "x.jsonl"], "--parent-pairs x.jsonl without --parent"),
        (["--controls", "all", "--load", "parent:dtype=bfloat16"], "--load parent:dtype=bfloat16 without --parent"),
        (["--controls", "all", "--probes", "probability"], "expected attention or gradient among --probes"),
    ],
)
def test_what_does_not_fit_is_one_line_before_a_model_is_loaded(cli: Cli, arguments: list[str], words: str) -> None:
    code, _, err = cli("probe", "no-such-model", "--pairs", "letters:4", *arguments)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def test_the_parents_own_options_reach_the_parent_alone(
    cli: Cli, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from revprobe.models import registry
    from revprobe.probes.passes import shared_out

    given: dict[str, dict[str, object]] = {}
    load = registry.load_model

    def loaded(source: str, /, **options: object) -> rp.ProbedModel:
        given[Path(source).name] = options
        return load(source)

    for where in (registry, shared_out):
        monkeypatch.setattr(where, "load_model", loaded)
    asked = ["probe", trained["child"], "--pairs", "letters:4", "--probes", "gradient", "--controls", "parent"]
    code, _, err = cli(*asked, "--parent", trained["elder"], "--load", "parent:dtype=float32", "--load", "name=mine")
    assert (code, err) == (0, "")
    assert given["elder"]["dtype"] == "float32" and "dtype" not in given["child"]
    assert given["child"]["name"] == "mine" and "name" not in given["elder"]


def test_a_parent_that_is_not_there_is_named_before_anything_is_probed(
    cli: Cli, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from revprobe.finetune.training import probe_callback

    monkeypatch.setattr(probe_callback, "take_readings", lambda *_, **__: pytest.fail("probed"))
    code, _, err = cli(
        "probe", trained["child"], "--pairs", "letters:4", "--controls", "all", "--parent", "no-such-parent"
    )
    assert code == 1 and "no-such-parent" in err and err.count("\n") == 1, err
