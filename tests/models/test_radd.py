"""RADD is the model its docstring says it is: encodings, masks, the excluded mask token, saving."""

import math

import pytest
import torch
from transformers import AutoModelForMaskedLM

from revprobe import RaddConfig, RaddForMaskedLM, RevprobeError
from revprobe.models.configs import POSITION_ENCODINGS
from revprobe.models.radd import alibi_bias, alibi_slopes, rope_tables, rotate


def radd(encoding: str = "rope", **sizes) -> RaddForMaskedLM:
    torch.manual_seed(0)
    return RaddForMaskedLM(RaddConfig(position_encoding=encoding, **sizes)).eval()


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_the_mask_token_is_read_but_never_predicted(encoding):
    """Its logit is -inf everywhere, and changing an input to it changes other logits."""
    model = radd(encoding)
    clean = torch.tensor([[4, 0, 0, 30]])
    masked = torch.tensor([[4, 0, 53, 30]])
    probability = model(masked).logits.softmax(-1)
    assert (probability[..., 53] == 0).all()
    assert (model(clean).logits[0, 0] != model(masked).logits[0, 0]).any()


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_padded_rows_equal_the_rows_alone(encoding):
    """Padding must not leak into attention; shifting the padding mask by one turns this red."""
    model = radd(encoding, n_layers=2, n_heads=2)
    short, long = [4, 0, 30], [5, 0, 0, 0, 31]
    batch = torch.tensor([[*short, 55, 55], long])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = model(batch, attention_mask=mask).logits[0, :3, :53]
    alone = model(torch.tensor([short])).logits[0, :, :53]
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=0)


def test_alibi_slopes_follow_the_published_formula():
    """8 heads: 1/2 ... 1/256 (Press et al. 2022); 12 heads interleave the 16-head sequence."""
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-k for k in range(1, 9)]))
    sixteen = [2 ** (-k / 2) for k in range(1, 17)]
    torch.testing.assert_close(alibi_slopes(12)[8:], torch.tensor(sixteen[0::2][:4]))
    assert alibi_slopes(1).item() == 2**-8


def test_alibi_is_symmetric_in_distance_and_zero_on_the_diagonal():
    bias = alibi_bias(2, 5, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(bias, bias.mT) and (bias.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert bias[0, 0, 0, 3].item() == -3 * 2**-4


def test_rope_scores_depend_on_the_offset_only_and_match_complex_rotation():
    """Against an independent form: plane k as a complex number turned by exp(i position theta_k)."""
    config = RaddConfig(d_model=8, n_heads=1)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = (t.double() for t in rope_tables(config, 12, device=torch.device("cpu")))

    def score(i: int, j: int) -> float:
        q, k = (
            rotate(query[None, None, None], cos[:, i : i + 1], sin[:, i : i + 1]),
            rotate(key[None, None, None], cos[:, j : j + 1], sin[:, j : j + 1]),
        )
        return float((q * k).sum())

    planes = sum(
        complex(query[k], query[k + 4]).conjugate()
        * complex(key[k], key[k + 4])
        * complex(math.cos(t := 5 * 10000 ** (-k / 4)), math.sin(t))
        for k in range(4)
    )
    assert score(2, 7) == pytest.approx(score(5, 10), abs=1e-6)
    assert score(2, 7) == pytest.approx(planes.real, abs=1e-6)


@pytest.mark.parametrize("encoding", ["alibi", "none"])
def test_a_symmetric_encoding_makes_the_model_reflection_equivariant(encoding):
    """An identity: the reversed sequence gives the reversed logits, so forward equals reverse probability."""
    model = radd(encoding, n_layers=2).double()
    ids = torch.tensor([[53, 0, 7, 0, 30]])
    torch.testing.assert_close(
        model(ids.flip(1)).logits.flip(1)[..., :53], model(ids).logits[..., :53], atol=1e-12, rtol=0
    )


def test_rope_is_not_reflection_equivariant():
    """The identity above can fail: it is a property of the encoding, not of the test."""
    model = radd("rope").double()
    ids = torch.tensor([[53, 0, 7, 0, 30]])
    assert (model(ids.flip(1)).logits.flip(1)[..., :53] - model(ids).logits[..., :53]).abs().max() > 1e-6


def test_loss_is_the_unshifted_masked_cross_entropy():
    model = radd()
    ids, labels = torch.tensor([[53, 0, 30]]), torch.tensor([[4, -100, -100]])
    expected = -model(ids).logits[0, 0].log_softmax(-1)[4]
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_save_and_auto_load_give_the_same_logits(encoding, tmp_path):
    model = radd(encoding)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.tensor([[4, 0, 53, 30]])
    assert type(again) is RaddForMaskedLM
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"position_encoding": "rpoe"}, "unknown position_encoding 'rpoe'; the closest is 'rope'"),
        ({"d_model": 30, "n_heads": 4}, "d_model 30 is not divisible by n_heads 4"),
        ({"d_model": 9, "n_heads": 1}, "even head dimension, got 9"),
        ({"mask_token_id": 56}, "mask_token_id 56 is outside the vocabulary of 56 tokens"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(settings, words):
    with pytest.raises(RevprobeError, match=words.replace("(", r"\(")):
        RaddConfig(**settings)


def test_a_sequence_beyond_max_length_is_refused():
    with pytest.raises(RevprobeError, match="sequence of 65 tokens: this model takes at most 64"):
        radd()(torch.zeros(1, 65, dtype=torch.long))
