"""What a module is held to when it is wrapped; right values come from single rows, plain softmax and plain autograd."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe import ProbedModel, Query, ReversalPair, ReversalPairs, RevprobeError
from revprobe.models.contract.called import CalledModule
from revprobe.models.contract.contract import contract_of

SIZES = {"vocab_size": 56, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2}
MASK = 53
PRICED = ["probability", "gradient"]


def drawn(module: nn.Module, by: float = 0.15) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return module.eval()


class Words(nn.Module):
    """Tokens mixed by a sum over the sequence: each logit sees every token that the mask, if it is heeded, lets in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(56, 16), nn.Linear(16, 16), nn.Linear(16, 56)

    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return (words * mask[..., None]).sum(1, keepdim=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.embed(input_ids)
        return self.head(words + torch.tanh(self.mix(self.gather(words, mask))))


class DividesByWidth(Words):
    """What stands behind the padding is hidden; how much of it there is, is not."""

    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return super().gather(words, mask) / words.shape[1] * 6


class IgnoresMask(Words):
    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return words.mean(1, keepdim=True) * 3


class ConvolvesTokens(Words):
    """The last real token's neighbour is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.conv(words.mT).mT + super().gather(words, mask)


class TakesNoMask(Words):
    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids)


class WantsBooleans(Words):
    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        if bool((mask == 0).any()):
            raise TypeError("this mask is not of my kind")
        return super().gather(words, mask)


class BeginsWithTheEnd(Words):
    """Shows every token the last one that is no padding by its id, as encoder-decoders do that shift their input."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        last = (input_ids != 0).cumsum(1).argmax(1, keepdim=True)
        words = self.embed(input_ids) + self.embed(input_ids.gather(1, last))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head(words + torch.tanh(self.mix(self.gather(words, mask))))


UNSOUND = {
    "begins with the end": BeginsWithTheEnd,
    "divides by the width": DividesByWidth,
    "ignores the mask": IgnoresMask,
    "convolves over tokens": ConvolvesTokens,
    "takes no mask": TakesNoMask,
    "cannot take the mask": WantsBooleans,
    "ConvBERT": lambda: drawn(transformers.ConvBertForMaskedLM(transformers.ConvBertConfig(**SIZES))),
    "Funnel": lambda: drawn(
        transformers.FunnelForMaskedLM(
            transformers.FunnelConfig(vocab_size=56, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1])
        )
    ),
}


def wrapped(module: nn.Module) -> ProbedModel:
    return ProbedModel(module.eval(), objective="masked", mask_token_id=MASK, logit_shift=0)


def mixed_pairs(longest: int = 12) -> ReversalPairs:
    """Pairs of three lengths, each queried in two orders of equal length."""
    draws = np.random.default_rng(3)
    pairs = []
    for n in (longest, longest - 3, longest - 4, longest, longest - 3, longest - 4):
        ids = draws.permutation(50)[:n].tolist()
        pairs.append(ReversalPair(Query(ids, [2], [n - 2]), Query(ids[::-1], [n - 3], [1]), fact=str(len(pairs))))
    return ReversalPairs.from_pairs(pairs)


def alone(module: nn.Module, query: Query) -> Tensor:
    """The log-probability of the target by the query's own run. Shapes: `->`, float64."""
    ids = torch.tensor([query.token_ids])
    ids[0, list(query.target_positions)] = MASK
    out = module(ids)
    logits = out if isinstance(out, Tensor) else out.logits
    return logits[0, query.target_positions[0]].double().log_softmax(-1)[query.target[0]]


@pytest.mark.parametrize("name", UNSOUND)
def test_padding_that_reaches_tokens_never_shares_a_batch_with_them(name):
    module = UNSOUND[name]()
    model, pairs = wrapped(module), mixed_pairs()
    assert model.contract.equal_lengths
    readings = rp.probe(model, pairs, only=PRICED)
    assert all("equal lengths" in reading.meta["batches"] for reading in readings)
    frame = readings["reverse_probability"].frame
    for row in frame.itertuples():
        with torch.no_grad():
            right = float(alone(module, getattr(pairs[row.pair], row.direction)))
        assert row.log_probability == pytest.approx(right, rel=1e-6), name
    cosine = readings["gradient_cosine"]
    assert cosine.value == pytest.approx(autograd_cosine(module, pairs), abs=1e-5)
    assert np.isfinite(cosine.control.value)


