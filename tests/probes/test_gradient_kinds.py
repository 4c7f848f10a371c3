"""The gradient probe on kinds of models that a batch tells apart in part or not at all: against autograd by the query.

Each was an error, or could be read wrongly, while modules were taken to give one example after the other.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from revprobe import ProbedModel, Query, ReversalPairs, RevprobeError, probe_gradient_cosine
from revprobe.hooks.gradients.graph import adopted_parameters
from revprobe.hooks.gradients.recorder import record_gradients
from tiny import MASK, uneven_pairs

SIZES = tiny.SIZES | {"hidden_size": 16, "intermediate_size": 24}
MOE = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
VOCAB, WIDTH = 56, 16
drawn = partial(tiny.drawn, scale=0.15, dtype=torch.float64)


def gradients(model: ProbedModel, query: Query) -> dict[str, Tensor]:
    """Autograd's own, of one query by itself."""
    ids = torch.tensor([query.token_ids])
    row = query.target_positions[0]
    if model.objective == "masked":
        ids[0, row] = MASK
    loss = -model.logits(ids)[0, row - model.logit_shift].log_softmax(-1)[query.target[0]]
    named = dict(model.module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def exact(model: ProbedModel, pairs: ReversalPairs, **options: object) -> dict:
    """Every inner product and norm equals autograd's; the reading's meta."""
    reading = probe_gradient_cosine(model, pairs, control=False, **options)
    for number, pair in enumerate(pairs):
        forward, reverse = gradients(model, pair.forward), gradients(model, pair.reverse)
        size = [float(torch.stack([g.norm() for g in side.values()]).norm()) for side in (forward, reverse)]
        rows = (
            reading.frame[reading.frame.pair == number]
            .groupby("parameter")
            .agg({"inner": "sum", "norm_forward": lambda v: np.sqrt((v**2).sum())})
        )
        for name, row in rows.iterrows():
            assert row.inner == pytest.approx(
                float((forward[name] * reverse[name]).sum()), abs=1e-10 * size[0] * size[1]
            )
            assert row.norm_forward == pytest.approx(float(forward[name].norm()), abs=1e-10 * size[0])
    return reading.meta


# --- relative positions, tables without a batch ---------------------------------------------------------------------

RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
DEBERTA = {
    "v1": lambda: transformers.DebertaForMaskedLM(transformers.DebertaConfig(**SIZES, **RELATIVE)),
    "v2": lambda: transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**SIZES, **RELATIVE)),
    "v3": lambda: transformers.DebertaV2ForMaskedLM(
        transformers.DebertaV2Config(
            **SIZES, **RELATIVE, share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=8, conv_kernel_size=3
        )
    ),
}


@pytest.mark.parametrize("version", DEBERTA)
def test_relative_embeddings_of_deberta_are_exact(version):
    model = ProbedModel(drawn(DEBERTA[version]), objective="masked", mask_token_id=MASK)
    meta = exact(model, uneven_pairs())
    assert 0 < len(meta["one_by_one"]) < 12 and meta["coverage"] == {"share": 1.0, "not_covered": {}}
    rest = [name for name, _ in model.module.named_parameters() if name not in meta["one_by_one"]]
    asked = exact(model, uneven_pairs(), parameters=rest)
    assert "one_by_one" not in asked and 0 < asked["coverage"]["share"] < 1
    assert sorted(asked["coverage"]["not_covered"]["not asked for"]) == sorted(meta["one_by_one"])


class Bare(nn.Module):
    """Embedding, one hand-made attention, a head; subclasses use a parameter of their own somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.attend(self.enter(self.embed(input_ids)))))

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden

    def bias(self, length: int) -> Tensor:
        return torch.zeros(length, length)

    def attend(self, hidden: Tensor) -> Tensor:
        scores = hidden @ self.mix(hidden).mT / WIDTH**0.5 + self.bias(hidden.shape[1])
        return hidden + scores.softmax(-1) @ hidden


class RelativeBias(Bare):
    """T5's: a table of distances and heads, (seq, seq, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = nn.Embedding(40, 1)

    def bias(self, length: int) -> Tensor:
        place = torch.arange(length)
        return self.distance(place[:, None] - place + 20)[..., 0]


class BatchedBias(RelativeBias):
    """(1, seq, seq), as long as the batch."""

    def bias(self, length: int) -> Tensor:
        return super().bias(length)[None]


class Registers(Bare):
    """Learned tokens before the sequence, and a scale on its way: parameters used by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.registers, self.gain = nn.Parameter(torch.zeros(1, 2, WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def enter(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.registers.expand(len(hidden), -1, -1), hidden * self.gain], 1)

    def attend(self, hidden: Tensor) -> Tensor:
        return super().attend(hidden)[:, 2:]


class NormedPositions(Bare):
    """Positions through a layer and a norm of their own before the batch is there."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turn, self.even = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden + self.even(self.turn(self.table(torch.arange(hidden.shape[1]))).tanh())


