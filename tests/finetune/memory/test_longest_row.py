"""Tokens of the longest training row, planned from texts alone: from above, and of the rows that are made."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from revprobe.errors import RevprobeError
from revprobe.finetune.config.finetuning import FinetuneConfig, FinetunedModel, FinetuneSweepConfig, read_finetune
from revprobe.finetune.config.loading import dump_yaml, parse_yaml
from revprobe.finetune.memory.from_config import _longest_row, most_tokens, plan_finetuning, those_to_plan
from revprobe.finetune.runs.finetune_setup import prepare, row_options, text_relation
from revprobe.finetune.training.dataset import StatementRows
from revprobe.finetune.training.distributed import ProcessGroup
from revprobe.models.probed import ProbedModel
from revprobe.relations.evaluation import answer_book
from tiny import GROUPED, causal


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("Ann Low of Kew", 7),
        ("作者的名字是", 18),
        ("Zoë", 2 + 1),
        ("Анна", 8),
        ("a作b", 5),
        ("👩‍🚀 x", 11 + 1),
        ("born 1912-06-23", 3 + 10),
        ("a1b2", 4),
        ("O'Neil", 1 + 1 + 2),
        ("12 34", 5),
        ("", 0),
    ],
)
def test_tokens_are_counted_from_above_in_any_script(name: str, most: int) -> None:
    """A token of a byte-level BPE holds at least a byte; one that has learned no merge of a script, no more."""
    assert most_tokens(name) == most
    pieces = [byte for letter in name if not letter.isascii() for byte in letter.encode()]
    assert most >= len(pieces), "with not one merge learned"


def model_of_bytes(objective: str) -> ProbedModel:
    """A tokenizer that has learned no merge: each byte is a token, each digit and each sign."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<mask>"]
    plain = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    told: Any = {"eos_token": "<end>", "pad_token": "<end>", "mask_token": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **told)
    module = causal(LlamaConfig(**GROUPED | {"vocab_size": len(tokenizer), "max_position_embeddings": 512})).module
    shift = {"logit_shift": 0} if objective == "masked" else {}
    return ProbedModel(module, tokenizer, objective=objective, check=False, **shift)


SCRIPTS = {
    "digits": [("1" * 30, "2" * 30), ("3" * 4, "4" * 50), ("5", "6")],
    "signs": [("+-1", "=" * 17), ("(" * 20, "2:3"), ("?", "!")],
    "chinese": [("作" * 20, "者" * 20), ("书" * 3, "名" * 30), ("一", "二")],
    "letters apart": [("1a2b3c4", "5e6"), ("7f8", "9g1h2i3"), ("4k5", "6l7")],
}


@pytest.mark.parametrize("more", [{}, {"evaluation": {"max_new_tokens": 9}}, {"objective": {"end_padding": "absent"}}])
@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_longest_row_is_that_of_the_rows_that_are_made(
    tmp_path: Path, script: str, objective: str, more: dict[str, Any]
) -> None:
    """To the token, besides the two that a tokenizer may put around, where no two letters can be one."""
    file = tmp_path / "names.csv"
    file.write_text("\n".join(["x,y", *map(",".join, SCRIPTS[script])]))
    templates = {"xy": "{x} 的作者是 {y}", "yx": "{y} 的作品是 {x}"}
    table = {
        "name": "table",
        "path": str(file),
        "columns": ["x", "y"],
        "templates": templates,
        "heldout": 0.0,
        "carrier": "",
    }
    model = model_of_bytes(objective)
    for direction in ("xy", "yx"):
        told = {"name": "z", "model": {"name": "any"}, "relation": table | {"direction": direction}}
        config = FinetuneConfig(**told, training={"steps": 1}, **more)
        relation = text_relation(config)
        limit = config.evaluation.max_new_tokens or answer_book(model, relation, direction).limit
        rows = StatementRows(relation.training_rows(direction), model, row_options(config, model, limit))
        tokens, about, query = _longest_row(config, objective)
        assert tokens == max(map(len, rows.rows)) + 2, about
        pairs = relation.pairs(model, direction, drop=())
        assert query == max(len(one.token_ids) for one in pairs.queries) + 2