def autograd_cosine(module: nn.Module, pairs: ReversalPairs) -> float:
    parameters, found = list(module.parameters()), []
    for pair in pairs:
        both = []
        for query in (pair.forward, pair.reverse):
            grads = torch.autograd.grad(alone(module, query), parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
            both.append(torch.cat([g.reshape(-1) for g in flat]))
        found.append(float(F.cosine_similarity(*both, dim=0)))
    return float(np.mean(found))


def test_a_pair_of_two_lengths_is_read_one_query_at_a_time():
    pairs, module = mixed_pairs(), IgnoresMask().eval()
    longer = [
        ReversalPair(p.forward, Query([*p.reverse.token_ids, 51], p.reverse.target_positions, [1]), fact=f"{p.fact}!")
        for p in pairs
    ]
    both = ReversalPairs.from_pairs([*longer[:3], *pairs])
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    readings = rp.probe(wrapped(module), both, only=PRICED)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    cosine, frame = readings["gradient_cosine"], readings["reverse_probability"].frame
    assert set(cosine.meta["one_by_one"]) == {name for name, _ in module.named_parameters()}
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    assert cosine.value == pytest.approx(autograd_cosine(module, both), abs=1e-5)
    assert cosine.n == len(both) and np.isfinite(cosine.control.value)
    for row in frame[frame["direction"] == "reverse"].itertuples():
        assert row.log_probability == pytest.approx(float(alone(module, both[row.pair].reverse)), rel=1e-6)


SOUND = {
    "BERT": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "RoBERTa": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES)),
    "ModernBERT": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1)
    ),
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "OLMoE": lambda: transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**GROUPED, num_experts=8, num_experts_per_tok=2, pad_token_id=0)
    ),
    "Qwen3-MoE": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **GROUPED, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
        )
    ),
    "Mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=56, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOUND)
def test_rounding_is_measured_and_refuses_nothing(name, dtype):
    """In bfloat16 a padded row differs from the same row alone by percents of the logits' spread, on sound models."""
    contract = contract_of(CalledModule(drawn(SOUND[name]()).to(dtype)))
    assert not contract.equal_lengths, contract
    assert contract.reaches_back is (name in ("BERT", "RoBERTa", "ModernBERT"))
    assert set(contract.measured) == {"other rows", "batch size", "later tokens", "padding", "alone"}


@pytest.mark.parametrize("name", ["ignores the mask", "divides by the width", "convolves over tokens"])
def test_leaks_are_told_from_the_rounding_of_bfloat16(name):
    assert contract_of(CalledModule(UNSOUND[name]().to(torch.bfloat16))).equal_lengths


class NormalizesOverBatch(Words):
    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return super().gather(words, mask) - words.mean((0, 1), keepdim=True)


class SharesAnExpert(Words):
    """The best row of a batch takes the only seat, as in routing with a capacity; gradients do not see it."""

    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        each = super().gather(words, mask)
        best = each.sum(-1, keepdim=True).argmax(0, keepdim=True)
        return each * (1 + (torch.arange(len(each))[:, None, None] == best))


class DividesByBatch(Words):
    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return super().gather(words, mask) / len(words)


class Whispers(Words):
    """A leak from row to row below float32's rounding of the logits' size."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        words = self.embed(input_ids)
        return super().forward(input_ids, attention_mask) + 1e-6 * self.head(words.flip(0))


@pytest.mark.parametrize("kind", [NormalizesOverBatch, SharesAnExpert, DividesByBatch, Whispers])
def test_rows_that_reach_each_other_are_refused(kind):
    with pytest.raises(RevprobeError, match=r"depend on (what shares its batch|the batch size)"):
        wrapped(kind())


class Drops(Words):
    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return F.dropout(super().gather(words, mask), 0.1, training=True)


class Trembles(Words):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Tremor()

    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.noise(super().gather(words, mask))


class Tremor(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (1 + 1e-6 * torch.rand(()))


@pytest.mark.parametrize("seed", range(8))
def test_noise_that_repeats_to_the_bit_now_and_then_is_found_all_the_same(seed):
    """Of the size of rounding, a factor has a dozen values: two runs agree often."""
    module = Trembles()
    torch.manual_seed(seed)
    with pytest.raises(RevprobeError, match=r"random in eval mode: 'noise' \(Tremor\)"):
        wrapped(module)


@pytest.mark.parametrize(("kind", "culprit"), [(Drops, "'mix' "), (Trembles, r"'noise' \(Tremor\)")])
def test_a_module_that_is_random_in_eval_mode_is_named(kind, culprit):
    with pytest.raises(RevprobeError, match=rf"random in eval mode: {culprit}"):
        wrapped(kind())


class WritesWeights(Words):
    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            self.mix.weight.mul_(1.0)
        return super().gather(words, mask)


def test_a_module_that_writes_into_its_weights_is_refused():
    with pytest.raises(RevprobeError, match=r"writes into its own 'mix\.weight' when it is run"):
        wrapped(WritesWeights())


class Remembers(Words):
    """Keeps state of every kind: an attribute, a buffer, a submodule that is exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.gate = 0, nn.Identity()

    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.gate = nn.Sequential(self.gate) if self.calls < 3 else self.gate
        self.last = words
        return super().gather(words, mask)


