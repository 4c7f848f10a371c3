"""What the storage probe leaves undefined, why, and how it is counted; and targets of several tokens by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
import tiny
from revprobe.probes.attention import EVIDENCE_HIDDEN
from revprobe.probes.statistics.by_part import evidence_by_pair, logit_contributions
from revprobe.probes.statistics.coverage import ONE_FACT
from revprobe.probes.statistics.estimators import NO_PARTNER
from revprobe.probes.statistics.resampling import derangement
from revprobe.probes.storage import DIFFERENT_TOKENS, NO_LIKE_TARGET, NO_OTHER_TARGET, probe_stored_evidence

LLAMA = {"vocab_size": 56, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
LLAMA |= {"bos_token_id": 54, "eos_token_id": 54, "pad_token_id": 55}


class HandWritten(nn.Module):
    """Embedding, attention, unembedding, with scores, softmax and mixing written out. The token `blind` is hidden from
    every row by the dtype's lowest number; `flat` folds the heads into the batch, as older code does.
    """

    def __init__(self, *, blind: int = -1, flat: bool = False, loud: float = 1.0, heads: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads, self.blind, self.flat, self.loud = heads, blind, flat, loud
        self.embed = nn.Embedding(56, dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim * heads, bias=False) for _ in range(3))
        self.unembed = nn.Linear(dim, 56, bias=False)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key, value = split(self.q(states)), split(self.k(states)), split(self.v(states))
        scores = query @ key.mT * self.loud
        blind = (input_ids == self.blind)[:, None, None].expand_as(scores)
        scores = scores + torch.zeros_like(scores).masked_fill(blind, torch.finfo(scores.dtype).min)
        if self.flat:
            scores, value = scores.flatten(0, 1), value.flatten(0, 1)
        pattern = self.softmax(scores)
        mixed = torch.bmm(pattern, value).unflatten(0, (-1, self.heads)) if self.flat else pattern @ value
        return self.unembed(mixed.sum(1))

    def stored(self) -> np.ndarray:
        """S by head, from the matrices. Shapes: `-> head target token`."""
        values = self.v.weight.unflatten(0, (self.heads, -1)) @ self.embed.weight.T
        return (self.unembed.weight @ values).detach().numpy()

    def routes(self, ids: list[int]) -> np.ndarray:
        """The attention pattern of one sequence, by loops. Shapes: `-> head seq seq`."""
        states = self.embed(torch.tensor(ids)).detach()
        pattern = np.zeros((self.heads, len(ids), len(ids)))
        for head in range(self.heads):
            part = slice(head * states.shape[1], (head + 1) * states.shape[1])
            query, key = states @ self.q.weight[part].T, states @ self.k.weight[part].T
            for row in range(len(ids)):
                raw = np.exp([self.loud * float(query[row] @ key[column]) for column in range(len(ids))])
                pattern[head, row] = raw / raw.sum()
        return pattern


def hand_written(**options: object) -> rp.ProbedModel:
    torch.manual_seed(0)
    module = HandWritten(**options).double().eval()
    return rp.ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)


def mixed_pairs(widths: list[int], flags: list[bool] | None = None) -> rp.ReversalPairs:
    """Pairs of one group whose target and evidence have `widths` tokens: target at 1, evidence at 4, and exchanged."""
    pairs = []
    for fact, width in enumerate(widths):
        ids = torch.randperm(50, generator=torch.Generator().manual_seed(fact)).tolist()
        target, evidence, rest = ids[:width], ids[2 : 2 + width], ids[4:]
        asked = []
        for at, other in ((1, 4), (4, 1)):
            tokens = rest[:7]
            tokens[at : at + width], tokens[other : other + width] = target, evidence
            asked.append(rp.Query(tokens, range(at, at + width), range(other, other + width)))
        differ = bool(flags and flags[fact])
        pairs.append(rp.ReversalPair(*asked, fact=f"fact {fact}", different_tokens=differ))
    return rp.ReversalPairs.from_pairs(pairs)


def shown(query: rp.Query) -> list[int]:
    return [53 if place in query.target_positions else token for place, token in enumerate(query.token_ids)]


# ---- several tokens --------------------------------------------------------------------------------------------------


def test_targets_and_evidence_of_two_tokens_by_hand() -> None:
    """S and margin are means over target and evidence tokens, attention and contributions are summed over evidence
    tokens and averaged over target rows, rank and matrix are among targets of as many tokens; all from the matrices.
    """
    model, widths = hand_written(), [2, 1, 2, 2, 1, 2]
    pairs, matrix = mixed_pairs(widths), model.module.stored()
    reading = probe_stored_evidence(model, pairs, cross=True)
    table = evidence_by_pair(reading)
    s = lambda target, evidence, head=slice(None): matrix[head][..., target, :][..., evidence].mean((-1, -2))  # noqa: E731
    partner = derangement(pairs.facts.astype(str), np.array(widths), seed=0)
    for pair, row in table.iterrows():
        for side in ("forward", "reverse"):
            query = getattr(pairs[pair], side)
            target, evidence = list(query.target), list(query.evidence)
            pattern = model.module.routes(shown(query))[:, list(query.target_positions)]
            at_evidence = pattern[:, :, list(query.evidence_positions)]  # head row evidence
            parts = reading.frame[(reading.frame["pair"] == pair) & (reading.frame["part"] == "evidence")]
            for head in range(2):
                (found,) = parts[parts["head"] == head].to_dict("records")
                each = matrix[head][np.ix_(target, evidence)]  # row evidence
                assert found[f"stored_{side}"] == pytest.approx(each.mean(), abs=1e-12)
                assert found[f"weight_{side}"] == pytest.approx(at_evidence[head].sum(1).mean(), abs=1e-12)
                routed = (at_evidence[head] * each).sum(1).mean()
                assert found[f"contribution_{side}"] == pytest.approx(routed, abs=1e-12)
            alike = [list(pairs[n].reverse.target) for n in range(6) if widths[n] == widths[pair] and n != pair]
            own, others = s(target, evidence).sum(), [s(other, evidence).sum() for other in alike]
            assert row[f"margin_{side}"] == pytest.approx(own - max(others), abs=1e-12)
            assert row[f"rank_{side}"] == 1 + sum(other > own for other in others)
        elsewhere = list(pairs[int(partner[pair])].reverse.evidence)
        assert row["stored_control"] == pytest.approx(s(target, elsewhere).sum(), abs=1e-12)
        for other in range(6):
            found = reading.cross.loc[f"fact {pair}", f"fact {other}"]
            expected = s(target, list(pairs[other].reverse.evidence)).sum() if widths[other] == widths[pair] else None
            assert math.isnan(found) if expected is None else found == pytest.approx(expected, abs=1e-12)


# ---- the control -----------------------------------------------------------------------------------------------------


def test_the_control_deranges_among_targets_of_as_many_tokens() -> None:
    """One group, two widths: every pair has a partner, so value, control and excess are over the same pairs."""
    pairs = mixed_pairs([1, 2, 1, 2, 1, 2, 1, 2])
    reading = probe_stored_evidence(hand_written(), pairs)
    assert len(set(reading.frame["group"])) == 1
    assert reading.n == reading.control.n == reading.excess.n == 8
    assert reading.undefined == {}
    assert reading.excess.value == pytest.approx(reading.value - reading.control.value)


def test_a_pair_that_has_no_partner_says_which_kind_is_missing() -> None:
    """The value keeps the pair, control and excess do not; both counts stand in the reading."""
    reading = probe_stored_evidence(hand_written(), mixed_pairs([1, 1, 1, 2]))
    assert (reading.n, reading.control.n, reading.excess.n) == (4, 3, 3)
    assert reading.undefined == {NO_LIKE_TARGET: 1}
    assert f"{NO_LIKE_TARGET!r}: 1" in repr(reading)
    title = reading.plot().layout.title.text.replace("<br>", " ")
    assert "n = 4 pairs of 4 facts (control over 3 of 3), 1 undefined" in title
    table = evidence_by_pair(reading)
    assert table["reason_control"].tolist() == ["", "", "", NO_LIKE_TARGET]
    assert reading.excess.value == pytest.approx((table["stored_reverse"] - table["stored_control"]).mean())
    assert probe_stored_evidence(hand_written(), mixed_pairs([1])).undefined == {NO_PARTNER: 1, ONE_FACT: 1}
    assert "reason_control" not in probe_stored_evidence(hand_written(), mixed_pairs([1, 1]), control=False).frame


def test_a_partner_whose_evidence_is_hidden_is_no_control() -> None:
    """Of two facts the second one's evidence is hidden: the first keeps its value and loses its control."""
    pairs = mixed_pairs([1, 1])
    reading = probe_stored_evidence(hand_written(blind=pairs[1].reverse.evidence[0]), pairs)
    table = evidence_by_pair(reading)
    assert table["reason"].tolist() == ["", EVIDENCE_HIDDEN]
    assert np.isfinite(table["stored_reverse"][0])
    assert np.isnan(table["stored_control"]).all()
    assert table["reason_control"][0] == f"{EVIDENCE_HIDDEN} (control)"
    assert reading.control is None
    assert reading.n == 1
    assert reading.undefined == {EVIDENCE_HIDDEN: 1, f"{EVIDENCE_HIDDEN} (control)": 1, ONE_FACT: 1}