@pytest.mark.parametrize("direction", ["xy", "yx"])
def test_rows_of_words_are_no_longer_than_planned(tmp_path: Path, direction: str) -> None:
    """Long names behind short ones: a row that ends in a short answer is filled up to the longest of all."""
    draw = random.Random(0)
    syllable = lambda: draw.choice("bcdfgklmnprst") + draw.choice("aeiou")  # noqa: E731
    names = lambda n: " ".join("".join(syllable() for _ in range(3)).capitalize() for _ in range(n))  # noqa: E731
    file = tmp_path / "names.csv"
    file.write_text("\n".join(["x,y", *(f"{names(2)},{names(14)}" for _ in range(12))]))
    templates = {"xy": "{x} is {y}", "yx": "{y} is {x}"}
    table = {"name": "table", "path": str(file), "columns": ["x", "y"], "templates": templates, "heldout": 0.2}
    tiny = {"layout": "llada", "d_model": 16, "n_heads": 2, "pretraining": {"facts": 6, "steps": 1, "batch_size": 2}}
    told = {"name": "z", "model": {"tiny": tiny}, "relation": table | {"direction": direction}}
    config = FinetuneConfig(**told, training={"steps": 1, "device": "cpu"}, snapshots={"every": 1, "facts": 2})
    (about,) = [one for one in plan_finetuning(config).about if one.startswith("tokens of a row")]
    longest = max(map(len, prepare(config, tmp_path / "run", ProcessGroup()).rows.rows))
    assert longest <= int(about.split()[4].rstrip(",")) < 1.5 * longest, about


def of_longer_answers(tmp_path: Path, length: int, directions: list[str]) -> Path:
    """A causal model's sweep over names of one word and descriptions of many, whose wording is longer one way."""
    file = tmp_path / "long.csv"
    file.write_text("\n".join(["x,y", *(f"Ann{i},{'word ' * length}{i}" for i in range(12))]))
    sweep = {
        "name": "s",
        "base": {"training": {"steps": 1, "device": "cpu"}, "snapshots": {"every": 1, "facts": 2}},
        "models": {"causal": {"tiny": {"layout": "llama", "d_model": 16, "n_heads": 2}}},
        "datasets": {
            "d": {
                "name": "table",
                "path": str(file),
                "columns": ["x", "y"],
                "templates": {"xy": "{x} is {y}", "yx": "the one who is {y}, as all here know well, is {x}"},
                "directions": directions,
            }
        },
        "seeds": [0, 1],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml(sweep))
    return path


@pytest.mark.parametrize("directions", [["xy", "yx"], ["yx", "xy"]])
def test_of_the_directions_of_a_sweep_that_of_the_longest_rows_is_planned(
    tmp_path: Path, directions: list[str]
) -> None:
    """Whichever the file names first: the first was planned, though the other may need more."""
    chosen: Any = read_finetune(of_longer_answers(tmp_path, 5, directions))
    runs = chosen.runs()
    (one,) = those_to_plan(runs)
    tokens = {run.relation.direction: _longest_row(run, "causal").tokens for run in runs}
    assert len(runs) == 4 and tokens["yx"] > tokens["xy"] and one.relation.direction == "yx"


def test_each_model_dataset_and_variant_has_a_plan_of_its_own_longest_direction(tmp_path: Path) -> None:
    """What they differ in may cost memory; of seeds and directions one is planned."""
    text: Any = parse_yaml(of_longer_answers(tmp_path, 5, ["xy", "yx"]).read_text(), "test")
    text["models"]["masked"] = {"tiny": {"layout": "llada", "d_model": 16, "n_heads": 2}}
    turned = {"xy": "{x}, as all who were asked here know well, is the one called {y}", "yx": "{y} is {x}"}
    text["datasets"]["turned"] = text["datasets"]["d"] | {"templates": turned}
    text["variants"] = {"few": {"training": {"batch_size": 2}}, "many": {"training": {"batch_size": 32}}}
    runs = FinetuneSweepConfig.model_validate(text).runs()
    planned = those_to_plan(runs)
    assert len(runs) == 32 and {run.name for run in planned} == {
        f"{model}-{dataset}-{direction}-{variant}-s0"
        for model in ("causal", "masked")
        for dataset, direction in (("d", "yx"), ("turned", "xy"))
        for variant in ("few", "many")
    }


