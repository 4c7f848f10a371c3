"""The logit lens against whole states put back by hand, TransformerLens and plain products; effects planted."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
import tiny
from revprobe.errors import RevprobeError
from revprobe.hooks.state_survey import MORE
from revprobe.hooks.states import EMBEDDED
from revprobe.models.structure import states_of
from revprobe.probes.deep.logit_lens import NO_EMBEDDING, NO_SUM, OWN_TOKENS
from revprobe.probes.passes.batches import make_batch, prepare_queries
from revprobe.probes.passes.decomposition import LinearizedBatch
from revprobe.probes.passes.likelihood import target_partners
from revprobe.probes.statistics.estimators import LATER_BLOCK, NO_LIKE_TARGET, NO_PARTNER
from tiny import FIXTURES, GROUPED, SIZES, bridged, causal, drawn, in_blocks, language_model, pairs_at, text_like_pairs

# Weights far from their initial values, so that layers disagree.
radd = partial(tiny.radd, n_layers=2, n_heads=2, scale=0.3)
gpt2, llama = (partial(make, scale=0.3) for make in (tiny.gpt2, tiny.llama))


def bert() -> rp.ProbedModel:
    module = drawn(lambda: language_model(transformers.BertConfig(**SIZES), "masked"), scale=0.3)
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked")


MODELS: dict[str, Callable[[], rp.ProbedModel]] = {
    "RADD": radd,
    "BERT": bert,
    "GPT-2": gpt2,
    "Llama": llama,
    "Gemma 2": lambda: causal(transformers.Gemma2Config(**GROUPED), scale=0.3),
    "SDAR": in_blocks,
    "LLaDA": lambda: rp.load_model(FIXTURES / "llada-tiny"),
    "Dream": lambda: rp.load_model(FIXTURES / "dream-tiny"),
}


def by_hand(model: rp.ProbedModel, query: rp.Query, other: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """One query run alone; each layer's whole state put back behind the last block, nothing packed."""
    sites = states_of(model).of("residual")
    batch = make_batch(model, prepare_queries(model, [query]))
    last = model.module.get_submodule(sites[max(sites)].path)
    kept: dict[int, Tensor] = {}
    handles = []
    for layer, site in sites.items():
        child = model.module.get_submodule(site.path)

        def see(_: nn.Module, args: Any, kwargs: Any, output: Any = None, layer: int = layer) -> None:
            kept[layer] = (args or (kwargs.get("hidden_states"),))[0] if output is None else first_of(output)

        if site.before:
            handles.append(child.register_forward_pre_hook(see, with_kwargs=True))
        else:
            handles.append(child.register_forward_hook(see, with_kwargs=True))
    with torch.no_grad():
        model.logits(batch.input_ids)
        for handle in handles:
            handle.remove()
        found = {}
        for layer, state in kept.items():
            put = last.register_forward_hook(lambda _, __, output, state=state: swapped(output, state))
            logits = model.logits(batch.input_ids)[0, batch.rows[0]].double()
            put.remove()
            logs = logits.log_softmax(-1)
            own = logs[range(len(query.target)), list(query.target)]
            found[layer] = {
                "log_probability": float(own.sum()),
                "rank": int((logs >= own[:, None]).sum(-1).max()),
                "entropy": float(-(logs.exp() * logs.clamp(min=-1e9)).sum(-1).mean()),
                "logit": float(logits[range(len(query.target)), list(query.target)].mean()),
                "log_probability_control": float(logs[range(len(other)), list(other)].sum()) if other else np.nan,
            }
    return found


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def swapped(output: Any, state: Tensor) -> Any:
    return (state, *output[1:]) if isinstance(output, tuple) else state


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_equals_its_whole_state_put_back_by_hand(name: str) -> None:
    """Padded batches, targets of one and two tokens; a wrong row, layer, norm or head would show."""
    model = MODELS[name]()
    pairs = text_like_pairs() if name != "SDAR" else pairs_at((5, 4), (4, 5), count=4, length=9, ragged=True)
    reading = rp.probe_logit_lens(model, pairs)
    partners = {side: shuffled_onto(model, pairs, reading, side) for side in ("forward", "reverse")}
    frame = reading.frame.set_index(["pair", "direction", "layer"])
    for place, pair in enumerate(pairs):
        for direction in ("forward", "reverse"):
            query = getattr(pair, direction)
            other = partners[direction][place]
            hand = by_hand(model, query, ())
            if other >= 0 and not (model.objective == "causal" and len(query.target) > 1):
                elsewhere = by_hand(model, getattr(pairs[other], direction), query.target)
                for layer in hand:
                    hand[layer]["log_probability_control"] = elsewhere[layer]["log_probability_control"]
            assert sorted(hand) == [EMBEDDED, 0, 1]
            for layer, wanted in hand.items():
                row = frame.loc[(place, direction, layer)]
                for column, value in wanted.items():
                    assert row[column] == pytest.approx(value, rel=2e-5, abs=2e-5, nan_ok=True), (column, layer)
                gain = wanted["log_probability"] - hand[EMBEDDED]["log_probability"]
                assert row["gain"] == pytest.approx(gain, abs=5e-5)
    assert reading.meta["worst_gap"] <= 1e-5


