"""The storage probe against plain attention by hand, references of other kinds, and autograd's own gradients."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
import tiny
from revprobe.hooks import linearize as linearized
from revprobe.models.bases.configs import POSITION_ENCODINGS, DreamConfig, LLaDAConfig
from revprobe.models.families.dream import DreamForMaskedDiffusion
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from revprobe.probes.attention import EVIDENCE_HIDDEN
from revprobe.probes.passes import decomposition
from revprobe.probes.passes.batches import make_batch, prepare_queries
from revprobe.probes.passes.decomposition import LinearizedBatch
from revprobe.probes.statistics.by_part import evidence_by_pair, logit_contributions
from revprobe.probes.statistics.coverage import ONE_FACT
from revprobe.probes.statistics.resampling import derangement
from revprobe.probes.storage import DIFFERENT_TOKENS, probe_stored_evidence
from tiny import GROUPED, SIZES, AttentionOnly, drawn, text_like_pairs

LLADA = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": 56}
LLADA |= {"mask_token_id": 53, "pad_token_id": 55, "eos_token_id": 54}
DREAM = {**SIZES, "num_key_value_heads": 2, "mask_token_id": 53}


radd = partial(tiny.radd, scale=0.2, dtype=torch.float64)
causal = partial(tiny.causal, scale=0.2)


def attention_only(heads: int = 1) -> rp.ProbedModel:
    module = drawn(lambda: AttentionOnly(heads), scale=0.2, dtype=torch.float64)
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", mask_token_id=53, logit_shift=0)


def wrapped(module: nn.Module, objective: str, shift: int) -> rp.ProbedModel:
    masked = {"mask_token_id": 53} if objective == "masked" else {}
    module = drawn(module, scale=0.2)
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective=objective, logit_shift=shift, **masked)


def pairs_for(model: rp.ProbedModel, length: int = 5, alphabet: int = 5) -> rp.ReversalPairs:
    return rp.letter_pairs(length, model=model, placements="mirror", alphabet=alphabet)


def shown(model: rp.ProbedModel, query: rp.Query) -> Tensor:
    ids = torch.tensor([query.token_ids])
    if model.objective == "masked":
        ids[0, list(query.target_positions)] = model.mask_token_id
    return ids


def one(reading: rp.Reading, pair: int, **where: object) -> pd.Series:
    """The rows of one pair, summed over those that match `where`."""
    rows = reading.frame[reading.frame["pair"] == pair]
    for column, value in where.items():
        rows = rows[rows[column].isna() if value is None else (rows[column] == value).fillna(False)]
    assert len(rows), f"no row with {where}"
    return rows[["stored_forward", "stored_reverse", "contribution_forward", "contribution_reverse"]].sum()


def sum_error(reading: rp.Reading) -> float:
    """By how much a pair's contributions miss its logit."""
    table = reading.frame.groupby("pair")
    errors = [
        (table[f"contribution_{side}"].sum() - table[f"logit_{side}"].first()).abs().max()
        for side in ("forward", "reverse")
    ]
    return float(max(errors))


# ---- one layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_s_is_the_product_of_the_matrices_and_the_logit_is_its_attention_average(heads: int) -> None:
    """The paper's model: S = W_U W_V E by head, z = sum_j a_j S[:, x_j], nothing else."""
    model = attention_only(heads)
    pairs, module = pairs_for(model), model.module
    reading = probe_stored_evidence(model, pairs)
    by_head = module.v.weight.unflatten(0, (heads, -1)) @ module.embed.weight.T  # head dim token
    matrix = (module.unembed.weight @ by_head).detach()  # head target token
    for row in reading.frame[reading.frame["part"] == "evidence"].itertuples():
        for side, query in (("forward", pairs[row.pair].forward), ("reverse", pairs[row.pair].reverse)):
            (target,), (evidence,) = query.target, query.evidence
            expected = float(matrix[row.head, target, evidence])
            assert getattr(row, f"stored_{side}") == pytest.approx(expected, abs=1e-12)
            weight = getattr(row, f"weight_{side}")
            assert getattr(row, f"contribution_{side}") == pytest.approx(weight * expected, abs=1e-12)
    assert set(reading.frame["part"]) == {"evidence", "others"}, "no norm, residual or bias in this model"
    assert sum_error(reading) < 1e-12


def test_margin_rank_value_control_and_matrix_come_from_s() -> None:
    """All from the matrix by hand: the best other target, the derangement's evidence, the mean over pairs."""
    model = attention_only(2)
    pairs, module = pairs_for(model), model.module
    values = module.v.weight.unflatten(0, (2, -1)).sum(0)
    matrix = (module.unembed.weight @ values @ module.embed.weight.T).detach().numpy()
    reading = probe_stored_evidence(model, pairs, cross=True)
    targets = sorted({query.target[0] for query in pairs.queries})
    table = evidence_by_pair(reading)
    partner = derangement(pairs.facts.astype(str), pairs.groups(0), seed=0)
    for pair, row in table.iterrows():
        (target,), (evidence,) = pairs[pair].reverse.target, pairs[pair].reverse.evidence
        others = [matrix[other, evidence] for other in targets if other != target]
        assert row["stored_reverse"] == pytest.approx(matrix[target, evidence], abs=1e-12)
        assert row["margin_reverse"] == pytest.approx(matrix[target, evidence] - max(others), abs=1e-12)
        assert row["rank_reverse"] == 1 + sum(other > matrix[target, evidence] for other in others)
        (elsewhere,) = pairs[int(partner[pair])].reverse.evidence
        assert row["stored_control"] == pytest.approx(matrix[target, elsewhere], abs=1e-12)
    assert reading.value == pytest.approx(table["stored_reverse"].mean())
    assert reading.control.value == pytest.approx(table["stored_control"].mean())
    assert reading.excess.value == pytest.approx(reading.value - reading.control.value)
    ids = rp.letter_tokenizer().get_vocab()
    for fact in reading.cross.index:
        for other in reading.cross.columns:
            assert reading.cross.loc[fact, other] == pytest.approx(matrix[ids[fact], ids[other.upper()]], abs=1e-12)


