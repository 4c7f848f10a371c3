"""RADD is the model its docstring says it is: encodings, initialisation, dropout, masks, the mask token, saving."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from plain_gradients import worst_product_error
from scipy import stats
from transformers import AutoModelForMaskedLM

from revprobe import RaddConfig, RaddForMaskedLM, RevprobeError, load_model
from revprobe.models.bases.configs import DROPOUT_SITES, POSITION_ENCODINGS
from revprobe.models.bases.positions import alibi_bias, alibi_slopes, rope_tables, rotate, signed_offsets


def radd(encoding: str = "rope", **options) -> RaddForMaskedLM:
    torch.manual_seed(0)
    return RaddForMaskedLM(RaddConfig(position_encoding=encoding, **options)).eval()


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
    bias = alibi_bias(2, torch.arange(5)[None], dtype=torch.float64)
    assert torch.equal(bias, bias.mT) and (bias.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert bias[0, 0, 0, 3].item() == -3 * 2**-4


def test_rope_scores_depend_on_the_offset_only_and_match_complex_rotation():
    """Against an independent form: plane k as a complex number turned by exp(i position theta_k)."""
    config = RaddConfig(d_model=8, n_heads=1)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = (t.double() for t in rope_tables(config, torch.arange(12)[None]))

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


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
def test_scalar_adds_its_number_of_head_and_signed_offset_to_the_content_score(heads):
    """Attention written out with loops; queries and values see no position, left and right have numbers of their own.

    A table indexed by i - j, by |j - i| or one row off turns this red.
    """
    model = radd("scalar", d_model=8, n_heads=heads, max_length=6).double()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    block, table = model.blocks[0], model.embed_offsets.weight
    assert table.shape == (2 * 6 - 1, heads)
    ids = torch.tensor([[4, 0, 53, 30, 4]])
    normed = block.attention_norm(model.embed_tokens(ids))[0]
    projections = (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
    q, k, v = (projection(normed).unflatten(-1, (heads, -1)) for projection in projections)
    mixed = torch.zeros_like(q)
    for head in range(heads):
        for i in range(5):
            scores = [q[i, head] @ k[j, head] / math.sqrt(8 / heads) + table[j - i + 5, head] for j in range(5)]
            mixed[i, head] = torch.stack(scores).softmax(0) @ v[:, head]
    seen = []
    block.attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    model(ids)
    torch.testing.assert_close(seen[0][0], block.attention.o_proj(mixed.flatten(1)), atol=1e-12, rtol=0)


@torch.no_grad()
def test_scalar_can_look_to_one_side_and_not_to_the_other():
    """A table that is high at +1 alone puts the attention on the next token."""
    model = radd("scalar", max_length=8)
    model.embed_offsets.weight.zero_()
    model.embed_offsets.weight[1 + 7] = 200.0
    reads = lambda ids: model(torch.tensor([ids])).logits[0, 1, :53]  # noqa: E731
    assert torch.equal(reads([4, 53, 30]), reads([9, 53, 30])), "the token on the left is not read"
    assert not torch.equal(reads([4, 53, 30]), reads([4, 53, 31])), "the token on the right is"
    assert not torch.equal(reads([30, 53, 4]), reads([4, 53, 30])), "so a mirror image is told apart"
    assert signed_offsets(torch.arange(3)[None], 8).tolist() == [[[7, 8, 9], [6, 7, 8], [5, 6, 7]]]


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
        ({"initialization": "publishd"}, "unknown initialization 'publishd'; the closest is 'published'"),
        ({"dropout_sites": ["attention", "mpl"]}, "unknown dropout site 'mpl'; the closest is 'mlp'"),
        ({"dropout_sites": "mlp"}, "dropout_sites 'mlp': expected a list of some of embedding, attention_weights"),
        ({"d_model": 30, "n_heads": 4}, "d_model 30 is not divisible by n_heads 4"),
        ({"d_model": 9, "n_heads": 1}, "even head dimension, got 9"),
        ({"mask_token_id": 56}, "mask_token_id 56 is outside the vocabulary of 56 tokens"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, words):
    with pytest.raises(RevprobeError, match=words.replace("(", r"\(")):
        RaddConfig(**settings)


def test_a_sequence_beyond_max_length_is_refused():
    with pytest.raises(RevprobeError, match="sequence of 65 tokens: this model takes at most 64"):
        radd()(torch.zeros(1, 65, dtype=torch.long))


# --- who sees whom, and where tokens stand ---------------------------------------------------------------------------


def sees(rule, length: int) -> torch.Tensor:
    """A mask by asking a rule of each query and key, one by one. Shapes: `-> 1 1 seq seq (bool)`."""
    return torch.tensor([[rule(i, j) for j in range(length)] for i in range(length)])[None, None]


def added(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


@torch.no_grad()
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_one_mask_said_in_three_ways_gives_one_answer(encoding):
    """Padding as 0 and 1, as what is added to the scores, and as who sees whom."""
    model = radd(encoding, n_layers=2, n_heads=2)
    ids, padding = torch.randint(0, 53, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    who = padding.bool()[:, None, None, :].expand(-1, 1, 5, -1)
    short = model(ids, attention_mask=padding).logits
    for mask in (who, added(who), added(who).double()):
        assert torch.equal(model(ids, attention_mask=mask).logits, short)
    assert torch.equal(model(ids, attention_mask=torch.zeros(1, 1, 5, 5)).logits, model(ids).logits)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 5, 5, dtype=torch.long),
        *(torch.ones(shape) for shape in [(5,), (2, 5, 5), (2, 4), (3, 5), (2, 1, 5, 4), (2, 1, 4, 5), (3, 1, 5, 5)]),
    ],
    ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype}",
)
def test_a_mask_of_another_shape_or_two_meanings_is_refused(mask):
    """Whole numbers for each query and key: 1 may be added, or mean that the key is seen."""
    words = r"attention_mask \(.*\) of torch\.\w+: expected \(2, 5\) with 0 at padding, or \(2, 1, 5, 5\) of fractions"
    with pytest.raises(RevprobeError, match=words):
        radd()(torch.zeros(2, 5, dtype=torch.long), attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@pytest.mark.parametrize(("length", "size"), [(6, 2), (7, 3)])
def test_noised_beside_clean_gives_each_noised_block_what_it_has_after_the_clean_ones(encoding, length, size):
    """The training pass, both copies at positions 0, 1, ..., against a pass for each block: clean blocks, then it.

    Positions that go on through the clean copy, or a noised token that sees its own clean block, turn this red.
    """
    model = drawn_radd(encoding)
    clean = torch.randint(0, 50, (2, length))
    noised = clean.masked_fill(torch.rand(clean.shape) < 0.5, 53)
    block = [i // size for i in range(length)] * 2

    def rule(i: int, j: int) -> bool:
        if j < length:  # a noised key
            return i < length and block[i] == block[j]
        return block[j] < block[i] if i < length else block[j] <= block[i]

    given = {"attention_mask": added(sees(rule, 2 * length)), "position_ids": torch.arange(length).repeat(2)[None]}
    together = model(torch.cat([noised, clean], dim=1), **given).logits[:, :length]
    for start in range(0, length, size):
        stop = min(start + size, length)
        ids = torch.cat([clean[:, :start], noised[:, start:stop]], dim=1)
        mask = added(sees(lambda i, j: block[j] <= block[i], stop))
        alone = model(ids, attention_mask=mask).logits[:, start:]
        torch.testing.assert_close(together[:, start:stop, :53], alone[..., :53], atol=1e-5, rtol=0)


def drawn_radd(encoding: str) -> RaddForMaskedLM:
    model = radd(encoding, n_layers=2, n_heads=2, max_length=8)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_positions_are_those_that_are_given(encoding):
    """0, 1, ... unless given; moved together they change nothing but a learned vector of each; apart, they do."""
    model, ids = drawn_radd(encoding), torch.randint(0, 53, (2, 5))
    plain = model(ids).logits[..., :53]
    at = lambda *places: model(ids, position_ids=torch.tensor(places)).logits[..., :53]  # noqa: E731
    assert torch.equal(at([0, 1, 2, 3, 4]), plain) and torch.equal(at([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), plain)
    moved, spread = at([3, 4, 5, 6, 7]), at([0, 1, 2, 3, 4], [0, 2, 3, 5, 7])
    assert torch.allclose(moved, plain, atol=1e-5) == (encoding != "absolute")
    assert torch.allclose(spread[0], plain[0], atol=1e-6), "the first row stands where it stood"
    assert torch.allclose(spread[1], plain[1], atol=1e-4) == (encoding == "none")


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([[0, 1, 2, 3, 64]], r"position_ids from 0 to 64: this model has positions 0 to 63"),
        ([[-1, 0, 1, 2, 3]], r"position_ids from -1 to 3: this model has positions 0 to 63"),
        ([[0, 1, 2, 3]], r"position_ids \(1, 4\): expected one for each token, \(2, 5\)"),
        ([0, 1, 2, 3, 4], r"position_ids \(5,\): expected one for each token, \(2, 5\)"),
        ([[0, 1, 2, 3, 4]] * 3, r"position_ids \(3, 5\): expected one for each token, \(2, 5\)"),
    ],
)
def test_positions_that_do_not_fit_are_refused(places, words):
    with pytest.raises(RevprobeError, match=words):
        radd()(torch.zeros(2, 5, dtype=torch.long), position_ids=torch.tensor(places))


@pytest.mark.parametrize("encoding", ["scalar", "absolute", "rope"])
def test_gradient_products_with_a_mask_and_positions_of_each_row_equal_autograd(encoding):
    """A table of offsets that is looked up for each row by itself, and one that is looked up once for all."""
    model = drawn_radd(encoding).double()
    ids, targets = torch.randint(0, 53, (3, 6)), torch.tensor([1, 2, 3])
    mask = added(sees(lambda i, j: j // 2 <= i // 2, 6)).double()
    places = torch.stack([torch.arange(6), torch.arange(6) + 1, torch.tensor([0, 1, 2, 0, 1, 2])])

    def loss(part: slice) -> torch.Tensor:
        logits = model(ids[part], attention_mask=mask, position_ids=places[part]).logits[:, 2]
        return F.cross_entropy(logits, targets[part], reduction="none")

    assert worst_product_error(model, dict(model.named_parameters()), loss, 3, one_by_one=False) < 1e-10


# --- the published initialisation and dropout -----------------------------------------------------------------------


def half_widths(config: RaddConfig) -> dict[str, float]:
    """Half the width of each uniform draw, written out by the parameter's name."""
    d, inside = config.d_model**-0.5, (config.mlp_ratio * config.d_model) ** -0.5
    widths = {"embed_tokens.weight": d, "embed_positions.weight": d, "embed_offsets.weight": d}
    widths |= {f"blocks.1.attention.{letter}_proj.weight": d for letter in "qkvo"}
    widths |= {f"blocks.1.mlp.up_proj.{kind}": d for kind in ("weight", "bias")}
    return widths | {f"blocks.1.mlp.down_proj.{kind}": inside for kind in ("weight", "bias")}


