"""The sweep behind docs/tried.md on a handful of its models, and that it sees a wrong number when there is one."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import revprobe as rp
from tiny import ROOT

BENCHMARKS = ROOT / "examples" / "benchmarks"
# Learned positions, grouped keys, experts, a hybrid, a mask that is not heeded, a prompt put before the tokens.
SOME = [
    ("causal", "gpt2", "GPT2LMHeadModel"),
    ("causal", "bamba", "BambaForCausalLM"),
    ("causal", "qwen3_moe", "Qwen3MoeForCausalLM"),
    ("masked", "deberta-v2", "DebertaV2ForMaskedLM"),
    ("masked", "mobilebert", "MobileBertForMaskedLM"),
]


@pytest.fixture(scope="module")
def sweep():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("parity")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize(("objective", "kind", "name"), SOME, ids=[name for *_, name in SOME])
def test_the_probes_and_diagnose_are_right_on_a_model_of_the_table(sweep, objective, kind, name):
    tried = sweep.try_model(name, objective, sweep.tiny_model(objective, kind, name))
    assert [str(one.kind) for one in tried.outcomes.values()] == ["right"] * 3, tried
    assert not tried.faults and 0 < tried.runs <= 6, tried


def test_a_prompt_adapter_is_held_against_its_own_forward_pass(sweep, tmp_path):
    adapters = sys.modules["parity_adapters"]
    module, folder = adapters.saved("causal", "prompt tuning", Path(tmp_path))
    tried = sweep.try_model("prompt", "causal", module, lambda: rp.load_model(folder, objective="causal"))
    assert not tried.faults and tried.outcomes["attention"].kind == "right", tried
    # What the base alone would say is another number, and the sweep sees it.
    other = sweep.try_model(
        "base", "causal", module, lambda: rp.ProbedModel(module.get_base_model(), objective="causal")
    )
    assert {one.kind for one in other.outcomes.values()} == {"WRONG"} and len(other.faults) >= 3, other


def test_the_page_counts_no_wrong_number():
    text = (ROOT / "docs" / "tried.md").read_text(encoding="utf-8")
    assert "WRONG" not in text and len(re.findall(r"^\| \w+ \| (causal|masked) \|", text, re.MULTILINE)) >= 60
    counts = re.findall(r"^\| (probability|attention|gradient) \| (\d+) \| \d+ \| \d+ \| (\d+) \|$", text, re.MULTILINE)
    assert len(counts) == 6 and all(int(right) > 30 and wrong == "0" for _, right, wrong in counts)