class LearnedPositions(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(30, WIDTH))

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden + self.table[: hidden.shape[1]]


@pytest.mark.parametrize("size", [None, 8, 1], ids=["all", "as many as tokens", "a pair"])
@pytest.mark.parametrize("kind", [RelativeBias, BatchedBias, Registers, NormedPositions, LearnedPositions])
def test_what_has_no_batch_is_exact(kind, size):
    model = ProbedModel(drawn(kind), objective="masked", mask_token_id=MASK, logit_shift=0)
    same = ReversalPairs.from_pairs([pair for pair in uneven_pairs(8) if len(pair.forward.token_ids) == 8])
    exact(model, same, batch_size=size)


# --- unused, cut off, experts ---------------------------------------------------------------------------------------


def test_a_pooler_is_listed_and_its_gradient_is_zero():
    def with_pooler() -> nn.Module:
        module = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
        module.bert = transformers.BertModel(module.config, add_pooling_layer=True)
        module.tie_weights()
        return module

    model = ProbedModel(drawn(with_pooler), objective="masked", mask_token_id=MASK)
    coverage = exact(model, uneven_pairs())["coverage"]
    pooler = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    total = sum(p.numel() for p in model.module.parameters())
    assert coverage["not_covered"] == {"does not reach the loss": pooler}
    assert coverage["share"] == pytest.approx(1 - (WIDTH**2 + WIDTH) / total, abs=1e-12)


def test_the_advice_for_a_module_that_is_cut_off_works():
    class Cut(Bare):
        def enter(self, hidden: Tensor) -> Tensor:
            return hidden.detach()

    model = ProbedModel(drawn(Cut), objective="masked", mask_token_id=MASK, logit_shift=0)
    with pytest.raises(RevprobeError, match=r"'embed.weight' does not reach the loss: .* out with parameters="):
        probe_gradient_cosine(model, uneven_pairs(), batch_size=1, control=False)
    rest = [name for name, _ in model.module.named_parameters() if name != "embed.weight"]
    same = ReversalPairs.from_pairs([pair for pair in uneven_pairs() if len(pair.forward.token_ids) == 8])
    exact(model, same, parameters=rest)


EXPERTS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4)),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**MOE, num_local_experts=4, num_experts_per_tok=2)
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_one_tensor_are_exact(name):
    module = drawn(EXPERTS[name])
    module.set_experts_implementation("eager")
    meta = exact(ProbedModel(module, objective="causal"), uneven_pairs())
    assert all(".experts." in name for name in meta["one_by_one"]) and meta["coverage"]["share"] > 0.99


# --- adapters -------------------------------------------------------------------------------------------------------

LINEAR = ["q_proj", "down_proj"]
ADAPTERS: dict[str, Callable] = {
    "DoRA": lambda peft: peft.LoraConfig(r=2, target_modules=LINEAR, use_dora=True),
    "LoRA on embeddings": lambda peft: peft.LoraConfig(r=2, target_modules=[*LINEAR, "embed_tokens"]),
    "IA3": lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda peft: peft.LoHaConfig(r=2, target_modules=LINEAR),
    "LoKr": lambda peft: peft.LoKrConfig(r=2, target_modules=LINEAR),
    "VeRA": lambda peft: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "OFT": lambda peft: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "BOFT": lambda peft: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "prompt": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda peft: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_every_kind_are_exact(name):
    """Through the recorder: rows of virtual tokens are the wrapper's matter."""
    import peft

    grouped = {**SIZES, "num_key_value_heads": 2}
    module = peft.get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)), ADAPTERS[name](peft)
    )
    module = drawn(lambda: module)
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(0, VOCAB, shape, generator=generator) for shape in ((5, 7), (5, 1)))

    def loss(part: slice) -> Tensor:
        logits = module(input_ids=ids[part], attention_mask=torch.ones_like(ids[part])).logits[:, -2]
        return -logits.log_softmax(-1).gather(1, targets[part])[:, 0]

    parameters = dict(module.named_parameters())
    left, right = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    adopted = adopted_parameters(module, parameters, lambda: loss(slice(0, 1)).sum())
    alone = lambda n: loss(slice(n, n + 1))[0]  # noqa: E731
    with record_gradients(module, parameters, 5, adopted=adopted, loss_of=alone) as recorder:
        found = recorder.backward(loss(slice(None)), left, right).inner
    module.requires_grad_(True)
    each = [torch.autograd.grad(alone(n), list(parameters.values()), allow_unused=True) for n in range(5)]
    true = {
        name: torch.stack([(torch.zeros_like(p) if g[k] is None else g[k]).flatten() for g in each])
        for k, (name, p) in enumerate(parameters.items())
    }
    whole = torch.stack([g.square().sum(1) for g in true.values()]).sum(0).sqrt()
    for name, grads in true.items():
        error = (found[name] - (grads @ grads.T).flatten()).abs() / (whole[left] * whole[right])
        assert float(error.max()) < 1e-10, name