def test_a_contribution_is_what_silencing_that_position_of_that_head_takes_away() -> None:
    """Brute force: without softmax, norm or MLP behind it, a head's contribution is its ablation effect exactly."""
    model = attention_only(3)
    pairs, module = pairs_for(model), model.module
    reading = probe_stored_evidence(model, pairs, control=False)
    for head in range(3):
        for pair in range(0, len(pairs), 7):
            query = pairs[pair].reverse
            row, (target,) = query.target_positions[0], query.target
            whole = module(shown(model, query))[0, row, target]
            module.cut = head, torch.tensor(query.evidence_positions)
            without = module(shown(model, query))[0, row, target]
            module.cut = None
            found = one(reading, pair, part="evidence", head=head)["contribution_reverse"]
            assert found == pytest.approx((whole - without).item(), abs=1e-12)


def by_hand(model: rp.ProbedModel, query: rp.Query) -> dict[tuple[str, str | None], float]:
    """One-layer RADD written out with matrices: (part, source) -> contribution, heads added up."""
    m, block, ids = model.module, model.module.blocks[0], shown(model, query)
    row, (target,) = query.target_positions[0], query.target
    d, heads = m.config.d_model, m.config.n_heads
    token = m.embed_tokens(ids)[0]
    place = m.embed_positions.weight[: ids.shape[1]] if hasattr(m, "embed_positions") else torch.zeros_like(token)
    states = token + place
    norm = block.attention_norm
    scale = (states.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt() * norm.weight
    terms = {"token": token * scale, "position": place * scale, "norm": -states.mean(-1, keepdim=True) * scale}
    terms["bias"] = norm.bias.expand_as(states)
    pattern = attention_by_hand(model, sum(terms.values()), ids)[:, row]  # head seq
    out = block.attention.o_proj.weight.unflatten(1, (heads, -1)).transpose(0, 1)  # head d_model dim
    after = states[row].clone()
    read = {}
    for source, term in terms.items():
        values = block.attention.v_proj(term).unflatten(-1, (heads, -1))  # seq head dim
        read[source] = torch.einsum("hs,hod,shd->so", pattern, out, values)  # seq d_model
        after = after + read[source].sum(0)
    inside = nn.functional.gelu(block.mlp.up_proj(block.mlp_norm(after)), approximate="tanh")
    end = after + block.mlp.down_proj(inside)
    gain = (end.var(correction=0) + m.final_norm.eps).rsqrt() * m.final_norm.weight * m.lm_head.weight[target]
    is_evidence = torch.zeros(len(states), dtype=torch.bool)
    is_evidence[list(query.evidence_positions)] = True
    parts = {("evidence", s): float(gain @ r[is_evidence].sum(0)) for s, r in read.items()}
    parts |= {("others", s): float(gain @ r[~is_evidence].sum(0)) for s, r in read.items()}
    parts |= {("embed", None): float(gain @ token[row]), ("position", None): float(gain @ place[row])}
    parts["mlp", None] = float(gain @ (block.mlp.down_proj.weight @ inside))
    parts["norm", None] = float(-end.mean() * gain.sum())
    unscaled = m.lm_head.weight[target]
    parts["bias", None] = float(unscaled @ m.final_norm.bias + gain @ block.mlp.down_proj.bias)
    parts["bias", None] += 0.0 if m.lm_head.bias is None else float(m.lm_head.bias[target])
    assert end.shape == (d,), "one row"
    return parts


def attention_by_hand(model: rp.ProbedModel, normed: Tensor, ids: Tensor) -> Tensor:
    """Softmax of rotated products or of products less slope x distance. Shapes: `-> head seq seq`."""
    config, attention = model.module.config, model.module.blocks[0].attention
    heads, dim, length = config.n_heads, config.d_model // config.n_heads, ids.shape[1]
    query, key = (p(normed).unflatten(-1, (heads, dim)).transpose(0, 1) for p in (attention.q_proj, attention.k_proj))
    scores = torch.zeros(heads, length, length, dtype=normed.dtype)
    for i in range(length):
        for j in range(length):
            turned = key[:, j]
            if config.position_encoding == "rope":
                theta = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) * (j - i)
                first, second = key[:, j].chunk(2, dim=-1)
                turned = torch.cat(
                    [first * theta.cos() - second * theta.sin(), first * theta.sin() + second * theta.cos()], dim=-1
                )
            scores[:, i, j] = (query[:, i] * turned).sum(-1) / math.sqrt(dim)
            if config.position_encoding == "alibi":
                scores[:, i, j] -= torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)]) * abs(i - j)
            if config.position_encoding == "scalar":
                scores[:, i, j] += model.module.embed_offsets.weight[j - i + config.max_length - 1]
    return scores.softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_every_part_of_a_one_layer_model_equals_the_hand_computed_one(encoding: str, heads: int) -> None:
    """Token, position, norm and bias inside the head; embedding, position, MLP, centring and biases beside it."""
    model = radd(encoding, n_heads=heads, head_bias=heads == 2)
    pairs = pairs_for(model, length=4, alphabet=4)
    reading = probe_stored_evidence(model, pairs, control=False)
    # RoPE's angles are float32 in the model and float64 by hand.
    tolerance = 1e-6 if encoding == "rope" else 1e-11
    for pair in range(0, len(pairs), 13):
        for side in ("forward", "reverse"):
            expected = by_hand(model, getattr(pairs[pair], side))
            total = model.module(shown(model, getattr(pairs[pair], side))).logits[0]
            (position,), (target,) = getattr(pairs[pair], side).target_positions, getattr(pairs[pair], side).target
            assert sum(expected.values()) == pytest.approx(float(total[position, target]), abs=tolerance)
            for (part, source), value in expected.items():
                if "position" in (part, source) and encoding != "absolute":
                    assert value == 0
                    continue
                found = one(reading, pair, part=part, source=source)[f"contribution_{side}"]
                assert found == pytest.approx(value, abs=tolerance), (part, source, side)
    assert sum_error(reading) < 1e-10


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_parts_add_up_to_the_logit_in_float32_too(encoding: str) -> None:
    reading = probe_stored_evidence(radd(encoding, dtype=torch.float32), pairs_for(radd(encoding)), control=False)
    assert sum_error(reading) < 1e-5
    assert 0 < reading.meta["worst_gap"] < 1e-5, "the gap that was measured is reported"


