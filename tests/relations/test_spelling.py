"""A fact stays on one side of the split however its names are spelled, and is counted once."""

import unicodedata
import warnings

import pandas as pd
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from revprobe import ProbedModel, RaddConfig, RaddForMaskedLM, RevprobeError, TextRelation, from_table

WORDING = {"P2C": ["{parent}'s child is {child}"], "C2P": ["{child}'s parent is {parent}"]}
FACTS = [("Ann O'Hale", "Zoé Hale"), ("Cy Dorn", "Di Dorn"), ("Ed Fox", "Flo Fox"), ("Gus Ray", "Hal Ray")]


def relation(other: tuple[str, str], **options) -> TextRelation:
    frame = pd.DataFrame([FACTS[0], other, *FACTS[1:]], columns=["parent", "child"])
    return from_table(frame, ("parent", "child"), WORDING, **{"heldout": 0.25, "duplicates": "merge", **options})


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        ("Ann\u202fO'Hale", "Zoé\u3000Hale"),  # narrow and ideographic blanks
        ("Ann O'Ha\u00adle", "Zoe\u034f\u0301 Hale"),  # soft hyphen; a joiner between letter and accent
        ("Ann O\u2019Hale", "Zoé\ufe0f Hale\u2060"),  # typographic apostrophe; variation selector, word joiner
        ("Ａｎｎ O'Hale", unicodedata.normalize("NFD", "Zoé") + " Hale"),  # full width
    ],
)
def test_another_spelling_is_the_same_fact(parent: str, child: str) -> None:
    """As its own fact it would be trained in one spelling and held out in the other."""
    found = relation((parent, child))
    assert len(found.facts) == 4 and found.report["duplicate_fact"] == 1
    with pytest.raises(RevprobeError, match=r"row 1: columns .* the fact of row 0 again in another spelling"):
        relation((parent, child), duplicates="error")


def test_facts_that_share_an_entity_in_another_spelling_are_one_family() -> None:
    for seed in range(20):
        split = relation(("Ann\u00a0O'Hale", "Bo Hale"), seed=seed).facts["split"].tolist()
        assert split[0] == split[1], seed


def test_case_is_the_same_name_where_asked_and_counted_where_not() -> None:
    assert relation(("ANN O'HALE", "ZOÉ HALE")).report == {"differs_by_case": 1}
    assert relation(("ANN O'HALE", "ZOÉ HALE"), ignore_case=True).report == {"duplicate_fact": 1}
    for seed in range(10):
        split = relation(("ANN O'HALE", "Bo Hale"), seed=seed, ignore_case=True).facts["split"].tolist()
        assert split[0] == split[1], seed


@pytest.mark.parametrize(
    "fold", [normalizers.Lowercase(), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])]
)
def test_a_tokenizer_that_reads_two_names_as_one_is_told(fold) -> None:
    """Without case, or without accents: the split knows of neither."""
    names = ("ann o'hale", "zoé hale") if isinstance(fold, normalizers.Lowercase) else ("Ánn O'Hale", "Zoe Hale")
    found = relation(names)
    words = {fold.normalize_str(word) for pair in [*FACTS, names] for name in pair for word in name.split()}
    words |= {fold.normalize_str(word) for word in ("Fact:", "'s", "child", "parent", "is", "[UNK]")}
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(sorted(words))}, unk_token="is"))
    backend.normalizer, backend.pre_tokenizer = fold, pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    module = RaddForMaskedLM(RaddConfig(vocab_size=len(words) + 1, mask_token_id=len(words), d_model=16))
    model = ProbedModel(module, tokenizer, objective="masked", mask_token_id=len(words))
    with pytest.warns(UserWarning, match="as the same tokens .*so a held-out fact of table may be trained"):
        found.require_fit(model, "P2C")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relation(("Bo Lee", "Cy Lee")).take(relation(("Bo Lee", "Cy Lee")).facts["fact"][[0, 2]]).require_fit(
            model, "P2C"
        )