# ---- hidden, or too small to count ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_a_weight_that_underflowed_is_not_a_mask(flat: bool) -> None:
    """Scores so wide that the evidence's weight is exactly 0: its S is what the matrices say, and nothing is hidden."""
    model, pairs = hand_written(loud=1000.0, flat=flat), mixed_pairs([1] * 6)
    reading = probe_stored_evidence(model, pairs)
    rows = reading.frame[reading.frame["part"] == "evidence"]
    assert (rows[["weight_forward", "weight_reverse"]] == 0).any().all(), "no weight underflowed"
    assert reading.undefined == {}
    matrix = model.module.stored().sum(0)
    expected = np.mean([matrix[pair.reverse.target[0], pair.reverse.evidence[0]] for pair in pairs])
    assert reading.value == pytest.approx(expected, abs=1e-12)
    hidden = probe_stored_evidence(hand_written(blind=pairs[2].forward.evidence[0], loud=1000.0, flat=flat), pairs)
    assert hidden.n == 5, "what the mask hides is still told"


@pytest.mark.parametrize(("dtype", "loud"), [(torch.float32, 25.0), (torch.float16, 6.0)])
def test_eager_attention_gives_what_sdpa_gives_where_weights_underflow(dtype: torch.dtype, loud: float) -> None:
    readings = []
    for kernel in ("sdpa", "eager"):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**LLAMA), attn_implementation=kernel
        )
        for name, parameter in module.named_parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
            parameter.data *= loud if ".q_proj" in name or ".k_proj" in name else 1.0
        model = rp.ProbedModel(module.eval().to(dtype), objective="causal", logit_shift=1)
        before = [
            rp.Query([54, *pair.reverse.evidence, *pair.reverse.token_ids[5:], 9, *pair.reverse.target], [5], [1])
            for pair in mixed_pairs([1] * 6)
        ]
        pairs = [rp.ReversalPair(query, query, fact=str(n)) for n, query in enumerate(before)]
        readings.append(probe_stored_evidence(model, pairs, control=False))
    sdpa, eager = readings
    zero = (eager.frame["part"] == "evidence") & (eager.frame["weight_reverse"] == 0)
    assert zero.any(), "no weight underflowed"
    assert eager.n == sdpa.n == 6
    assert eager.undefined == {}
    assert eager.value == pytest.approx(sdpa.value, rel=1e-4 if dtype == torch.float32 else 0.05)