# ---- identities of the theory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["rope", "absolute"])
def test_the_gradient_by_s_is_prop_4_1_and_its_product_thm_4_6(encoding: str) -> None:
    """S is moved by a leaf of autograd in the model's own logits; route and probability are the probes' readings."""
    model = radd(encoding)
    pairs = pairs_for(model, length=4, alphabet=4)
    route = evidence_by_pair(probe_stored_evidence(model, pairs, control=False))
    probability = rp.probe_reverse_probability(model, pairs, control=False).frame
    for pair in range(0, len(pairs), 3):
        gradients, errors, masses = [], [], []
        for side in ("forward", "reverse"):
            query = getattr(pairs[pair], side)
            (row,), (target,), (evidence,) = query.target_positions, query.target, query.evidence
            moved = torch.zeros(56, 56, dtype=torch.float64, requires_grad=True)
            ids = shown(model, query)
            with torch.no_grad():
                logits = model.module(ids).logits[0, row]
            weights = pattern_of(model, query)
            loss = -(logits + moved[:, ids[0]] @ weights).log_softmax(-1)[target]
            gradient = torch.autograd.grad(loss, moved)[0]
            mass = route.loc[pair, f"weight_{side}"]
            chosen = probability[(probability["pair"] == pair) & (probability["direction"] == side)]
            p_target = float(chosen["probability"].iloc[0])
            assert float(gradient[target, evidence]) == pytest.approx(-mass * (1 - p_target), abs=1e-6)
            error = logits.softmax(-1)
            others = [w for w in range(56) if w != target]
            assert torch.allclose(gradient[others, evidence], mass * error[others], atol=1e-6)
            assert float(gradient[target, evidence]) < 0, "a forward step raises S[v, u]"
            error[target] -= 1
            gradients.append(gradient[:, evidence])
            errors.append(error)
            masses.append(mass)
        product = float(gradients[0] @ gradients[1])
        assert product == pytest.approx(masses[0] * masses[1] * float(errors[0] @ errors[1]), abs=1e-6)
        own = [1 + float(error[target]) for error in errors]
        spread = sum(float(errors[0][w] * errors[1][w]) for w in others)
        assert product == pytest.approx(masses[0] * masses[1] * ((1 - own[0]) * (1 - own[1]) + spread), abs=1e-6)
        assert product > 0, "Thm 4.6"


def pattern_of(model: rp.ProbedModel, query: rp.Query) -> Tensor:
    """The attention row of the readout, by the reference above."""
    m, ids = model.module, shown(model, query)
    with torch.no_grad():
        states = m._embed(ids, torch.arange(ids.shape[1])[None])[0]
        return attention_by_hand(model, m.blocks[0].attention_norm(states), ids)[0, query.target_positions[0]]


# ---- any depth -------------------------------------------------------------------------------------------------------