def shuffled_onto(model: rp.ProbedModel, pairs: rp.ReversalPairs, reading: rp.Reading, side: str) -> list[int]:
    """Each pair's partner: another fact of its group with another target as long."""
    found = target_partners(pairs, model.logit_shift, seed=reading.seed)[side]
    targets = [getattr(pair, side).target for pair in pairs]
    for place, other in enumerate(found):
        assert other < 0 or (pairs.facts[other] != pairs.facts[place] and len(targets[other]) == len(targets[place]))
        assert other < 0 or targets[other] != targets[place]
    return found.tolist()


def test_a_fact_whose_other_direction_cannot_be_shuffled_has_a_control_in_the_one_that_can() -> None:
    """Two facts asked in exchanged roles: forward targets of one and of two tokens, reverse ones of one."""
    pairs = []
    for fact, (target, evidence) in enumerate([([7], 3), ([8, 9], 4)]):
        forward = rp.Query([evidence, 20, 21, *target], range(3, 3 + len(target)), [0])
        reverse = rp.Query([*target, *[22, 23][len(target) - 1 :], evidence], [3], range(len(target)))
        pairs.append(rp.ReversalPair(forward, reverse, kind="swapped", fact=str(fact)))
    reading = rp.probe_logit_lens(radd(), rp.ReversalPairs.from_pairs(pairs))
    reasons = reading.frame.groupby("direction")["reason_control"].unique().map(list).to_dict()
    assert reasons == {"forward": [NO_LIKE_TARGET], "reverse": [""]} and reading.control is not None


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_is_what_the_probability_probe_reads(name: str) -> None:
    model = MODELS[name]()
    pairs = text_like_pairs() if name != "SDAR" else pairs_at((5, 4), (4, 5), count=4, length=9)
    mode = "chain" if model.objective == "causal" else "parallel"
    plain = rp.probe_reverse_probability(model, pairs, mode=mode).frame
    lens = rp.probe_logit_lens(model, pairs).frame
    last = lens[lens["layer"] == 1].set_index(["pair", "direction"])
    for row in plain.to_dict("records"):
        ours = last.loc[(row["pair"], row["direction"])]
        assert ours["log_probability"] == pytest.approx(row["log_probability"], rel=1e-5, abs=1e-5)
        assert ours["rank"] == row["rank"]


@pytest.mark.parametrize("made", [gpt2, llama], ids=["GPT-2", "Llama"])
def test_transformer_lens_reads_the_same_from_the_accumulated_stream(made: Callable[[], rp.ProbedModel]) -> None:
    """`accumulated_resid` through the bridge's own final norm and unembedding, layer by layer."""
    model, pairs = made(), pairs_at((1, 7), (3, 7), count=5, length=8)
    ids = torch.tensor([pair.reverse.token_ids for pair in pairs])
    bridge = model.to_bridge()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        streams = [cache["blocks.0.hook_resid_pre"], *(cache[f"blocks.{n}.hook_resid_post"] for n in (0, 1))]
        theirs = torch.stack([bridge.unembed(bridge.ln_final(state)) for state in streams])[:, :, 6].log_softmax(-1)
    frame = rp.probe_logit_lens(model, pairs).frame
    ours = frame[frame["direction"] == "reverse"].pivot(index="pair", columns="layer", values="log_probability")
    wanted = theirs[:, range(5), ids[:, 7]].T.double().numpy()
    np.testing.assert_allclose(ours.to_numpy(float), wanted, atol=1e-5)
    through = rp.probe_logit_lens(bridged(model), pairs).frame
    np.testing.assert_allclose(through["log_probability"], frame["log_probability"], atol=2e-5)