@pytest.mark.parametrize("encoding", ["rope", "absolute", "scalar"])
def test_the_published_initialisation_has_the_published_distributions(encoding):
    """Uniform within the stated bounds (Kolmogorov-Smirnov), zero unembedding, LayerNorms of ones, biases too.

    Ten seeds are pooled and the level shared among the parameters: at one seed, one bias in some hundreds of right
    draws falls below a level of 1e-3 of its own (seed 0's does, with `scalar`).
    """
    sizes = {"d_model": 96, "n_heads": 4, "n_layers": 2, "vocab_size": 300, "max_length": 200}
    config = RaddConfig(position_encoding=encoding, initialization="published", head_bias=True, **sizes)
    drawn: dict[str, list[torch.Tensor]] = {}
    for seed in range(10):
        torch.manual_seed(seed)
        for name, parameter in RaddForMaskedLM(config).named_parameters():
            drawn.setdefault(name, []).append(parameter.detach().flatten())
    widths = half_widths(config)
    level = 1e-3 / len(widths)
    for name, parts in drawn.items():
        values = torch.cat(parts)
        if name.startswith("lm_head"):
            assert (values == 0).all(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        elif not name.startswith("blocks.0"):
            width = widths.pop(name)
            assert values.abs().max() <= width, name
            # A uniform's std is width / sqrt(3); estimated from n draws its relative error is sqrt(0.2 / n).
            assert float(values.std()) == pytest.approx(width / 3**0.5, rel=4 * (0.2 / len(values)) ** 0.5), name
            assert stats.kstest(values.numpy(), stats.uniform(-width, 2 * width).cdf).pvalue > level, name
    assert set(widths) <= {"embed_positions.weight", "embed_offsets.weight"}, "every other draw was looked at"


def test_the_published_draw_of_a_linear_layer_is_torchs_own():
    """The same numbers at one seed, up to rounding, if ever torch's default changes."""
    model, torchs = radd(initialization="published"), torch.nn.Linear(64, 256)
    ours = model.blocks[0].mlp.up_proj
    for draw in (lambda: model._init_weights(ours), torchs.reset_parameters):
        torch.manual_seed(5)
        draw()
    for kind in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, kind), getattr(torchs, kind), atol=1e-7, rtol=0)


