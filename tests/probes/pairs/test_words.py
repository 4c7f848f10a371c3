"""Names in texts, in scripts with blanks between words and without, against rules by hand, character by character."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revprobe import look_alike_data, parent_child, person_description, trex
from revprobe.probes.decoding.exact_match import begins_with, error_of, normalized
from revprobe.probes.pairs.words import goes_on, has_begun, holds, places, units

# What each character is to the rule, by hand: a letter of a script with blanks, one of a script without, Hangul, a mark
# of the letter before it, a vowel of the letter behind it, nothing of a word.
SPACED = "aBzé1²٣яΩשبक"
UNSPACED = "安娜々のアーｱกລခㄅ"
HANGUL = "안나ㅋ\u1100"
MARKS = "\u0301\u093e\u0e34\u0e32\u05b7\u064e\u3099\uff9e\u1161\u11ab"
LEADING = "เ"
NOTHING = " '-._!。👍\ufe0f\u200d"
LETTERS = SPACED + UNSPACED + HANGUL + MARKS + LEADING + NOTHING
TEXTS = st.text(st.sampled_from(LETTERS), max_size=12)
NAMES = st.text(st.sampled_from(LETTERS), min_size=1, max_size=3)
# Those whose results must not change, marks aside.
PLAIN = st.text(st.sampled_from([*"aBz01²éßяЖΩςאשبي٣", *" _'-.!,’\u200c\u200d"]), max_size=12)


def base(text: str) -> str:
    """The last character that is no mark, or nothing."""
    return text.rstrip(MARKS)[-1:]


def slow_part(text: str, start: int, end: int) -> bool:
    """Whether a longer word goes on at either edge, by hand."""
    first, last, before, after = text[start], base(text[:end]), base(text[:start]), text[end : end + 1]
    word = SPACED + UNSPACED + HANGUL + LEADING
    if first in MARKS:
        left = before != "" and before in word
    elif before and before in LEADING and first in word:
        left = True
    else:
        left = first in SPACED + HANGUL and before != "" and before in SPACED + HANGUL
        left |= first in SPACED + HANGUL and text[:start].endswith("_")
    if first in MARKS and text[:start].endswith("_"):
        left = True
    if last == "" or last not in word:
        return left
    right = after != "" and (after in MARKS or (after in SPACED + "_" and last not in UNSPACED))
    return left or right


@given(text=TEXTS, name=NAMES)
def test_a_name_stands_where_a_slow_scan_finds_it(text: str, name: str) -> None:
    found = [at for at in range(len(text)) if text.startswith(name, at) and not slow_part(text, at, at + len(name))]
    assert list(places(text, name)) == found and holds(text, name) == bool(found)


@given(before=TEXTS, name=NAMES, after=TEXTS)
def test_units_of_a_name_are_units_of_what_holds_it(before: str, name: str, after: str) -> None:
    """An index that looks up what a text does not have would not even look at the text."""
    text = before + name + after
    assert not holds(text, name) or units(name) <= units(text)


@pytest.mark.parametrize(
    ("name", "held", "not_held"),
    [
        ("波波", ["安娜的孩子是波波", "波波的母亲", "大波波"], ["波"]),
        ("上海", ["上海大学位于", "在上海。"], ["上 海"]),
        ("安娜", ["安娜_1", "5安娜A"], []),
        ("佐々木", ["佐々木さんは"], []),
        ("アンナ", ["アンナの子供", "アンナー"], ["アンサ"]),
        ("ｱﾝ", ["ｱﾝﾅ"], ["ｱ ﾝ"]),
        ("ﾊ", ["ﾊﾅ"], ["ﾊﾞﾅ"]),
        ("か", ["かな"], ["か\u3099な"]),
        ("葛", ["葛\U000e0100城"], []),  # a variation selector is no other letter
        ("กม", ["ลูกชื่อกม"], ["กมา", "กมี"]),
        ("กา", ["แม่กา"], ["เกา"]),
        ("ရ", ["မရန"], ["ရာ", "ရ\u1031"]),
        ("안나", ["안나의 아이", "안나는", "안나", "안나벨"], ["조안나", "안낙"]),
        ("보라", ["아이는 보라입니다"], ["새보라"]),
        ("BTS", ["BTS는", "BTS手机"], ["BTSx", "의BTS"]),
        ("\u110b\u1161", ["\u110b\u1161\u1102\u1161"], ["\u110b\u1161\u11ab"]),  # a syllable in parts, and a longer one
        ("iPhone", ["iPhone手机", "新iPhone"], ["iPhone5手机", "iPhones"]),
        ("手机", ["iPhone手机"], []),
        ("राम", ["राम का बच्चा", "(राम)"], ["रामा", "सराम", "रामः"]),
        ("Jose", ["Jose's"], ["Jose\u0301"]),
        ("Jose\u0301", ["Jose\u0301's"], ["Jose\u0301p", "Jose\u0301\u0302"]),
        ("\u05d3\u05df", ["\u05d3\u05df \u05d1\u05d0"], ["\u05d3\u05df\u05b8"]),
        ("👍", ["a👍b", "👍🏽"], ["a"]),
        ("O'Neil", ["O'Neil-Fox"], ["O'Neils", "xO'Neil"]),
        ("Ann", ["Ann-Marie", "Ann's", "Ann."], ["Anna", "Ann_1", "Ann1", "JoAnn"]),
        ("Ann_", ["Ann_1", "Ann_"], ["JoAnn_"]),
    ],
)
def test_names_of_many_scripts(name: str, held: list[str], not_held: list[str]) -> None:
    assert [text for text in held if not holds(text, name)] == []
    assert [text for text in not_held if holds(text, name)] == []


def test_every_letter_and_digit_is_of_a_word() -> None:
    """What is none would have no edge asked for, and be no word of an index."""
    every = [one for one in map(chr, range(0x110000)) if one.isalnum()]
    assert [one for one in every if not units(one) and not goes_on(f"a{one}", 1)] == []


# --- as before, marks aside -------------------------------------------------------------------------------------------


def as_before(text: str, name: str) -> bool:
    """Any letter, digit or underscore beside a letter or digit of the name makes it a longer word."""
    edges = ("(?<!\\w)" if name[:1].isalnum() else "", "(?!\\w)" if name[-1:].isalnum() else "")
    return bool(re.search(edges[0] + re.escape(name) + edges[1], text))


@given(text=PLAIN, name=PLAIN)
def test_in_scripts_with_blanks_nothing_has_changed(text: str, name: str) -> None:
    assert holds(text, name) == as_before(text, name)
    assert begins_with(text, name) == (text.startswith(name) and not text[len(name) : len(name) + 1].isalnum())
    shown, asked = normalized(name), normalized(text)
    whole = [
        at
        for at in range(len(asked))
        if asked.startswith(shown, at) and not (asked[at - 1 : at].isalnum() or asked[at + len(shown) :][:1].isalnum())
    ]
    assert (error_of(name, text, {shown}) == "prompt") == bool(shown and whole)


@given(text=PLAIN, cut=st.integers(0, 12))
def test_a_word_goes_on_where_a_letter_or_digit_follows(text: str, cut: int) -> None:
    cut = min(cut, len(text))
    assert goes_on(text, cut) == text[cut : cut + 1].isalnum()
    assert has_begun(text, cut) == (cut > 0 and text[cut - 1 : cut].isalnum())


def test_in_the_published_layouts_nothing_has_changed(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = look_alike_data(tmp_path_factory.mktemp("data") / "made")
    relations = [
        parent_child(made / "parent_child_pairs.csv"),
        person_description(made / "person_description"),
        trex(made / "trex"),
    ]
    compared = 0
    for relation in relations:
        names = {name for column in relation.columns for name in relation.table[column]}
        parts = names | {word for name in names for word in name.split()}
        texts = {statement.text for direction in relation.directions for statement in relation.statements[direction]}
        for text in sorted(texts)[::16]:
            near = [name for name in parts if name in text]
            assert [name for name in near if holds(text, name)] == [name for name in near if as_before(text, name)]
            compared += len(near)
    assert compared > 800