# --- what heads and MLPs add ----------------------------------------------------------------------------------------


def test_contributions_are_the_products_written_out_and_add_up() -> None:
    """Llama has neither biases nor centring: embedding, heads and MLPs are all there is of a logit."""
    model, pairs = llama(), pairs_at((1, 7), (3, 7), count=4, length=8)
    frame = rp.probe_logit_lens(model, pairs, contributions=True).frame
    module, seen = model.module, {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=n: seen.update({("head", n): args[0]}))
        for n, layer in enumerate(module.model.layers)
    ]
    hooks += [
        layer.mlp.register_forward_hook(lambda _, __, out, n=n: seen.update({("mlp", n): out}))
        for n, layer in enumerate(module.model.layers)
    ]
    hooks.append(module.model.norm.register_forward_pre_hook(lambda _, args: seen.update({"last": args[0]})))
    with torch.no_grad():
        for place, pair in enumerate(pairs):
            ids = torch.tensor([pair.reverse.token_ids])
            module(ids)
            scale = (seen["last"][0, 6].double().square().mean() + module.config.rms_norm_eps).rsqrt()
            direction = module.lm_head.weight[ids[0, 7]].double() * module.model.norm.weight.double() * scale
            rows = frame[(frame["pair"] == place) & (frame["direction"] == "reverse")]
            total = float(direction @ module.model.embed_tokens.weight[ids[0, 6]].double())
            for n, layer in enumerate(module.model.layers):
                heads = seen["head", n][0, 6].unflatten(0, (4, 8)).double()
                written = torch.einsum("dhk,hk->hd", layer.self_attn.o_proj.weight.double().unflatten(1, (4, 8)), heads)
                wanted = (written @ direction).tolist()
                part = rows[(rows["layer"] == n) & (rows["site"] == "head")].sort_values("head")
                np.testing.assert_allclose(part["logit"].to_numpy(float), wanted, atol=1e-5)
                mlp = rows[(rows["layer"] == n) & (rows["site"] == "mlp")]["logit"].item()
                assert mlp == pytest.approx(float(seen["mlp", n][0, 6].double() @ direction), abs=1e-5)
                total += sum(wanted) + mlp
            last = rows[(rows["site"] == "residual") & (rows["layer"] == 1)]["logit"].item()
            assert total == pytest.approx(last, abs=1e-4)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["RADD", "GPT-2", "Llama", "LLaDA", "Dream"])
@torch.no_grad()
def test_a_head_adds_what_storage_says_of_its_pieces(name: str) -> None:
    """By source and position (evidence, others) it is taken apart further; the sum is the same."""
    model, pairs = MODELS[name](), text_like_pairs()
    frame = rp.probe_logit_lens(model, pairs, contributions=True).frame
    queries = prepare_queries(model, pairs.queries)
    batch = make_batch(model, queries)
    found = LinearizedBatch.run(model, batch).decompose(batch.targets)
    heads = frame[frame["site"] == "head"].set_index(["direction", "pair", "layer", "head"])["logit"]
    for direction, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
        for layer, head in {(p.layer, p.head) for p in found.pieces if p.head is not None}:
            kept = [place for place, p in enumerate(found.pieces) if (p.layer, p.head) == (layer, head)]
            wanted = found.contribution[:, kept].sum(1).numpy()[index]
            ours = [heads.loc[(direction, pair, layer, head)] for pair in range(len(pairs))]
            np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_experts_that_sort_a_batchs_tokens_are_taken_apart_query_by_query() -> None:
    """Beside others a query's parts do not add up to its logit; alone they do, whatever batches are asked for."""
    model, pairs = causal(transformers.MixtralConfig(**GROUPED), scale=0.2), text_like_pairs()
    readings = [rp.probe_logit_lens(model, pairs, contributions=True, batch_size=size) for size in (None, 3, 1)]
    columns = ["site", "layer", "head", "logit", "logit_control", "reason", "reason_control"]
    parts = [one.frame[one.frame["site"] != "residual"][columns].reset_index(drop=True) for one in readings]
    assert parts[0]["logit"].notna().all() and set(parts[0]["reason"]) == {""}
    for reading, part in zip(readings, parts, strict=True):
        pd.testing.assert_frame_equal(part, parts[-1], atol=1e-5, rtol=1e-5)
        assert "no_contributions" not in reading.meta


