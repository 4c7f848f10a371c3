"""The table of checks: sound models pass, each fault is a line, and the exit status says whether to trust."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe import RevprobeError
from tiny import GROUPED, MASK, SIZES, drawn, language_model, radd


def line(found, check: str):
    rows = found.table[found.table["check"] == check]
    assert len(rows), f"{check} is none of {sorted(found.table['check'])}"
    return rows.iloc[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: radd("rope"),
        lambda: rp.ProbedModel(
            drawn(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))),
            objective="masked",
            mask_token_id=MASK,
        ),
        lambda: drawn(language_model(transformers.LlamaConfig(**GROUPED))),
    ],
    ids=["RADD", "BERT", "Llama"],
)
def test_a_sound_model_passes_every_check(make):
    found = rp.diagnose(make())
    assert found.trustworthy and set(found.table["result"]) <= {"ok", "measured", "handled", "not run"}
    assert line(found, "gradients").measured < 1e-5 and line(found, "probability").measured < 1e-5
    assert line(found, "attention").note in ("read of 1 layer: 0", "read of 2 layers: 0 to 1")
    assert line(found, "padding").measured == 0 and line(found, "other rows").measured == 0
    assert 0 < line(found, "in bfloat16").measured < 0.5
    assert "all three probes can be trusted" in repr(found) and "<table" in found._repr_html_()


@pytest.mark.parametrize(("size", "shift"), [(2, 0), (3, 0), (3, 1), (5, 0), (5, 1), (8, 1)])
def test_a_model_in_blocks_is_tried_on_pairs_inside_one_block(size: int, shift: int):
    model = rp.ProbedModel(radd("rope"), objective="masked", logit_shift=shift, begin_token_id=54)
    found = rp.diagnose(model.in_blocks(size))
    assert found.trustworthy and f"in blocks of {size}" in line(found, "reads").note
    assert line(found, "gradients").measured < 1e-5 and line(found, "probability").measured < 1e-5


@pytest.mark.parametrize(("size", "shift"), [(1, 0), (2, 1)])
def test_blocks_without_room_for_a_pair_are_a_line(size: int, shift: int):
    model = rp.ProbedModel(radd("rope"), objective="masked", logit_shift=shift, begin_token_id=54)
    found = rp.diagnose(model.in_blocks(size))
    assert not found.trustworthy and found.table["check"].tolist()[-1] == "pairs"
    assert "in sight in both orders; try model.in_blocks(None)" in found.table["note"].iloc[-1]


def test_a_check_that_could_not_fail_is_not_run():
    """RADD knows no other attention: comparing it with itself would say ok."""
    assert line(rp.diagnose(radd("rope")), "attention weights").result == "not run"
    module = drawn(language_model(transformers.LlamaConfig(**GROUPED), attn_implementation="eager"))
    assert line(rp.diagnose(module), "attention weights").result == "not run"
    compared = line(rp.diagnose(drawn(language_model(transformers.LlamaConfig(**GROUPED)))), "attention weights")
    assert compared.result == "ok" and 0 < compared.measured < 1e-5


class NoAttention(nn.Module):
    """Sees everything by a mean over the tokens, padding included."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.unused = nn.Embedding(56, 16), nn.Linear(16, 56), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        words = self.embed(input_ids)
        self.unused(words)
        return self.head(words + words.mean(1, keepdim=True))


def test_what_is_handled_and_what_is_refused_are_lines():
    found = rp.diagnose(rp.ProbedModel(NoAttention(), objective="masked", mask_token_id=MASK, logit_shift=0))
    assert not found.trustworthy and found.probes == {"attention": False, "gradient": True, "probability": True}
    assert line(found, "attention").result == "refused" and "no attention" in line(found, "attention").note
    assert line(found, "padding").result == "handled" and line(found, "padding").measured > 0.1
    share = (56 * 16 + 16 * 56 + 56) / (56 * 16 + 16 * 56 + 56 + 16 * 16 + 16)
    assert line(found, "parameters").measured == pytest.approx(share)
    assert "not to be trusted or not to be had on it: attention" in repr(found)


def test_a_model_that_cannot_be_wrapped_is_a_line_too():
    class Mixes(NoAttention):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(input_ids) + self.embed(input_ids).mean()

    found = rp.diagnose(Mixes())
    assert found.table["check"].tolist() == ["wrapping"] and "depend on what shares its batch" in found.table["note"][0]
    assert not any(found.probes.values())


def test_a_probe_that_disagrees_with_the_slow_computation_is_refused(monkeypatch):
    """The check is no formality: attention weights of another row, and gradients of another pair, are found out."""
    from revprobe.probes import diagnose as module

    model = drawn(language_model(transformers.LlamaConfig(**GROUPED)))
    for name, column in (("probe_reverse_probability", "log_probability"), ("probe_gradient_cosine", "inner")):
        probe = getattr(module, name)

        def wrong(*args, probe=probe, column=column, **options):
            reading = probe(*args, **options)
            reading.frame[column] = np.roll(reading.frame[column].to_numpy(), 1) * 1.01
            return reading

        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            found = rp.diagnose(model)
        assert not found.trustworthy and sum(found.table["result"] == "refused") == 1


@pytest.mark.long
def test_the_command_ends_with_status_0_only_for_a_model_to_trust(tmp_path: Path):
    drawn(language_model(transformers.LlamaConfig(**GROUPED))).save_pretrained(tmp_path / "sound")
    drawn(language_model(transformers.MambaConfig(vocab_size=56, hidden_size=16, num_hidden_layers=1))).save_pretrained(
        tmp_path / "mamba"
    )
    for folder, status, words in (("sound", 0, "all three probes"), ("mamba", 1, "attention"), ("absent", 1, "error:")):
        command = [sys.executable, "-P", "-m", "revprobe", "diagnose", str(tmp_path / folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, words in done.stdout + done.stderr, "Traceback" in done.stderr) == (
            status,
            True,
            False,
        )


def test_a_name_that_names_no_model_is_an_error():
    with pytest.raises(RevprobeError, match="no model folder"):
        rp.diagnose("./nowhere/at/all")


def test_diagnosing_leaves_no_trace():
    module = drawn(transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**SIZES, block_size=2))).train()
    before, state = str(module), {name: value.clone() for name, value in module.state_dict().items()}
    kernel, generator = module.config._attn_implementation, torch.get_rng_state()
    rp.diagnose(rp.ProbedModel(module, objective="masked", mask_token_id=MASK))
    assert str(module) == before and module.training and module.config._attn_implementation == kernel
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
