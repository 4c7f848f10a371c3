"""What must not be trained, and what is not asked, is found in languages without blanks as it is in English."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revprobe import RevprobeError, TextRelation, from_table
from revprobe.probes.pairs.words import holds
from revprobe.relations.splits import TextIndex

PARENTS = {
    "en": ["Ann", "Bea", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal"],
    "zh": ["安娜", "贝雅", "西德", "多特", "伊芙", "费伊", "古斯", "哈尔"],
    "ja": ["アンナ", "ﾍﾞｱ", "シド", "ドット", "佐々木", "フェイ", "ガス", "ハル"],
    "th": ["อันนา", "เบีย", "ซิด", "ดอท", "อีฟ", "เฟย์", "กัส", "ฮาล"],
    "ko": ["안나", "베아", "시드", "도트", "이브", "페이", "거스", "할리"],
    "hi": ["रामा", "सीता", "गीता", "मीरा", "राधा", "उमा", "लता", "नीता"],
}
CHILDREN = {
    "en": ["Bo", "Cy", "Di", "Ed", "Flo", "Gil", "Hu", "Ira"],
    "zh": ["波波", "赛赛", "迪迪", "艾德", "弗洛", "吉尔", "胡胡", "艾拉"],
    "ja": ["ボー", "サイ", "ディ", "エド", "フロー", "ギル", "フー", "アイラ"],
    "th": ["โบ", "ไซ", "ดีดี", "เอ็ด", "โฟล", "กิล", "ฮู", "ไอรา"],
    "ko": ["보라", "세이", "디디", "에드", "플로", "길버", "후이", "아이라"],
    "hi": ["राम", "लव", "कुश", "भरत", "अर्जुन", "भीम", "नकुल", "करण"],
}
# Forward, reverse, words that stand before a text, and behind it.
WORDS = {
    "en": ("{k}: {p} has the child {c}, {n}", "{c} has the parent {p}", "{0} came", "unlike {0} and {1}"),
    "zh": ("{k}：{p}的孩子是{c}，{n}", "{c}的父母是{p}", "{0}来了", "不像{0}和{1}"),
    "ja": ("{k}、{p}の子供は{c}、{n}", "{c}の親は{p}", "{0}が来た", "{0}と{1}と違う"),
    "th": ("{k} {p}มีลูกชื่อ{c} {n}", "{c}มีพ่อแม่ชื่อ{p}", "เมื่อ{0}มา", "ไม่เหมือน{0}และ{1}"),
    "ko": ("{k}: {p}의 아이는 {c}, {n}", "{c}의 부모는 {p}", "{0}가 왔다", "{0}와 {1}와는 달리"),
    "hi": ("{k}: {p} का बच्चा {c}, {n}", "{c} का अभिभावक {p}", "{0} आया", "{0} और {1} से अलग"),
}
LANGUAGES = sorted(PARENTS)


def relation(language: str, notes: list[str], before: list[str], **options) -> TextRelation:
    forward, reverse, *_ = WORDS[language]
    columns = {"p": PARENTS[language], "c": CHILDREN[language], "n": notes, "k": before}
    told = {"heldout": 0.3, "heldout_templates": 0, **options}
    return from_table(pd.DataFrame(columns), ("p", "c"), {"P2C": [forward], "C2P": [reverse]}, **told)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_that_is_trained_holds_both_names_of_a_heldout_fact(language: str) -> None:
    """One fact's note names the next fact's two entities: some draws would train what they hold out."""
    parents, children, note = PARENTS[language], CHILDREN[language], WORDS[language][3]
    notes = [note.format("x", "y")] * 8
    notes[0] = note.format(parents[1], children[1])
    flagged = 0
    for seed in range(8):
        found = relation(language, notes, [str(place) for place in range(8)], seed=seed)
        flagged += found.report.get("drawn_but_trained", 0)
        texts = found.training_texts("P2C") + found.training_texts("C2P")
        for fact in found.facts.query("split == 'heldout'").itertuples():
            assert not [text for text in texts if fact.p in text and fact.c in text], (language, seed)
    assert flagged, "no draw met the fact that another's text tells"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_training_text_in_reverse_order_is_refused(language: str) -> None:
    before = [str(place) for place in range(8)]
    assert relation(language, before, before).report == {}
    before[2] = WORDS[language][2].format(CHILDREN[language][2])
    with pytest.raises(
        RevprobeError, match=rf"names '{CHILDREN[language][2]}' before '{PARENTS[language][2]}', as the"
    ):
        relation(language, [str(place) for place in range(8)], before, heldout=0)


@pytest.mark.parametrize(
    ("university", "city", "forward", "asked"),
    [
        ("University of Paris", "Paris", "{u} lies in {c}", False),
        ("上海大学", "上海", "{u}位于{c}", False),
        ("東京大学", "東京", "{u}は{c}にある", False),
        ("มหาวิทยาลัยเชียงใหม่", "เชียงใหม่", "{u}อยู่ใน{c}", False),
        ("서울대학교", "서울", "{u}는 {c}에 있다", False),
        ("रामा", "राम", "{u} का बच्चा {c}", True),
        ("Annapolis", "Anna", "{u} lies in {c}", True),
    ],
)
def test_a_question_that_holds_its_answer_is_not_asked(university: str, city: str, forward: str, asked: bool) -> None:
    facts = pd.DataFrame({"u": [university, "Rome"], "c": [city, "Italia"]})
    found = from_table(facts, ("u", "c"), {"U2C": forward, "C2U": "{c}: {u}"}, heldout=0, heldout_templates=0)
    assert [q.answers[0] for q in found.questions("U2C")] == [city] * asked + ["Italia"]
    assert found.report == ({} if asked else {"answer_in_prompt": 1})


@pytest.mark.parametrize("end", ["。", "।", ".", "！"])
def test_a_full_stop_of_another_script_makes_no_other_statement(end: str) -> None:
    facts = pd.DataFrame({"p": ["安娜", "赛赛", "迪迪"], "c": ["波波和赛赛", "安娜和波波", "艾德"]})
    with pytest.raises(RevprobeError, match=r"'安娜和波波和赛赛.' is a reverse statement as well"):
        from_table(facts, ("p", "c"), {"P2C": f"{{p}}和{{c}}{end}", "C2P": "{c}和{p}"}, heldout=0)


PIECES = st.sampled_from([*"安娜波のアก안나aB1é _'-", "\u0301", "\u093e", "राम", "มา", "Ann", "เ", "Ann安"])
TEXTS = st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=6)


@given(texts=TEXTS, names=st.lists(st.lists(PIECES, min_size=1, max_size=3).map("".join), min_size=1, max_size=2))
def test_the_index_finds_what_a_scan_finds(texts: list[str], names: list[str]) -> None:
    slow = next((place for place, text in enumerate(texts) if all(holds(text, name) for name in names)), None)
    assert TextIndex(texts).first_with(names) == slow