@pytest.mark.parametrize("name", ["Gemma 2", "BERT"])
def test_a_logit_that_is_no_sum_has_no_contributions_and_says_what_it_is(name: str) -> None:
    reading = rp.probe_logit_lens(MODELS[name](), text_like_pairs(), contributions=True)
    parts = reading.frame[reading.frame["site"] != "residual"]
    assert set(parts["reason"]) == {NO_SUM} and parts["logit"].isna().all() and len(parts)
    assert "nonlinear" in reading.meta["no_contributions"] and np.isfinite(reading.value)
    figure = reading.plot(kind="heads")
    assert NO_SUM in figure.layout.annotations[0].text


# --- planted --------------------------------------------------------------------------------------------------------


class Wired(nn.Module):
    """One-hot states; the second block's only head writes token u + 26 wherever it reads a token u below 26.

    Attention is uniform, so the fact is carried whatever stands where. The first block copies its input.
    """

    class Block(nn.Module):
        def __init__(self, carries: bool) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(56, 56, bias=False) for _ in range(4))
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
                nn.init.zeros_(projection.weight)
            # Not quite nothing, for what attends is found by the scores that change.
            self.q_proj.weight.data.fill_diagonal_(1e-3)
            self.k_proj.weight.data.fill_diagonal_(1e-3)
            self.v_proj.weight.data.fill_diagonal_(1.0)
            if carries:
                self.o_proj.weight.data[range(26, 52), range(26)] = 100.0

        def forward(self, states: Tensor) -> Tensor:
            q, k, v = (one(states)[:, None] for one in (self.q_proj, self.k_proj, self.v_proj))
            return states + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(56, 56)
        self.embed.weight.data = torch.eye(56)
        self.layers = nn.ModuleList([self.Block(False), self.Block(True)])
        self.unembed = nn.Linear(56, 56, bias=False)
        self.unembed.weight.data = torch.eye(56)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return self.unembed(states)


def wired_pairs(shift: int) -> rp.ReversalPairs:
    """Evidence u, target u + 26 (or that of another fact where `shift` is set), fillers that say nothing."""
    made = []
    for u in range(14):
        target = 26 + (u + shift) % 14
        forward, reverse = [52, u, 54, 54, target, 52], [52, target, 54, 54, u, 52]
        made.append(rp.ReversalPair(rp.Query(forward, [4], [1]), rp.Query(reverse, [1], [4]), fact=str(u)))
    return rp.ReversalPairs.from_pairs(made)


def wired() -> rp.ProbedModel:
    return rp.ProbedModel(Wired().eval(), objective="masked", mask_token_id=53, logit_shift=0)


def test_a_fact_that_the_second_layer_writes_is_read_there_and_not_before() -> None:
    reading = rp.probe_logit_lens(wired(), wired_pairs(0), contributions=True)
    by_layer = reading.summary(by=["site", "layer"]).set_index(["site", "layer"])
    assert reading.value > 3 and reading.excess.value > 10, reading
    residual = reading.frame[reading.frame["site"] == "residual"]
    before, after = (residual[residual["layer"] == layer] for layer in (0, 1))
    assert (before["gain"] == 0).all() and (before["rank"] > 1).all() and (after["rank"] == 1).all()
    assert by_layer.loc[("head", 1), "value"] > 10 and by_layer.loc[("head", 0), "value"] == 0
    assert by_layer.loc[("head", 1), "control"] == 0, "nobody writes the target where another fact is asked"


def test_facts_that_the_model_does_not_hold_gain_nothing() -> None:
    """The same model and tokens, each fact with another's target."""
    reading = rp.probe_logit_lens(wired(), wired_pairs(1))
    assert reading.value < -3 and (reading.frame["rank"] > 1).all()


