"""The example of a model class written by its user runs, and its three readings are right."""

import runpy
import subprocess
import sys

import pytest
import torch

import revprobe as rp
from revprobe.models import registry


@pytest.fixture
def example(root, monkeypatch):
    """The example as a module's names; its registration does not outlive the test."""
    monkeypatch.setattr(registry, "_LOADERS", {})
    return runpy.run_path(str(root / "examples" / "custom_checkpoint.py"))


def test_the_example_prints_the_model_and_three_readings(root, tmp_path):
    command = [sys.executable, str(root / "examples" / "custom_checkpoint.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith("ProbedModel(my-masked-model, masked (bidirectional), logit_shift=0")
    names = ("attention_correlation", "gradient_cosine", "reverse_probability")
    assert [sum(name in line for line in lines) for name in names] == [1, 1, 1], done.stdout


def test_its_readings_equal_the_bare_modules_numbers(example, tmp_path):
    """Scores from the fused projection's own rows, probabilities from a plain softmax, on a few pairs."""
    torch.manual_seed(0)
    module = example["MyMaskedModel"]().eval()
    example["save_model"](module, str(tmp_path / "model.safetensors"))
    model = rp.load_model("my-masked-model", path=tmp_path / "model.safetensors")
    pairs = rp.letter_pairs(length=5, model=model, placements="mirror")
    attention, _, probability = rp.probe(model, pairs, control=False)
    for pair in range(0, len(pairs), 61):
        query = pairs[pair].reverse
        ids = torch.tensor([query.token_ids])
        ids[0, query.target_positions[0]] = 53
        with torch.no_grad():
            p = module(ids)[0, query.target_positions[0]].softmax(-1)[query.target[0]]
            hidden = module.tokens(ids) + module.places(torch.arange(ids.shape[1])[None])
            q, k, _ = module.layers[0].qkv(hidden)[0].view(-1, 3, 2, 16).unbind(1)
            score = q[query.target_positions[0], 1] @ k[query.evidence_positions[0], 1] / 4
        asked = probability.frame.query("pair == @pair and direction == 'reverse'").probability.item()
        seen = attention.frame.query("pair == @pair and layer == 0 and head == 1").score_reverse.item()
        assert (asked, seen) == pytest.approx((float(p), float(score)), abs=1e-5)


def test_what_the_loader_leaves_out_is_asked_for(example, tmp_path):
    example["save_model"](example["MyMaskedModel"](), str(tmp_path / "model.safetensors"))
    with pytest.raises(rp.RevprobeError, match=r"pass logit_shift=0 .* or logit_shift=1"):
        rp.ProbedModel(example["MyMaskedModel"](), objective="masked", mask_token_id=53)
    shifted = rp.load_model("my-masked-model", path=tmp_path / "model.safetensors", logit_shift=1)
    assert shifted.logit_shift == 1
