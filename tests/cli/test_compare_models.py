"""`revprobe compare-models`: what it prints and leaves behind, and that every bad input ends in one clear line."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import transformers

import revprobe as rp
from revprobe.models.families.a2d import A2DQwen3Config, A2DQwen3ForMaskedDiffusion
from tiny import GROUPED, MASK, drawn, language_model

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twins of one set of weights, each with a tokenizer, and the pairs that both are asked."""
    home, tokenizer = tmp_path_factory.mktemp("twins"), rp.letter_tokenizer()
    module = drawn(lambda: language_model(transformers.Qwen3Config(**GROUPED)), scale=0.3)
    other = A2DQwen3ForMaskedDiffusion(A2DQwen3Config(**GROUPED, mask_token_id=MASK, block_size="whole"))
    other.load_state_dict(module.state_dict())
    for name, model in (("parent", module), ("child", other)):
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    pairs = rp.letters(4, 12).pairs(rp.load_model(home / "parent"))
    pairs.save(home / "pairs.jsonl")
    pairs.for_probe("gradient")[:20].save(home / "fewer.jsonl")
    return home


@pytest.fixture
def compare(cli: Cli, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Cli:
    """`revprobe compare-models` where the twins are."""
    monkeypatch.chdir(folder)
    return partial(cli, "compare-models")


TWINS = ("AR parent=parent", "diffusion child=child")


def test_numbers_are_printed_and_kept(compare: Cli, folder: Path, tmp_path: Path) -> None:
    code, out, err = compare(*TWINS, "--pairs", "pairs.jsonl", "--out", tmp_path / "compared")
    assert code == 0, err
    assert "diffusion child - AR parent" in out and "reverse probability" in out and "/ 12" in out
    saved = rp.ModelComparison.load(tmp_path / "compared")
    models = {"AR parent": folder / "parent", "diffusion child": folder / "child"}
    same = rp.compare_models(models, rp.ReversalPairs.load(folder / "pairs.jsonl", tokenizer=rp.letter_tokenizer()))
    pd.testing.assert_frame_equal(saved.frame, same.frame)
    assert saved.asked == same.asked
    table = pd.read_csv(tmp_path / "compared" / "comparison.csv")
    assert table["value"].tolist() == pytest.approx(same.frame["value"].tolist())
    assert "plotly" in (tmp_path / "compared" / "comparison.html").read_text(encoding="utf-8")[:10_000].lower()
    code, _, err = compare(*TWINS, "--pairs", "pairs.jsonl", "--probes", "probability", "--out", tmp_path / "compared")
    assert code == 0, err  # an older comparison is replaced
    assert set(rp.ModelComparison.load(tmp_path / "compared").frame["measure"].str.split("_").str[1]) == {
        "probability",
        "accuracy",
    }


def test_each_model_may_have_pairs_of_its_own(compare: Cli) -> None:
    code, out, err = compare(
        *TWINS, "--pairs", "diffusion child=fewer.jsonl", "--pairs", "pairs.jsonl", "--probes", "probability"
    )
    assert code == 0, err
    assert "asked of AR parent alone" in " ".join(out.split())


def test_what_a_models_files_do_not_say_is_told_of_it_alone(compare: Cli, folder: Path) -> None:
    """The child as an A2D folder is published: neither block size nor mask token in its config."""
    settings = json.loads((folder / "child" / "config.json").read_text())
    del settings["mask_token_id"], settings["block_size"]
    shutil.copytree(folder / "child", folder / "published", dirs_exist_ok=True)
    (folder / "published" / "config.json").write_text(json.dumps(settings))
    twins = ("parent=parent", "child=published", "--pairs", "pairs.jsonl", "--probes", "probability")
    code, _, err = compare(*twins)
    assert code == 1 and err.startswith("error: child: ") and "pass block_size=" in err
    load = {"child": {"block_size": 1, "mask_token_id": MASK, "logit_shift": 1}}
    told = [f"child:{option}={value}" for option, value in load["child"].items()]
    code, _, err = compare(*twins, *(part for one in told for part in ("--load", one)))
    assert code == 0, err
    models = {"parent": folder / "parent", "child": folder / "published"}
    pairs = rp.ReversalPairs.load(folder / "pairs.jsonl", tokenizer=rp.letter_tokenizer())
    apart = rp.compare_models(models, pairs, only=["probability"], load=load).frame.query("part == 'difference'")
    assert apart["value"].abs().max() < 1e-6, "in blocks of one, read at the parent's rows, it is the parent"


def test_letters_of_the_two_objectives_are_of_two_kinds(compare: Cli) -> None:
    code, out, err = compare(*TWINS, "--pairs", "letters:4", "--probes", "probability")
    assert code == 0, err
    assert "pairs of different kinds: same_target and swapped" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a=parent", "--pairs", "pairs.jsonl"], "models to compare: 1; expected two or more"),
        (["parent", "b=child", "--pairs", "pairs.jsonl"], "'parent': expected NAME=MODEL, such as parent=gpt2"),
        (["a=", "b=child", "--pairs", "pairs.jsonl"], "'a=': expected NAME=MODEL"),
        (["a=parent", "a=child", "--pairs", "pairs.jsonl"], "two models are called 'a'"),
        (["a=parent", "b=child", "--pairs", "a=pairs.jsonl"], "no --pairs for 'b'; add --pairs b=FILE"),
        (["a=parent", "b=child", "--pairs", "pair=pairs.jsonl"], "'pair' is none of the models; expected one of a, b"),
        (["a=parent", "b=child", "--pairs", "a=x", "--pairs", "a=y"], "'a' has pairs already"),
        (["a=parent", "b=child", "--pairs", "x", "--pairs", "y"], "all models have 'x' already; use NAME=FILE"),
        (["a=parent", "b=child", "--pairs", "none.jsonl"], "a: no pairs file at 'none.jsonl'"),
        (["a=parent", "b=nowhere/at/all/b", "--pairs", "pairs.jsonl"], "b: no model folder at 'nowhere/at/all/b'"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--load", "c:x=1"], "'c' is none of the models"),
        (
            ["a=parent", "b=child", "--pairs", "pairs.jsonl", "--load", "b:x=1"],
            "b: load_model and from_pretrained have no",
        ),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--load", "b:device=cpu"], "this command has --device"),
        (["a=parent", "b=child", "--pairs", "letters:ten"], "expected letters:LENGTH"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--probes", "gradients"], "unknown probe 'gradients'"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--probes", ","], "no probe was named"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--out", "parent"], "'parent' holds 'config.json'"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--out", "pairs.jsonl"], "'pairs.jsonl' is a file"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--load", "c:dtype=float32"], "'c' is none of the models"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--load", "b:blocks"], "'blocks': expected NAME=VALUE"),
        (["a=parent", "b=child", "--pairs", "pairs.jsonl", "--load", "device=cpu"], "has --device of its own"),
    ],
)
def test_whatever_is_wrong_is_one_line(compare: Cli, arguments: list[str], words: str, folder: Path) -> None:
    code, _, err = compare(*arguments, *([] if "--probes" in arguments else ["--probes", "probability"]))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err
    assert (folder / "parent" / "config.json").is_file(), "a folder that is in the way is left alone"


def test_usage(compare: Cli) -> None:
    code, out, _ = compare("--help")
    assert code == 0 and "revprobe compare-models" in " ".join(out.split()).split("Example", 1)[1]
    assert compare(*TWINS)[0] == 2