def test_a_layer_that_is_a_copy_says_what_the_layer_before_says() -> None:
    model = llama()
    block = model.module.model.layers[1]
    for written in (block.self_attn.o_proj, block.mlp.down_proj):
        nn.init.zeros_(written.weight)
    frame = rp.probe_logit_lens(model, text_like_pairs(), contributions=True).frame
    read = frame[frame["site"] == "residual"].pivot(index=["pair", "direction"], columns="layer", values="entropy")
    np.testing.assert_allclose(read[1].to_numpy(float), read[0].to_numpy(float), rtol=1e-6)
    assert not np.allclose(read[0].to_numpy(float), read[-1].to_numpy(float), rtol=1e-3)
    assert (frame[(frame["site"] != "residual") & (frame["layer"] == 1)]["logit"] == 0).all()


# --- what is refused, and what is undefined -------------------------------------------------------------------------


class Tells(nn.Module):
    """A model whose logits are made by position, or of the state before: its tail tells tokens apart."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.config, self.how = inner, inner.config, how
        self.by_position = nn.Parameter(torch.linspace(1.0, 1.5, 64)[:, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.inner(input_ids).logits
        if self.how == "mean":
            return logits - logits.mean(1, keepdim=True)
        return logits * self.by_position[: logits.shape[1]]


@pytest.mark.parametrize("how", ["position", "mean"])
def test_a_tail_that_tells_tokens_apart_is_refused(how: str) -> None:
    model = rp.ProbedModel(Tells(bert().module, how).eval(), objective="masked", mask_token_id=53, logit_shift=0)
    for count in (1, 5):  # a single query's own row must not be where its last state happens to be read
        with pytest.raises(RevprobeError, match="does not treat every token by itself"):
            rp.probe_logit_lens(model, pairs_at((1, 5), (2, 5), count=count, length=6))


def test_a_model_whose_last_layer_has_no_state_is_refused() -> None:
    config = transformers.AlbertConfig(**SIZES, embedding_size=16)
    model = rp.ProbedModel(drawn(lambda: language_model(config, "masked")), rp.letter_tokenizer(), objective="masked")
    with pytest.raises(RevprobeError, match="the last layer has no single state that the logits are made from"):
        rp.probe_logit_lens(model, text_like_pairs())


class SecondStream(nn.Module):
    """The second block reads the embedding beside the state, so only its own output is all there is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.mix = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        aside = self.mix(self.inner.get_input_embeddings()(input_ids))
        block = self.inner.transformer.h[1]
        handle = block.register_forward_pre_hook(lambda _, args: (args[0] + aside, *args[1:]))
        try:
            return self.inner(input_ids, attention_mask=attention_mask)
        finally:
            handle.remove()


def test_layers_without_a_state_are_undefined_with_the_reason() -> None:
    torch.manual_seed(0)
    model = rp.ProbedModel(SecondStream(gpt2().module).eval(), objective="causal")
    reading = rp.probe_logit_lens(model, pairs_at((1, 7), (3, 7), count=4, length=8))
    reasons = reading.frame.groupby("layer")["reason"].unique().map(list).to_dict()
    assert reasons == {EMBEDDED: [MORE], 0: [MORE], 1: [NO_EMBEDDING]}
    last = reading.frame[reading.frame["layer"] == 1]
    assert last["log_probability"].notna().all() and last["gain"].isna().all()
    assert np.isnan(reading.value) and reading.undefined[NO_EMBEDDING] == 4


def test_evidence_in_a_later_block_and_facts_without_another_are_undefined() -> None:
    pairs = pairs_at((9, 4), (4, 9), count=5, length=12)
    reading = rp.probe_logit_lens(in_blocks(), pairs, contributions=True)
    sides = reading.frame.groupby("direction")["reason"].unique().map(list).to_dict()
    assert sides == {"forward": [LATER_BLOCK], "reverse": [""]}
    forward = reading.frame[reading.frame["direction"] == "forward"]
    assert forward[["log_probability", "gain", "logit", "logit_control"]].isna().all(axis=None)
    alone = rp.probe_logit_lens(radd(), pairs_at((1, 5), (2, 5), count=1))
    assert alone.control is None and alone.undefined[NO_PARTNER] == 1 and np.isfinite(alone.value)