DEEP = {
    "radd-rope": lambda: radd("rope", dtype=torch.float32, n_layers=2, n_heads=2),
    "radd-alibi": lambda: radd("alibi", dtype=torch.float32, n_layers=2, n_heads=2),
    "radd-absolute": lambda: radd("absolute", dtype=torch.float32, n_layers=2, n_heads=2),
    "radd-none": lambda: radd("none", dtype=torch.float32, n_layers=2, n_heads=2),
    "llada": lambda: wrapped(LLaDAForMaskedDiffusion(LLaDAConfig(**LLADA)), "masked", 0),
    "dream": lambda: wrapped(DreamForMaskedDiffusion(DreamConfig(**DREAM)), "masked", 1),
    "gpt2": lambda: wrapped(rp.one_layer_gpt2(n_layers=2, n_heads=4), "causal", 1),
    "llama": lambda: causal(transformers.LlamaConfig(**GROUPED)),
    "qwen2": lambda: causal(transformers.Qwen2Config(**GROUPED)),
    "neox": lambda: causal(transformers.GPTNeoXConfig(**SIZES)),  # attention and MLP side by side
    "olmo2": lambda: causal(transformers.Olmo2Config(**GROUPED)),  # norms behind attention and MLP
    "gemma3": lambda: causal(transformers.Gemma3TextConfig(**GROUPED)),
    "cohere": lambda: causal(transformers.CohereConfig(**GROUPED)),
    "opt": lambda: causal(
        transformers.OPTConfig(
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32
        )
    ),
}