@pytest.mark.parametrize(
    "make",
    [Remembers, lambda: drawn(transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**SIZES, block_size=2)))],
    ids=["hand-made", "BigBird"],
)
def test_neither_wrapping_nor_probing_changes_a_module(make):
    module = make()
    before, generator = copy.deepcopy(module.eval()), torch.get_rng_state()
    rp.probe(wrapped(module), mixed_pairs(), only=PRICED)
    assert str(module) == str(before)
    for (_, one), (_, other) in zip(module.named_modules(), before.named_modules(), strict=True):
        plain = [{k: v for k, v in vars(m).items() if isinstance(v, int | float | str | None)} for m in (one, other)]
        assert plain[0] == plain[1] and set(vars(one)) == set(vars(other))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_module_that_cannot_be_copied_is_tried_itself_and_put_back():
    class Locked(Remembers):
        def __deepcopy__(self, memo: object) -> Locked:
            raise TypeError("cannot pickle '_thread.lock' object")

    module = Locked()
    wrapped(module)
    assert (module.calls, float(module.seen), type(module.gate)) == (0, 0.0, nn.Identity)


def forwards_of(module: nn.Module, act) -> list[tuple[int, int]]:
    """The sizes of the module's own forward passes while `act` runs, copies of it included."""
    sizes: list[tuple[int, int]] = []
    handle = module.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    try:
        act()
    finally:
        handle.remove()
    return sizes


@pytest.mark.parametrize("name", SOUND)
def test_wrapping_costs_at_most_six_short_runs_and_once_for_a_module(name):
    module = drawn(SOUND[name]())
    hidden = MASK if name in ("BERT", "RoBERTa", "ModernBERT") else None
    sizes = forwards_of(module, lambda: contract_of(CalledModule(module), hidden))
    assert 0 < len(sizes) <= 6 and all(rows <= 3 and tokens <= 12 for rows, tokens in sizes), sizes
    objective = "masked" if name in ("BERT", "RoBERTa", "ModernBERT") else "causal"
    again = forwards_of(module, lambda: ProbedModel(module, objective=objective, mask_token_id=MASK))
    assert again == []


class SumsOtherwise(nn.Module):
    """Llama, whose products are summed in an order that rows together decide, and gradient mode: rounding, no leak."""

    def __init__(self, exactly: bool) -> None:
        super().__init__()
        self.inner, self.exactly = SOUND["Llama"](), exactly

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        rounding = (int(input_ids.sum()) % 5) * 2e-7 + (0.0 if self.exactly or not torch.is_grad_enabled() else 3e-7)
        return logits * (1.0 + rounding)


@pytest.mark.parametrize("exactly", [True, False], ids=["equal with gradient", "and with gradient otherwise"])
def test_rounding_that_differs_with_gradient_costs_no_more_runs(exactly):
    """Kernels for experts are others with gradient; the repeated run was taken for randomness, for two runs more."""
    module = drawn(SumsOtherwise(exactly))
    sizes = forwards_of(module, lambda: contract_of(CalledModule(module)))
    assert len(sizes) == 6 and contract_of(CalledModule(module)).routed