def test_a_causal_model_prices_the_control_only_where_it_has_not_read_the_target() -> None:
    frame = rp.probe_logit_lens(gpt2(), text_like_pairs()).frame
    assert set(frame["reason_control"]) == {"", OWN_TOKENS}
    told = frame["reason_control"] == OWN_TOKENS
    assert frame.loc[told, "log_probability_control"].isna().all() and (frame.loc[told, "pair"] % 2 == 1).all()


def test_swapped_pairs_are_read_in_both_roles() -> None:
    model = gpt2()
    pairs = rp.letter_pairs(6, model=model)[:40]
    assert pairs.kind == "swapped"
    frame = rp.probe_logit_lens(model, pairs).frame
    last = frame[(frame["layer"] == 1) & (frame["direction"] == "forward")]["log_probability"]
    plain = rp.probe_reverse_probability(model, pairs).frame
    wanted = plain[plain["direction"] == "forward"].sort_values("pair")["log_probability"]
    np.testing.assert_allclose(last, wanted, atol=1e-5)


# --- options, files, figures ----------------------------------------------------------------------------------------


def test_options_choose_rows_and_do_not_move_numbers() -> None:
    model, pairs = radd(), text_like_pairs()
    whole = rp.probe_logit_lens(model, pairs, contributions=True)
    some = rp.probe_logit_lens(model, pairs, layers=[1], contributions=True, batch_size=3)
    kept = whole.frame[whole.frame["layer"] == 1].reset_index(drop=True)
    numbers = [c for c in kept if kept[c].dtype.kind == "f"]
    np.testing.assert_allclose(some.frame[numbers], kept[numbers], atol=1e-5)
    assert some.value == pytest.approx(whole.value, abs=1e-5)
    bare = rp.probe_logit_lens(model, pairs, control=False)
    assert bare.control is None and not [c for c in bare.frame if c.endswith("_control")]
    with pytest.raises(RevprobeError, match="no layer 7 to read"):
        rp.probe_logit_lens(model, pairs, layers=[7])
    done: list[tuple[int, int]] = []
    rp.probe_logit_lens(model, pairs, batch_size=5, progress=lambda *at: done.append(at))
    assert done == [(5, 12), (10, 12), (12, 12)]


def test_half_precision_reads_what_single_precision_reads() -> None:
    pairs = text_like_pairs()
    fine = rp.probe_logit_lens(llama(), pairs).frame["log_probability"]
    coarse = rp.probe_logit_lens(llama(dtype=torch.bfloat16), pairs)
    assert float((coarse.frame["log_probability"] - fine).abs().max()) < 0.3
    assert coarse.meta["worst_gap"] < 0.05


def test_no_trace_is_left() -> None:
    model = radd()
    model.module.train()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    flags = [p.requires_grad for p in model.module.parameters()]
    random = torch.get_rng_state()
    rp.probe_logit_lens(model, text_like_pairs(), contributions=True)
    assert model.module.training and torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert flags == [p.requires_grad for p in model.module.parameters()]
    assert all(p.grad is None for p in model.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_the_reading_survives_a_file_and_is_drawn(tmp_path: Path) -> None:
    reading = rp.probe_logit_lens(radd(), pairs_at((1, 5), (2, 5), count=14), contributions=True)
    again = rp.Reading.load(reading.save(tmp_path / "lens.parquet"))
    assert again.frame.equals(reading.frame) and repr(again) == repr(reading)
    assert list(reading.summary(by=["site", "layer"])["n"]) == [14] * 7
    for options in ({}, {"kind": "heads"}, {"kind": "heads", "direction": "forward"}, {"theme": "dark"}):
        assert reading.plot(**options).data
    lines = [trace for trace in reading.plot().data if trace.mode and trace.name == "reverse" and trace.hovertext]
    read = reading.frame[(reading.frame["site"] == "residual") & (reading.frame["direction"] == "reverse")]
    np.testing.assert_allclose(lines[0].y, read.groupby("layer")["log_probability"].mean().to_numpy(float))
    np.testing.assert_allclose(lines[1].y, (read["rank"] == 1).groupby(read["layer"]).mean().to_numpy(float))
    with pytest.raises(RevprobeError, match="logit lens plot of kind 'head'"):
        reading.plot(kind="head")
    bare = rp.probe_logit_lens(radd(), pairs_at((1, 5), (2, 5)))
    assert "contributions=True" in bare.plot(kind="heads").layout.annotations[0].text
