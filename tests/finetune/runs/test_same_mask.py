"""A fine-tuning goes on with the mask token that it was trained with, whatever it noted and by whatever software."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_finetuning import config_of, go_on

import revprobe as rp
from revprobe.finetune.runs.started_with import _mask_of_checkpoint
from revprobe.models import registry


def another_mask_id(base: Path) -> None:
    """A token that no row holds, in tokenizer and config alike."""
    other = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    for name, change in {"config.json": {"mask_token_id": other}, "tokenizer_config.json": {"mask_token": "~"}}.items():
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | change))


def another_mask_text(base: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text((base / name).read_text().replace("<|mask|>", "[M]"))


def saying_less(home: Path, state: str) -> None:
    """The run by other software, and by one that noted less of its mask; or without what it noted."""
    file, versions = home / "ft" / "resolved.json", home / "ft" / "versions.json"
    versions.write_text(json.dumps(json.loads(versions.read_text()) | {"transformers": "4.0.0"}))
    left = {"all": set(), "id": {"mask_token"}, "no mask": {"mask_token", "mask_token_id"}}
    left["no digests"] = left["no mask"] | {"digests"}
    if state == "nothing":
        file.unlink()
    else:
        told = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in told.items() if key not in left[state]}))


@pytest.mark.parametrize("state", ["all", "id", "no mask", "no digests", "nothing"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_mask_id, r"mask_token_id 3 -> \d+, mask_token '<\|mask\|>' -> '~' changed"),
        (another_mask_text, r"mask_token '<\|mask\|>' -> '\[M\]' changed"),
    ],
)
def test_another_mask_token_is_refused_whatever_the_run_noted(
    home: Path, change: Callable[[Path], None], words: str, state: str
) -> None:
    """Its newest checkpoint has the tokenizer of then: runs that noted no mask went on with another."""
    saying_less(home, state)
    before = shutil.copytree(home / "ft", home / "before")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert go_on(home).finished, "with the mask that it was trained with"
        change(home / "base")
        with pytest.raises(rp.RevprobeError, match=f"other data: {words}; restore the tokenizer and config.json of "):
            rp.fine_tune(config_of(home, {"name": str(home / "base")}), before, listener=False)


def test_the_mask_of_a_whole_model_is_in_its_config(home: Path) -> None:
    """Where the tokenizer calls none of its tokens the mask; a damaged file says nothing."""
    checkpoint = home / "ft" / "checkpoints" / "step-000002"
    file = checkpoint / "tokenizer_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in plain.items() if key != "mask_token"}))
    config = config_of(home, {"name": str(home / "base")})
    assert _mask_of_checkpoint(home / "ft", config, None) == {}
    (checkpoint / "config.json").write_text('{"mask_token_id": 2}')
    assert _mask_of_checkpoint(home / "ft", config, None) == {"mask_token_id": 2, "mask_token": "<|pad|>"}
    assert _mask_of_checkpoint(home / "ft", config, 1) == {"mask_token_id": 1, "mask_token": "<|end|>"}
    for told in (0, "<|begin|>"):
        named = config_of(home, {"name": str(home / "base"), "mask_token_id": told})
        assert _mask_of_checkpoint(home / "ft", named, None) == {"mask_token_id": 0, "mask_token": "<|begin|>"}
    (checkpoint / "config.json").write_text("{")
    assert _mask_of_checkpoint(home / "ft", config, None) == {}


def test_a_loader_may_take_another_mask_than_its_tokenizer_says(home: Path) -> None:
    """So the checkpoint's tokenizer says nothing against it."""

    def mine(**asked: Any) -> rp.ProbedModel:
        model: Any = rp.load_model(home / "base", **asked)
        model.mask_token_id = model.module.config.mask_token_id = 97
        return model

    saying_less(home, "nothing")
    config = home / "ft" / "config.yaml"
    config.write_text(config.read_text().replace(f"name: {home / 'base'}", "name: mine"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(registry._LOADERS, "mine", mine)
        assert rp.fine_tune(config_of(home, {"name": "mine"}), home / "ft", listener=False).finished


def test_a_base_that_was_read_in_blocks_is_no_other_reading_of_one_that_is_not(home: Path) -> None:
    """A base that is read as a whole notes no block size, and what one of the two lacked was not compared."""
    saying_less(home, "all")
    file = home / "ft" / "resolved.json"
    told = json.loads(file.read_text())
    other = {"block_size": 4, "digests": told["digests"] | {"settings": "of another reading"}}
    file.write_text(json.dumps(told | other))
    with warnings.catch_warnings(), pytest.raises(rp.RevprobeError, match="other data: block_size 4 -> None changed"):
        warnings.simplefilter("ignore")
        go_on(home)