def test_a_pair_whose_evidence_one_layer_hides_says_so_whichever_layer_it_is() -> None:
    """The sum over heads is undefined, and its reason stands beside it: the second layer has too short a window."""
    windows = {"sliding_window": 2, "layer_types": ["full_attention", "sliding_attention"]}
    model = causal(transformers.Gemma3TextConfig(**GROUPED | windows))
    rows = [torch.randint(3, 30, (8,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(4)]
    made = [
        rp.ReversalPair(
            rp.Query(row, [7], [2]), rp.Query([*row[:2], row[3], row[2], *row[4:]], [7], [3]), fact=str(fact)
        )
        for fact, row in enumerate(rows)
    ]
    table = evidence_by_pair(probe_stored_evidence(model, rp.ReversalPairs.from_pairs(made)))
    assert table["stored_reverse"].isna().all()
    assert (table["reason"] == "evidence hidden by the attention mask").all()


@pytest.mark.parametrize("name", DEEP)
def test_parts_add_up_to_the_mean_target_logit_of_a_plain_run(name: str) -> None:
    """Unequal lengths (padding), targets and evidence of one and of two tokens; the logit from the bare module."""
    model, pairs = DEEP[name](), text_like_pairs()
    reading = probe_stored_evidence(model, pairs)
    assert sum_error(reading) < 1e-5 * max(1, reading.frame[["logit_forward", "logit_reverse"]].abs().max().max())
    for pair in range(len(pairs)):
        for side in ("forward", "reverse"):
            query = getattr(pairs[pair], side)
            with torch.no_grad():
                logits = model.module(shown(model, query)).logits[0]
            rows = [position - model.logit_shift for position in query.target_positions]
            plain = float(np.mean([float(logits[row, token]) for row, token in zip(rows, query.target, strict=True)]))
            found = reading.frame[reading.frame["pair"] == pair][f"logit_{side}"].iloc[0]
            assert found == pytest.approx(plain, abs=2e-4), (pair, side)
    assert set(reading.frame["layer"].dropna()) == {0, 1}
    assert reading.meta["worst_gap"] < 64 * torch.finfo(torch.float32).eps


def test_half_precision_is_held_to_its_own_rounding_and_says_by_how_much_it_misses() -> None:
    model = DEEP["llama"]()
    model.module.bfloat16()
    reading = probe_stored_evidence(model, text_like_pairs(), control=False)
    assert reading.meta["dtype"] == "bfloat16"
    assert 1e-5 < reading.meta["worst_gap"] < 0.02


def test_rounding_that_is_too_coarse_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The architecture is no other than in float32, where it is read."""
    coarse, fine = DEEP["llama"](), DEEP["llama"]()
    coarse.module.bfloat16()
    monkeypatch.setattr(decomposition, "_MOST", 1e-5)
    with pytest.raises(rp.RevprobeError, match=r"the parts add up to .*rounded to 0\.008 alone .*in float32") as told:
        probe_stored_evidence(coarse, text_like_pairs(), control=False)
    assert "architecture" not in str(told.value)
    assert np.isfinite(probe_stored_evidence(fine, text_like_pairs(), control=False).value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llada", "dream"])
def test_heads_equal_what_the_output_projection_wrote(name: str) -> None:
    """Another route to the same numbers: the input of o_proj, its columns, the norm's scale from its own input; and
    the evidence's part from eager attention and the value projection.
    """
    model, pairs = DEEP[name](), text_like_pairs()
    reading = probe_stored_evidence(model, pairs, control=False)
    decoder, heads = model.module.model, 4
    for pair in (0, 1, 4):
        query = pairs[pair].reverse
        seen = run_with_inputs(
            model, query, [f"layers.{n}.self_attn.{p}" for n in (0, 1) for p in ("o_proj", "v_proj")]
        )
        rows = [position - model.logit_shift for position in query.target_positions]
        scale = (seen["norm"].pow(2).mean(-1, keepdim=True) + decoder.norm.variance_epsilon).rsqrt()
        for layer in (0, 1):
            attention = decoder.layers[layer].self_attn
            columns = attention.o_proj.weight.unflatten(1, (heads, -1))
            written = seen[f"layers.{layer}.self_attn.o_proj"].unflatten(-1, (heads, -1))
            value = attention.v_proj(seen[f"layers.{layer}.self_attn.v_proj"]).unflatten(-1, (2, -1))
            pattern = seen["attentions"][layer][0]
            for head in range(heads):
                whole, part = 0.0, 0.0
                for row, token in zip(rows, query.target, strict=True):
                    gain = scale[row] * decoder.norm.weight * model.module.lm_head.weight[token]
                    out = gain @ columns[:, head]
                    whole += float(out @ written[row, head]) / len(rows)
                    for position in query.evidence_positions:
                        read = pattern[head, row, position] * value[position, head // 2]
                        part += float(out @ read) / len(rows)
                frame = {"layer": layer, "head": head}
                found = one(reading, pair, part="evidence", **frame)["contribution_reverse"]
                assert found == pytest.approx(part, abs=2e-5)
                found += one(reading, pair, part="others", **frame)["contribution_reverse"]
                assert found == pytest.approx(whole, abs=2e-5)


def run_with_inputs(model: rp.ProbedModel, query: rp.Query, names: list[str]) -> dict:
    """Inputs of the named modules and of the final norm, and the eager attention weights, of one query alone."""
    seen: dict = {}
    decoder = model.module.model
    keep = lambda name: lambda _, args: seen.__setitem__(name, args[0][0])  # noqa: E731
    handles = [decoder.get_submodule(name).register_forward_pre_hook(keep(name)) for name in [*names, "norm"]]
    model.module.set_attn_implementation("eager")
    output = model.module(shown(model, query), output_attentions=True)
    model.module.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    return seen | {"attentions": output.attentions}


@torch.no_grad()
def test_s_of_a_deep_model_is_the_ov_circuit_on_the_embedding() -> None:
    """gain W_O^h W_V^h (gamma * E[u] / rms), with both scales as measured: by hand on Llama, grouped heads included."""
    model, pairs = DEEP["llama"](), text_like_pairs()
    reading = probe_stored_evidence(model, pairs, control=False)
    decoder = model.module.model
    query = pairs[0].reverse
    (row,), (target,), (position,) = [query.target_positions[0] - 1], query.target, query.evidence_positions
    names = [f"layers.{n}.input_layernorm" for n in (0, 1)]
    seen = run_with_inputs(model, query, names)
    final = (seen["norm"][row].pow(2).mean() + decoder.norm.variance_epsilon).rsqrt()
    gain = final * decoder.norm.weight * model.module.lm_head.weight[target]
    for layer in (0, 1):
        norm, attention = decoder.layers[layer].input_layernorm, decoder.layers[layer].self_attn
        scale = (seen[names[layer]][position].pow(2).mean() + norm.variance_epsilon).rsqrt()
        value = attention.v_proj(norm.weight * scale * decoder.embed_tokens.weight[query.evidence[0]])
        for head in range(4):
            circuit = gain @ attention.o_proj.weight[:, 8 * head : 8 * head + 8]
            expected = float(circuit @ value[8 * (head // 2) : 8 * (head // 2) + 8])
            found = one(reading, 0, part="evidence", source="token", layer=layer, head=head)["stored_reverse"]
            assert found == pytest.approx(expected, abs=2e-5)


def test_attention_written_by_hand_gives_the_same_parts_as_sdpa() -> None:
    """Eager Llama has no SDPA call: its pattern is told by rows that sum to one."""
    config = transformers.LlamaConfig(**GROUPED)
    readings = [
        probe_stored_evidence(causal(config, attn_implementation=kernel), text_like_pairs(), control=False)
        for kernel in ("sdpa", "eager")
    ]
    columns = ["weight_reverse", "stored_reverse", "contribution_forward", "contribution_reverse"]
    first, second = (r.frame[columns].to_numpy(dtype=float) for r in readings)
    assert np.isfinite(first).any(0).all()
    assert np.nanmax(np.abs(first - second)) < 1e-4
    assert (np.isnan(first) == np.isnan(second)).all()


def test_summed_scores_of_all_targets_equal_target_by_target() -> None:
    """Margin and matrix come from one push forward over the vocabulary, S[v, u] from a backward pass per target."""
    for name in ("radd-absolute", "qwen2"):
        model = DEEP[name]()
        batch = make_batch(model, prepare_queries(model, text_like_pairs().queries))
        held = LinearizedBatch.run(model, batch)
        pushed = held.stored_logits().gather(-1, batch.targets[..., None])[..., 0]
        pushed = pushed.masked_fill(~batch.is_target, 0.0).sum(1) / batch.is_target.sum(1)
        found = held.decompose(batch.targets)
        token = [n for n, piece in enumerate(found.pieces) if (piece.part, piece.source) == ("evidence", "token")]
        assert torch.allclose(found.stored[:, token].sum(1), pushed.double(), atol=1e-5)


# ---- refusals and what is undefined --------------------------------------------------------------------------------


def test_swapped_pairs_are_refused() -> None:
    model = DEEP["gpt2"]()
    with pytest.raises(rp.RevprobeError, match="pairs of kind 'swapped' do not share an entry of S"):
        probe_stored_evidence(model, pairs_for(model))


@pytest.mark.parametrize(
    ("build", "instead"),
    [
        (lambda: DEEP["gpt2"](), ("token_contributions", "probe_route_edit")),
        (lambda: bert(), ("probe_stored_evidence", "probe_route_edit", "probe_logit_lens", "probe_causal_trace")),
    ],
    ids=["causal", "nonlinear head"],
)
def test_what_a_refusal_advises_works_on_the_very_model(build, instead: tuple[str, ...]) -> None:
    """Advice that cannot be followed is worse than none."""
    model = build()
    pairs = pairs_for(model)
    with pytest.raises(rp.RevprobeError) as refused:
        probe_stored_evidence(model, pairs)
    for name in instead:
        assert f"`{name}" in str(refused.value)
        more = {"first_order": True} if name == "probe_stored_evidence" else {}
        found = getattr(rp, name)(model, pairs[0] if name == "token_contributions" else pairs, **more)
        values = found["contribution"] if isinstance(found, pd.DataFrame) else pd.Series([found.value])
        assert np.isfinite(values).all() and values.abs().gt(0).any(), name


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: causal(transformers.Gemma2Config(**GROUPED)), r"only through something nonlinear \(tanh, in"),
        (lambda: bert(), r"only through something nonlinear \(gelu, in 'cls.predictions"),
        (lambda: causal(bloom()), "the parts add up to .*, the logit is .*cannot be decomposed"),
        (lambda: radd_with(nn.MultiheadAttention), "no attention was seen"),
        (lambda: radd_with(BySum), "weights of mix do not meet their values in a product of two matrices"),
        (lambda: radd_with(HalfBySum), "weights of mix.second do not meet their values"),
    ],
)
def test_a_model_whose_logit_is_no_such_sum_is_refused_by_name(build, words: str) -> None:
    """Soft caps, a nonlinear head, an autograd function of its own (Bloom's GELU), attention unseen or by a sum."""
    with pytest.raises(rp.RevprobeError, match=words):
        probe_stored_evidence(build(), text_like_pairs())


def bert() -> rp.ProbedModel:
    module = transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(**SIZES))
    return wrapped(module, "masked", 0)


def bloom() -> transformers.BloomConfig:
    return transformers.BloomConfig(vocab_size=56, hidden_size=32, n_layer=2, n_head=4, bos_token_id=54)


class Unseen(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(56, 16), nn.Linear(16, 56)
        self.mix = kind(16, 2, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.embed(input_ids)
        return self.unembed(states + self.mix(states, states, states)[0])


class BySum(nn.Module):
    """Attention that sums over a product instead of multiplying matrices."""

    def __init__(self, width: int, heads: int, *, batch_first: bool, by_hand: bool = True) -> None:
        super().__init__()
        self.heads, self.by_hand = heads, by_hand
        self.out = nn.Linear(width, width)

    def forward(self, *states: Tensor) -> tuple[Tensor]:
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in states)
        weights = (q @ k.mT).softmax(-1)
        mixed = torch.einsum("bhij,bhjd->bhid", weights, v) if self.by_hand else weights @ v
        return (self.out(mixed.transpose(1, 2).flatten(2)),)


class HalfBySum(nn.Module):
    """Two layers of attention, of which the second alone cannot be held."""

    def __init__(self, width: int, heads: int, *, batch_first: bool) -> None:
        super().__init__()
        self.first = BySum(width, heads, batch_first=True, by_hand=False)
        self.second = BySum(width, heads, batch_first=True)

    def forward(self, states: Tensor, *_: Tensor) -> tuple[Tensor]:
        states = states + self.first(states, states, states)[0]
        return self.second(states, states, states)


class Placed(Unseen):
    """Positions of one row for the whole batch, added to the tokens or beside them (`cat`); `turn` wants them one row.

    There are more of them than tokens, and nothing names the tokens' table. `one hot` looks tokens up in none.
    """

    def __init__(self, how: str) -> None:
        super().__init__(partial(BySum, by_hand=False))
        self.how, self.places = how, nn.Embedding(64, 8 if how == "cat" else 16)
        self.narrow = nn.Linear(24, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hot = nn.functional.one_hot(input_ids, 56).float()
        states = hot @ self.embed.weight if self.how == "one hot" else self.embed(input_ids)
        places = self.places(torch.arange(input_ids.shape[1]))
        if self.how == "turn":
            assert places.dim() == 2, "one row for the whole batch"
            states = states * (1 + places)
        elif self.how == "cat":
            states = self.narrow(torch.cat([states, places.expand(len(states), -1, -1)], dim=-1))
        else:
            states = states + places
        return self.unembed(states + self.mix(states, states, states)[0])


@pytest.mark.parametrize("how", ["add", "cat", "turn"])
def test_tokens_and_positions_are_told_apart_however_they_meet(how: str) -> None:
    """The longest table is that of positions: taken for the tokens', nothing would be stored for any token."""
    model = placed(how)
    pairs = pairs_for(model, length=5)
    whole, single = (probe_stored_evidence(model, pairs, control=False, batch_size=size) for size in (None, 1))
    assert sum_error(whole) < 1e-5
    columns = [f"contribution_{side}" for side in ("forward", "reverse")]
    assert np.allclose(whole.frame[columns], single.frame[columns], atol=1e-5)
    of_tokens = whole.frame[whole.frame["source"].eq("token") & whole.frame["part"].eq("evidence")]
    assert of_tokens["stored_forward"].nunique() > 5, "one for each fact and head"
    # By hand: what the evidence's embedding alone sends through each head's value and output to the target's logit.
    module, query = model.module, pairs[0].forward
    sent = module.embed.weight[list(query.evidence)].detach()
    if how == "cat":
        sent = sent @ module.narrow.weight[:, :16].T
    elif how == "turn":
        sent = sent * (1 + module.places.weight[list(query.evidence_positions)])
    (target,) = query.target
    along = module.unembed.weight[target] @ module.mix.out.weight
    by_head = (sent * along).unflatten(-1, (2, 8)).sum(-1).mean(0)
    found = of_tokens[of_tokens["pair"] == 0].set_index("head")["stored_forward"]
    assert np.allclose(found.to_numpy(float), by_head.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("offset", [0, 2])
def test_a_batch_of_one_is_read_as_the_same_query_in_a_batch(offset: int) -> None:
    """Tokens that count up are what positions are looked up with too: OPT's begin at 2."""
    kind = transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32) if offset else None
    gpt2 = transformers.GPT2Config(vocab_size=56, n_embd=16, n_layer=1, n_head=2, bos_token_id=54)
    model = causal(kind or gpt2)
    forward = rp.Query([*range(offset, offset + 8)], [7], [3])
    backward = [token + offset for token in (9, 8, 3, 6, 5, 4, 2, 7)]
    pair = rp.ReversalPair(forward, rp.Query(backward, [7], [2]), fact="a")
    found = [
        probe_stored_evidence(model, rp.ReversalPairs.from_pairs([pair]), control=False, batch_size=size).frame
        for size in (2, 1)
    ]
    assert list(found[0]["part"]) == list(found[1]["part"]) and "position" in set(found[0]["part"])
    assert np.allclose(found[0]["contribution_forward"], found[1]["contribution_forward"], atol=1e-5)


def test_a_wrapper_that_leaves_the_cache_on_is_read_as_the_model_itself() -> None:
    """A cache begins by joining an empty tensor with the keys; peft's models take what they pass on as **kwargs."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: object) -> object:
            return self.inner(input_ids, attention_mask=attention_mask, **more)

    model = causal(transformers.LlamaConfig(**GROUPED))
    wrapped_once = rp.ProbedModel(Wrapper(model.module).eval(), objective="causal", logit_shift=1)
    pairs = text_like_pairs()
    plain, cached = (probe_stored_evidence(one, pairs, control=False).frame for one in (model, wrapped_once))
    assert np.allclose(plain["contribution_forward"], cached["contribution_forward"], atol=1e-5)


def test_tokens_that_no_table_shows_are_refused_where_what_they_store_is_asked() -> None:
    """One-hot vectors times a matrix: the three probes read such a model as it is."""
    model = placed("one hot")
    pairs = pairs_for(model, length=5)
    assert np.isfinite(rp.probe_gradient_cosine(model, pairs).value)
    with pytest.raises(rp.RevprobeError, match="Placed looks its tokens up in no table"):
        probe_stored_evidence(model, pairs)


def placed(how: str) -> rp.ProbedModel:
    module = drawn(lambda: Placed(how), scale=0.2)
    return rp.ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)


def radd_with(kind: type[nn.Module]) -> rp.ProbedModel:
    return rp.ProbedModel(drawn(lambda: Unseen(kind), scale=0.2), objective="masked", mask_token_id=53, logit_shift=0)


def test_a_nonlinear_function_taken_for_linear_is_caught_by_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: nothing rests on the list of linear functions being right."""
    monkeypatch.setattr(linearized, "_LINEAR", linearized._LINEAR | {"gelu"})
    with pytest.raises(rp.RevprobeError, match="the parts add up to"):
        probe_stored_evidence(radd(), pairs_for(radd()))


def test_a_linear_function_missing_from_the_list_costs_detail_and_no_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other fault: without `add` known, heads reach the logit through something unknown, and that is said."""
    monkeypatch.setattr(linearized, "_RULES", {k: v for k, v in linearized._RULES.items() if k != "add"})
    with pytest.raises(rp.RevprobeError, match=r"only through something nonlinear \(add, in"):
        probe_stored_evidence(radd(), pairs_for(radd()))


def test_experts_that_mix_the_batch_are_refused_and_one_query_at_a_time_is_exact() -> None:
    model = causal(transformers.MixtralConfig(**GROUPED))
    with pytest.raises(rp.RevprobeError, match="try batch_size=1"):
        probe_stored_evidence(model, text_like_pairs(), control=False)
    assert sum_error(probe_stored_evidence(model, text_like_pairs(), control=False, batch_size=1)) < 1e-4


def test_evidence_that_the_mask_hides_is_undefined_and_counted() -> None:
    """Evidence out of the window: its stored evidence cannot be read off this query; its contribution is zero."""
    model = tiny.causal(transformers.MistralConfig(**GROUPED, sliding_window=2))
    queries = [rp.Query([54, 3, 40, 7], [2], [1]), rp.Query([3, 54, 7, 9, 40], [4], [0])]
    pairs = [rp.ReversalPair(*queries, fact="a"), rp.ReversalPair(queries[0], queries[0], fact="b")]
    reading = probe_stored_evidence(model, rp.ReversalPairs.from_pairs(pairs), control=False)
    hidden = reading.frame[(reading.frame["pair"] == 0) & (reading.frame["part"] == "evidence")]
    assert hidden["stored_reverse"].isna().all()
    assert (hidden["contribution_reverse"] == 0).all()
    assert (hidden["reason"] == EVIDENCE_HIDDEN).all()
    assert reading.n == 1
    assert set(reading.undefined) == {EVIDENCE_HIDDEN, ONE_FACT}


def test_pairs_with_different_tokens_have_no_shared_entry() -> None:
    model = radd()
    queries = rp.Query([3, 0, 40], [0], [2]), rp.Query([41, 0, 4], [2], [0])
    pairs = [rp.ReversalPair(*queries, fact="a", different_tokens=True)]
    reading = probe_stored_evidence(model, pairs, control=False)
    assert math.isnan(reading.value)
    assert set(reading.undefined) == {DIFFERENT_TOKENS}
    assert sum_error(reading) < 1e-10


# ---- a reading like the others ---------------------------------------------------------------------------------------


def test_probing_leaves_no_trace_also_when_it_raises() -> None:
    for model, fails in ((DEEP["radd-rope"](), False), (bert(), True)):
        module = model.module.train()
        first = next(module.parameters())
        first.requires_grad_(False)
        first.grad = torch.ones_like(first)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        flags = [p.requires_grad for p in module.parameters()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
        random = torch.get_rng_state()
        if fails:
            with pytest.raises(rp.RevprobeError):
                probe_stored_evidence(model, text_like_pairs())
        else:
            probe_stored_evidence(model, text_like_pairs())
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
        assert flags == [p.requires_grad for p in module.parameters()]
        assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
        assert torch.equal(first.grad, torch.ones_like(first))
        assert all(p.grad is None for p in list(module.parameters())[1:])
        assert module.training
        assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("size", [1, 5])
def test_positions_shared_by_the_batch_are_told_apart_at_any_size(size: int) -> None:
    """One row of position vectors serves all examples; as many examples as positions must not confuse the two."""
    model = radd("absolute")
    pairs = pairs_for(model, length=5)
    whole, small = (probe_stored_evidence(model, pairs, control=False, batch_size=n) for n in (None, size))
    for side in ("forward", "reverse"):
        columns = [f"contribution_{side}", f"stored_{side}", f"weight_{side}", f"margin_{side}"]
        assert np.allclose(whole.frame[columns], small.frame[columns], atol=1e-12, equal_nan=True)


def test_batches_do_not_change_the_reading_and_layers_select_rows() -> None:
    model, pairs = radd(n_layers=2, n_heads=2), text_like_pairs()
    whole, small = (probe_stored_evidence(model, pairs, batch_size=size) for size in (None, 2))
    numbers = whole.frame.select_dtypes("number").columns
    assert np.allclose(
        whole.frame[numbers].astype(float), small.frame[numbers].astype(float), atol=1e-12, equal_nan=True
    )
    last = probe_stored_evidence(model, pairs, layers=[1])
    assert set(last.frame["layer"]) == {1}
    by_layer = whole.summary(by="layer").dropna(subset=["layer"]).set_index("layer")
    assert last.value == pytest.approx(by_layer.loc[1, "value"])
    assert by_layer["value"].sum() == pytest.approx(whole.value)
    with pytest.raises(rp.RevprobeError, match="no layer 2 to measure in RaddForMaskedLM: expected some of 0, 1"):
        probe_stored_evidence(model, pairs, layers=[2])
    with pytest.raises(rp.RevprobeError, match="batch_size=0"):
        probe_stored_evidence(model, pairs, batch_size=0)


def test_a_reading_is_saved_shown_and_taken_up_again(tmp_path) -> None:
    model = radd()
    reading = probe_stored_evidence(model, pairs_for(model), cross=True)
    again = rp.Reading.load(reading.save(tmp_path / "stored.parquet"))
    pd.testing.assert_frame_equal(again.frame, reading.frame)
    pd.testing.assert_frame_equal(again.cross, reading.cross, check_names=False)
    assert repr(again) == repr(reading)
    assert "Reading(stored_evidence=" in repr(reading)
    assert again.measures()["measure"].tolist() == ["stored_evidence"]
    assert len(reading.plot().data) == 2
    drawn = reading.plot(kind="matrix")
    matrix = drawn.data[0]
    assert "logits" in matrix.colorbar.title.text and "logits" in matrix.hovertemplate, "S has a unit"
    assert "(logits; mean over" in reading.plot().layout.xaxis.title.text, "a part of a logit is no share of it"
    assert f"<b>{reading.meta['model']}</b>" in drawn.layout.title.text, "which model it is of"
    assert np.allclose(np.array(matrix.z, dtype=float), reading.cross.to_numpy())
    with pytest.raises(rp.RevprobeError, match="storage plot of kind 'matrx'"):
        reading.plot(kind="matrx")
    with pytest.raises(rp.RevprobeError, match="cross=True"):
        probe_stored_evidence(model, pairs_for(model)).plot(kind="matrix")


def test_mean_contributions_add_up_to_the_mean_logit() -> None:
    reading = probe_stored_evidence(radd("absolute", n_heads=2), pairs_for(radd()), control=False)
    table = logit_contributions(reading)
    parts, logit = table[table["part"] != "logit"], table[table["part"] == "logit"].iloc[0]
    for side in ("forward", "reverse"):
        assert parts[side].sum() == pytest.approx(logit[side], abs=1e-10)
        assert logit[f"{side}_low"] < logit[side] < logit[f"{side}_high"]