def test_a_new_published_model_says_nothing_and_a_saved_one_is_not_drawn_anew(tmp_path):
    model = radd(initialization="published", head_bias=True)
    assert (model(torch.tensor([[4, 0, 53, 30]])).logits[..., :53] == 0).all()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path).module
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())
    assert again.config.dropout_sites == model.config.dropout_sites and again.lm_head.bias is not None


@torch.no_grad()
@pytest.mark.parametrize("sites", [(), *((site,) for site in DROPOUT_SITES), ("mlp", "attention"), DROPOUT_SITES])
def test_dropout_falls_on_the_sites_that_are_named_and_on_no_other(sites, monkeypatch):
    """The share of zeros that each module makes, the rate that attention is given, and whether anything moves."""
    model = radd(dropout=0.3, dropout_sites=sites, n_layers=2)
    assert model.config.dropout_sites == tuple(site for site in DROPOUT_SITES if site in sites)
    ids, rates, zeros, sdpa = torch.randint(0, 53, (16, 20)), [], {}, F.scaled_dot_product_attention
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _, args, out, name=name: zeros.update({name: (out == 0).float()}))

    def attend(*args, dropout_p, **given):
        rates.append(dropout_p)
        return sdpa(*args, dropout_p=dropout_p, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    still = model(ids).logits
    moved = model.train()(ids).logits
    expected = {site: 0.3 if site in sites else 0.0 for site in DROPOUT_SITES}
    assert rates == [0.0] * 2 + [expected["attention_weights"]] * 2
    by_module = {"dropout": expected["embedding"]}
    for layer in range(2):
        by_module |= {f"blocks.{layer}.{site}_dropout": expected[site] for site in ("attention", "mlp")}
    assert {name: float(dropped.mean()) for name, dropped in zeros.items()} == pytest.approx(by_module, abs=0.015)
    assert torch.equal(moved, still) == (not sites)


# --- what was there before these options ------------------------------------------------------------------------------

# Logits of tokens 4 and 30 in row 2 for [4, 0, mask, 30], in training mode, and the generator's next number, as they
# were before there were options of initialisation and dropout. float32 on a CPU; other kernels may round otherwise.
BEFORE = {
    "rope": (-0.02616014, -0.10176244, 0.06663817167282104),
    "alibi": (-0.02614095, -0.10171606, 0.06663817167282104),
    "absolute": (-0.06920011, 0.01319224, 0.40819424390792847),
    "none": (-0.02616739, -0.10175607, 0.06663817167282104),
}


@pytest.mark.parametrize("encoding", BEFORE)
def test_a_seed_draws_the_weights_and_the_dropout_that_it_always_drew(encoding):
    model = radd(encoding, dropout=0.1, d_model=16).train()
    logits = model(torch.tensor([[4, 0, 53, 30]])).logits[0, 2, [4, 30]].tolist()
    assert (*logits, float(torch.rand(1))) == pytest.approx(BEFORE[encoding], abs=1e-6)


@pytest.mark.parametrize("encoding", BEFORE)
def test_a_checkpoint_without_the_newer_keys_loads_as_it_was(encoding, tmp_path):
    model = radd(encoding, dropout=0.1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("initialization", "head_bias", "dropout_sites"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, ids = load_model(tmp_path).module, torch.tensor([[4, 0, 53, 30]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.config.initialization, again.config.head_bias) == ("normal", False)
    assert again.config.dropout_sites == DROPOUT_SITES and again.lm_head.bias is None