def test_evidence_behind_an_eager_mask_is_hidden_and_counted() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**LLAMA, sliding_window=2)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    queries = [rp.Query([54, 3, 40, 7], [2], [1]), rp.Query([3, 54, 7, 9, 40], [4], [0])]
    pairs = [rp.ReversalPair(*queries, fact="a"), rp.ReversalPair(queries[0], queries[0], fact="b")]
    reading = probe_stored_evidence(rp.ProbedModel(module, objective="causal", logit_shift=1), pairs, control=False)
    assert reading.n == 1
    assert reading.undefined == {EVIDENCE_HIDDEN: 1, ONE_FACT: 1}, "pairs are counted, not heads"


# ---- all that is undefined, with its reason --------------------------------------------------------------------------


@pytest.mark.parametrize("why", [EVIDENCE_HIDDEN, DIFFERENT_TOKENS])
def test_margin_rank_and_matrix_are_undefined_where_s_is(why: str) -> None:
    """One pair of four, by its reason: its rows of every number of S, and its row and column of the matrix."""
    pairs = mixed_pairs([1] * 4, [why == DIFFERENT_TOKENS and fact == 1 for fact in range(4)])
    blind = pairs[1].forward.evidence[0] if why == EVIDENCE_HIDDEN else -1
    reading = probe_stored_evidence(hand_written(blind=blind), pairs, cross=True)
    assert reading.undefined[why] == 1
    table = evidence_by_pair(reading)
    numbers = [f"{name}_{side}" for name in ("stored", "margin", "rank") for side in ("forward", "reverse")]
    assert table.loc[1, numbers].isna().all()
    assert table.loc[[0, 2, 3], numbers].notna().all().all()
    assert table["reason"].tolist() == table["reason_margin"].tolist() == ["", why, "", ""]
    undefined = reading.cross.isna().to_numpy()
    assert undefined[1].all()
    assert undefined[:, 1].all()
    assert undefined.sum() == 7, "the others are defined"