@pytest.mark.parametrize("layout", ["llama", "llada"])
def test_queries_of_the_other_direction_are_planned_too(tmp_path: Path, layout: str) -> None:
    """A pair asks in the other direction's words: as many tokens as a training row were planned, whatever those are."""
    chosen: Any = read_finetune(of_longer_answers(tmp_path, 5, ["xy", "yx"]))
    tiny = {"layout": layout, "d_model": 16, "n_heads": 2}
    plans = {}
    for run in chosen.runs()[::2]:
        config = FinetuneConfig(**run.model_dump() | {"model": {"tiny": tiny}})
        plans[run.relation.direction] = plan_finetuning(config)
    shown = {direction: plan.about[1] for direction, plan in plans.items()}
    longest = max(map(most_tokens, text_relation(chosen.runs()[2]).training_texts("yx"))) + 2
    assert shown["xy"] == shown["yx"] and f" of {longest} tokens " in shown["xy"], shown
    assert int(plans["xy"].about[0].split()[4]) < longest <= int(plans["yx"].about[0].split()[4])
    for phase in ("probing", "prediction"):
        assert plans["xy"].peak(phase) == plans["yx"].peak(phase)
    assert plans["xy"].peak("training") < plans["yx"].peak("training")


def test_rows_that_are_filled_up_beyond_what_the_model_takes_are_refused_as_in_training(tmp_path: Path) -> None:
    """A tiny model takes 128 tokens: a plan said that such a run fits, which no machine trains."""
    file = tmp_path / "names.csv"
    file.write_text(
        "\n".join(["x,y", *(f"{a}nn Lo{a},{b}ed Ma{b}" for a, b in zip("ABCDEFGH", "IJKLMNOP", strict=True))])
    )
    table = {"name": "table", "path": str(file), "columns": ["x", "y"], "direction": "xy"}
    table |= {"templates": {"xy": "{x} is {y}", "yx": "{y} is {x}"}}
    tiny = {"layout": "llada", "d_model": 16, "n_heads": 2, "pretraining": {"facts": 6, "steps": 1, "batch_size": 2}}

    def told(tokens: int, **more: Any) -> FinetuneConfig:
        model = {"tiny": tiny | ({"layout": more.pop("layout")} if "layout" in more else {})}
        training = {"steps": 1, "device": "cpu"}
        return FinetuneConfig(
            name="z", model=model, relation=table, training=training, evaluation={"max_new_tokens": tokens}, **more
        )

    with pytest.raises(RevprobeError, match=r"takes \d+ tokens, but .* takes at most 128"):
        prepare(told(128), tmp_path / "run", ProcessGroup())
    with pytest.raises(RevprobeError, match=r"max_new_tokens 128: .* tiny-llada takes at most 128 tokens of a row"):
        plan_finetuning(told(128))
    (row,) = [line for line in plan_finetuning(told(127)).about if line.startswith("tokens of a row")]
    assert row.startswith("tokens of a row: 128, which is what the model takes, of 1")
    # Nothing is filled up in these.
    assert "8 rows of " in plan_finetuning(told(128, objective={"end_padding": "absent"})).about[0]
    assert "8 rows of " in plan_finetuning(told(128, layout="llama")).about[0]
    with pytest.raises(RevprobeError, match="129 tokens of a row: tiny-llada takes at most 128; ask for no more"):
        plan_finetuning(told(2), tokens=129)


def test_a_row_is_planned_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    """Letters are counted from above; a row that is longer in truth is refused when it is trained."""
    folder = tmp_path / "model"
    LlamaConfig(**GROUPED | {"max_position_embeddings": 40, "architectures": ["LlamaForCausalLM"]}).save_pretrained(
        folder
    )
    file = of_longer_answers(tmp_path, 60, ["xy"])
    chosen: Any = read_finetune(file)
    config = chosen.runs()[0].model_copy(update={"model": FinetunedModel(name=str(folder))})
    assert _longest_row(config, "causal").tokens > 40
    about = plan_finetuning(config).about
    assert any("rows of 40 tokens" in line for line in about), about
    assert any("40, which is what the model takes, of " in line for line in about)
    assert any("rows of 30 tokens" in line for line in plan_finetuning(config, tokens=30).about)
    with pytest.raises(RevprobeError, match=r"41 tokens of a row: .*model takes at most 40"):
        plan_finetuning(config, tokens=41)
    assert any("queries of 40 tokens" in line for line in about), about
    file.with_name("long.csv").unlink()
    LlamaConfig(**GROUPED | {"max_position_embeddings": 33, "architectures": ["LlamaForCausalLM"]}).save_pretrained(
        folder
    )
    assert any("33, which is what the model takes, of 64 assumed" in line for line in plan_finetuning(config).about)
