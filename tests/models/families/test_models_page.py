"""docs/models.md and `list_models` say of every family what its description in the code says, and what was measured."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import revprobe as rp
from revprobe.models.families.known import FAMILIES, NOT_READ, family_of_config
from revprobe.models.listing import shown_parity
from tiny import FIXTURES, ROOT, module_at

EVERY = module_at(Path(__file__).with_name("test_every_family.py"))
TABLE = module_at(ROOT / "docs" / "models_table.py")
WAYS = {"full": "bidirectional", "block": "in blocks of ", "either": ""}


def test_the_page_has_the_table_that_the_code_gives() -> None:
    assert TABLE.PAGE.read_text() == TABLE.page(), "run python docs/models_table.py"
    assert re.search(r"^As of 20\d\d-\d\d-\d\d\.", TABLE.PAGE.read_text(), re.M), "the page says as of when"


def test_the_list_has_every_family_with_what_its_class_does() -> None:
    listed = rp.list_models().set_index("name")
    assert list(listed.columns) == [
        "objective",
        "attention",
        "shift",
        "noise",
        "about",
        "tokenizer",
        "licence",
        "parity",
        "published",
    ]
    assert listed.index.is_unique and {"gpt2", "LoRA adapter", "any transformers causal LM"} <= set(listed.index)
    for family in FAMILIES:
        row = listed.loc[family.name]
        assert row["objective"] == getattr(family.model_class, "objective", "masked")
        way = getattr(family.model_class, "attention", "full") if row["objective"] == "masked" else "causal"
        assert row["attention"] == way and way in {*WAYS, "causal"}
        assert row["shift"] == getattr(family.model_class, "logit_shift", 0)
        noise = getattr(family.model_class, "noise", "mask") if row["objective"] == "masked" else ""
        assert row["noise"] == noise and noise in {"mask", "uniform", ""}
        assert {"code", "weights"} <= set(re.findall(r"\w+", row["licence"])), "one of the two has no licence"
        assert row["published"] == ", ".join(family.published)


@pytest.mark.parametrize("name", EVERY.CASES)
@torch.no_grad()
def test_the_parity_that_is_stated_was_measured(name: str) -> None:
    """Up to rounding on another machine."""
    model, expected = EVERY.loaded(name), load_file(FIXTURES / name / "reference.safetensors")
    family = family_of_config(model.module.config)
    assert family is not None
    whole, ids, mask = model.in_blocks(None), expected["input_ids"], expected["attention_mask"]
    found = [
        EVERY.apart(whole.logits(ids), expected["logits_nomask"], model.mask_token_id),
        EVERY.apart(whole.logits(ids, mask)[mask.bool()], expected["logits"][mask.bool()], model.mask_token_id),
        EVERY.worst_score_error(whole, ids[:1], expected["scores_row0"]),
    ]
    if name in EVERY.BLOCKS:
        found += [*EVERY.block_errors(name), *EVERY.training_errors(name)]
    assert family.parity is not None, f"seen: {max(found):.0e}; write it into the family's parity"
    assert max(found) <= family.parity + 5e-6


@pytest.mark.parametrize("name", EVERY.CASES)
def test_a_model_is_read_as_the_table_says(name: str) -> None:
    model = EVERY.loaded(name)
    family = family_of_config(model.module.config)
    assert family is not None
    row = rp.list_models().set_index("name").loc[family.name]
    assert (model.objective, model.logit_shift) == (row["objective"], row["shift"])
    assert model.reads.startswith(WAYS[row["attention"]])


def test_shown_parity_is_as_short_as_it_can_be() -> None:
    assert [shown_parity(apart) for apart in (0.0, 2.6e-6, np.nan)] == ["0", "3e-6", "not run"]


@pytest.mark.parametrize("model_type", NOT_READ)
def test_what_is_known_and_not_read_is_refused_with_its_reason(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}", "auto_map": {{"AutoModel": "m.M"}}}}')
    with pytest.raises(rp.RevprobeError, match=rf"is of type '{model_type}': it "):
        rp.load_model(tmp_path)
    assert model_type.replace("_", "").lower() in TABLE.PAGE.read_text().replace("-", "").lower()


def test_the_command_shows_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    from revprobe.cli.models import models

    models()
    out = capsys.readouterr().out
    for family in FAMILIES:
        assert family.name in out and all(name in out for name in family.published)
    assert "openai-community/gpt2" in out and "Apache-2.0" in out and "were not run" in out