def test_a_target_without_another_of_its_length_says_why_it_has_no_margin() -> None:
    table = evidence_by_pair(probe_stored_evidence(hand_written(), mixed_pairs([1, 1, 2])))
    assert table["reason_margin"].tolist() == ["", "", NO_OTHER_TARGET]
    assert np.isnan(table.loc[2, ["margin_reverse", "rank_reverse"]].astype(float)).all()
    assert np.isfinite(table["stored_reverse"]).all()
    assert not table["reason"].any()


# ---- some layers only ------------------------------------------------------------------------------------------------


two_layers = partial(tiny.radd, n_layers=2, n_heads=2, scale=0.2, dtype=torch.float64)


@pytest.mark.parametrize("layers", [[0, 7], [7], [-1]])
def test_a_layer_that_is_not_there_is_named(layers: list[int]) -> None:
    ran = []
    with pytest.raises(rp.RevprobeError, match=rf"no layer {layers[-1]} to measure in .*: expected some of 0, 1$"):
        probe_stored_evidence(
            two_layers(), mixed_pairs([1] * 4), layers=layers, batch_size=1, progress=lambda *at: ran.append(at)
        )
    assert not ran, "said after the first batch, not the last"
    with pytest.raises(rp.RevprobeError, match=r"no layer list \[\] to measure"):
        probe_stored_evidence(two_layers(), mixed_pairs([1] * 4), layers=[])


def test_contributions_of_some_layers_add_up_to_the_logit_with_the_rest() -> None:
    """The rest is what the whole reading holds elsewhere: the other layer, MLPs, embedding, norms and biases."""
    model, pairs = two_layers(), mixed_pairs([1] * 4)
    some, every = probe_stored_evidence(model, pairs, layers=[1]), probe_stored_evidence(model, pairs)
    table = logit_contributions(some).set_index("part")
    whole = logit_contributions(every)
    elsewhere = whole[
        (whole["part"] != "logit") & ~(whole["part"].isin(["evidence", "others"]) & (whole["layer"] == 1))
    ]
    for side in ("forward", "reverse"):
        assert table.drop("logit")[side].sum() == pytest.approx(table.loc["logit", side], abs=1e-10)
        assert table.loc["rest", side] == pytest.approx(elsewhere[side].sum(), abs=1e-10)
        assert table.loc["rest", f"{side}_low"] < table.loc["rest", side] < table.loc["rest", f"{side}_high"]
    assert "rest" not in set(whole["part"])
    assert "rest: not measured" in " ".join(some.plot().data[0].y)