def test_another_adapter_is_another_contract_and_the_cache_holds_no_module():
    from peft import PromptTuningConfig, get_peft_model

    module = get_peft_model(SOUND["Llama"](), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    assert contract_of(CalledModule(module)).placement.logits == 4
    assert contract_of(CalledModule(module.get_base_model())).placement.logits == 0
    watched = weakref.ref(module)
    del module
    gc.collect()
    assert watched() is None


class Registers(nn.Module):
    """Self-attention with learned vectors put before, behind or among the tokens; their logits returned or not."""

    def __init__(self, where: str, keep: bool, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.registers = nn.Embedding(56, 16), nn.Parameter(torch.randn(3, 16))
        self.qkv, self.head, self.where, self.keep, self.causal = (
            nn.Linear(16, 48),
            nn.Linear(16, 56),
            where,
            keep,
            causal,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        words, extra = self.embed(input_ids), self.registers.expand(len(input_ids), -1, -1)
        half = {"before": 0, "behind": words.shape[1], "among": words.shape[1] // 2}[self.where]
        hidden = torch.cat([words[:, :half], extra, words[:, half:]], 1)
        visible = None
        if attention_mask is not None:
            seen = attention_mask.bool()
            seen = torch.cat([seen[:, :half], seen.new_ones(len(seen), 3), seen[:, half:]], 1)
            visible = seen[:, None, None] if not self.causal else None
        q, k, v = self.qkv(hidden)[:, None].chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=self.causal)[:, 0]
        logits = self.head(hidden + out)
        return logits if self.keep else torch.cat([logits[:, :half], logits[:, half + 3 :]], 1)


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("keep", [True, False])
def test_rows_are_counted_from_the_first_token_on(where, keep):
    module = Registers(where, keep).eval()
    model, offset = wrapped(module), 3 if where == "before" else 0
    assert model.contract.placement.logits == (offset if keep else 0)
    assert (model.contract.placement.rows, model.contract.placement.columns) == (offset, offset)
    ids = torch.tensor([[5, 9, 30, 31]])
    expected = module(ids)[:, offset : offset + 4] if keep else module(ids)
    assert torch.equal(model.logits(ids), expected)


def test_rows_that_cannot_be_told_apart_are_refused():
    with pytest.raises(RevprobeError, match="rows of logits for 8 tokens, and it cannot be told which row"):
        wrapped(Registers("among", keep=True))


def test_a_causal_module_without_attention_calls_shows_its_rows_itself():
    class Cumulates(Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            sums = self.embed(input_ids).cumsum(1)
            return self.head(torch.cat([self.mix.bias.expand(len(sums), 2, -1), sums], 1))

    module = Cumulates().eval()
    model = ProbedModel(module, objective="causal")
    ids = torch.tensor([[5, 9, 30]])
    assert torch.equal(model.logits(ids), module(ids)[:, 2:])


def test_ids_of_the_check_are_ordinary_and_a_tiny_vocabulary_is_no_obstacle():
    """A module that lets nothing pass behind its own padding id, and a vocabulary of five."""

    class Lengths(Words):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.XLMConfig(vocab_size=56, emb_dim=16, pad_index=27, bos_index=28, eos_index=26)

        def gather(self, words: Tensor, mask: Tensor) -> Tensor:
            return super().gather(words, mask)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(input_ids, (input_ids != 27).long().cumprod(1))

    assert ProbedModel(Lengths().eval(), objective="masked", mask_token_id=5, logit_shift=0).contract.reaches_back
    tiny = Words()
    tiny.embed, tiny.head = nn.Embedding(5, 16), nn.Linear(16, 5)
    assert ProbedModel(tiny.eval(), objective="masked", mask_token_id=4, logit_shift=0).contract.reaches_back


def test_constant_logits_contradict_nothing_and_are_looked_at_again_later():
    module = Words()
    for parameter in module.head.parameters():
        nn.init.zeros_(parameter)
    assert wrapped(module).contract.reaches_back is None
    nn.init.normal_(module.head.weight)
    assert wrapped(module).contract.reaches_back is True


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_a_wrong_objective_is_refused_for_bare_modules_too(objective):
    module = Words().eval() if objective == "causal" else drawn(SOUND["Llama"]())
    with pytest.raises(RevprobeError, match=r"a later token changes|no later token reaches"):
        ProbedModel(module, objective=objective, mask_token_id=MASK, logit_shift=0 if objective == "masked" else 1)


def test_a_module_that_does_not_run_says_so_in_one_line():
    class Broken(Words):
        def gather(self, words: Tensor, mask: Tensor) -> Tensor:
            raise ZeroDivisionError("inside")

    with pytest.raises(RevprobeError, match=r"Broken cannot be run on 3 x 8 token ids: .*inside"):
        wrapped(Broken())
    with pytest.raises(RevprobeError, match=r"gives \(3, 56\) for 3 x 8 token ids"):
        wrapped(type("Pooled", (Words,), {"forward": lambda self, ids: Words.forward(self, ids)[:, 0]})())


def test_a_reading_says_what_its_own_arithmetic_was_whichever_the_wrapping_saw():
    """Wrapped inside an autocast and read outside it, and the other way round."""
    pairs = mixed_pairs()
    module = drawn(SOUND["BERT"]())
    with torch.autocast("cpu", torch.bfloat16):
        model = ProbedModel(module, objective="masked", mask_token_id=MASK)
        inside = rp.probe_reverse_probability(model, pairs, control=False)
    outside = rp.probe_reverse_probability(model, pairs, control=False)
    assert (inside.meta["dtype"], inside.meta["weight_dtype"]) == ("bfloat16", "float32")
    assert outside.meta["dtype"] == "float32" and "weight_dtype" not in outside.meta
    plain = ProbedModel(module, objective="masked", mask_token_id=MASK)
    with torch.autocast("cpu", torch.bfloat16):
        assert rp.probe_reverse_probability(plain, pairs, control=False).meta["dtype"] == "bfloat16"


class Ahead(nn.Module):
    """Attends as `sees` says. Shapes: `sees(length)`: `query key (bool)`."""

    def __init__(self, sees, vocabulary: int = 56, limit: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.qkv, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, 48), nn.Linear(16, vocabulary)
        self.sees = sees
        self.config = transformers.PreTrainedConfig(vocab_size=vocabulary, max_position_embeddings=limit)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.embed(input_ids))[:, None].chunk(3, -1)
        seen = self.sees(input_ids.shape[1])[None, None]
        seen = seen if attention_mask is None else seen & attention_mask.bool()[:, None, None]
        return self.head(self.embed(input_ids) + 3 * F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0])


LEFT = lambda n: torch.ones(n, n, dtype=torch.bool).tril()  # noqa: E731
WAYS = {
    "everywhere": lambda n: torch.ones(n, n, dtype=torch.bool),
    "within a prefix of four": lambda n: LEFT(n) | (torch.arange(n) < 4)[None] & (torch.arange(n) < 4)[:, None],
    "within blocks of seven": lambda n: LEFT(n) | (torch.arange(n)[None] // 7 == torch.arange(n)[:, None] // 7),
    "to the next token": lambda n: torch.ones(n, n, dtype=torch.bool).tril(1),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_later_token_is_seen_a_model_is_not_causal(way):
    with pytest.raises(RevprobeError, match="a later token changes its earlier logits"):
        ProbedModel(Ahead(WAYS[way]).eval(), objective="causal")
    assert ProbedModel(Ahead(LEFT).eval(), objective="causal").contract.reaches_back is False


@pytest.mark.parametrize(("vocabulary", "limit"), [(3, None), (9, None), (5, 8), (4, 11), (8, 11), (4, 7)])
def test_direction_is_found_in_small_vocabularies(vocabulary, limit):
    """Where the ids of a row come round again, the id that is put in place of one must not be the same."""
    with pytest.raises(RevprobeError, match="a later token changes its earlier logits"):
        ProbedModel(Ahead(WAYS["everywhere"], vocabulary, limit).eval(), objective="causal")


class Leaks(Words):
    def __init__(self, move) -> None:
        super().__init__()
        self.move = move

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, attention_mask) + self.move(self.head(self.embed(input_ids)))


def before(rows: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(rows[:1]), rows[:-1]])


LEAKS = {
    "from the rows before": lambda rows: 0.3 * (rows.cumsum(0) - rows),
    "from the row before into odd rows": lambda rows: before(rows) * (torch.arange(len(rows)) % 2)[:, None, None],
    "from the last but one into the last": lambda rows: torch.cat([0 * rows[:-1], before(rows)[-1:]]),
    "from the first into all": lambda rows: (
        0.1 * rows[:1].expand_as(rows) * (torch.arange(len(rows)) > 0)[:, None, None]
    ),
}


@pytest.mark.parametrize("way", LEAKS)
def test_a_leak_is_found_whichever_rows_it_joins(way):
    with pytest.raises(RevprobeError, match="one row change the logits of another"):
        wrapped(Leaks(LEAKS[way]))


def test_padding_that_reaches_the_mask_token_alone_is_found():
    class Masked(Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            words = self.embed(input_ids)
            hidden = torch.where((input_ids == MASK)[..., None], words.mean(1, keepdim=True), 0.0)
            return super().forward(input_ids, attention_mask) + self.head(hidden)

    assert "padded tokens" in wrapped(Masked()).contract.equal_lengths


def test_a_causal_model_that_shifts_its_input_is_refused():
    class Shifted(Ahead):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(torch.cat([input_ids.new_full((len(input_ids), 1), 2), input_ids[:, :-1]], 1))

    with pytest.raises(RevprobeError, match="do not see token i: it shifts its input inside"):
        ProbedModel(Shifted(LEFT).eval(), objective="causal")


def test_a_contract_follows_what_is_done_to_the_module_afterwards():
    """Flags and adapters: in the same wrapper, and in one made anew."""
    from peft import PromptTuningConfig, get_peft_model

    pairs = ReversalPairs.from_pairs(
        [
            ReversalPair(Query([9, 20 + k, 7, 5], [3], [1]), Query([8, 5, 2, 20 + k], [3], [1]), "swapped", str(k))
            for k in range(4)
        ]
    )
    module = drawn(SOUND["Llama"]())
    model = ProbedModel(module, objective="causal")
    module.config.is_causal = False
    for layer in module.model.layers:
        layer.self_attn.is_causal = False
    for again in (lambda: rp.probe_reverse_probability(model, pairs), lambda: ProbedModel(module, objective="causal")):
        with pytest.raises(RevprobeError, match="a later token changes its earlier logits"):
            again()

    prompted = get_peft_model(drawn(SOUND["Llama"]()), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prompted.add_adapter("other", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    model, ids = ProbedModel(prompted.eval(), objective="causal"), torch.tensor([[9, 4, 7, 5]])
    prompted.set_adapter("other")
    assert torch.equal(model.logits(ids), prompted(ids).logits[:, 5:])
    with prompted.disable_adapter():
        assert torch.equal(model.logits(ids), prompted(ids).logits)


class Particular(Words):
    """Will not run in eval mode where gradients are asked for, and says so in its own way."""

    def gather(self, words: Tensor, mask: Tensor) -> Tensor:
        assert self.training or not torch.is_grad_enabled(), "call train() first"
        return super().gather(words, mask)


def test_a_module_that_runs_without_gradient_only_is_judged_by_its_other_runs():
    model = wrapped(Particular())
    assert model.contract.reaches_back and not model.contract.equal_lengths


class LongPositions(Words):
    """More positions than tokens, as a model of characters has; states are unembedded by the tokens' own table."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.wide = nn.Embedding(96, 16), nn.Linear(16, 96)
        self.kinds = nn.Embedding(2, 16)
        del self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1])) + self.kinds(0 * input_ids)
        mixed = words + torch.tanh(self.mix(self.gather(words, mask))) + self.wide(words)[..., :16]
        return F.linear(F.dropout(mixed, 0.1, self.training), self.embed.weight)


def test_the_vocabulary_is_that_of_the_table_which_is_looked_up_with_tokens():
    """Positions and an MLP are wider than it, and no head says how wide it is. Asking leaves no trace."""
    module = LongPositions().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    called = CalledModule(module)
    assert called.vocab_size == 56
    assert torch.equal(torch.get_rng_state(), before) and module.training
    assert not any(part._forward_hooks for part in module.modules())
    module.embed = nn.Embedding(60, 16)  # as a user resizes it
    assert called.vocab_size == 60
    model = ProbedModel(LongPositions().eval(), objective="masked", mask_token_id=55, logit_shift=0)
    assert model.vocab_size == 56 and model.contract.reaches_back


def test_a_module_that_will_not_run_so_has_the_vocabulary_of_its_head():
    class Unrunnable(Words):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(96, 16)

        def forward(self, input_ids: Tensor, images: Tensor) -> Tensor:
            raise NotImplementedError

    assert CalledModule(Unrunnable()).vocab_size == 56
