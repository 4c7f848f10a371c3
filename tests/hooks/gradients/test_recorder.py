"""The engine against autograd on every kind of model, float32 and float64: products, norms, splits and properties.

The reference is `torch.autograd.grad` of one example at a time, over the whole model. Errors are shares of the whole
gradients' norms; seen are 1e-7 in float32 and 1e-15 in float64, the tolerances are those of float32 and float64.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tiny
from revprobe import load_model
from revprobe.hooks.gradients import backward as gradient_reading
from revprobe.hooks.gradients import products as gradient_products
from revprobe.hooks.gradients import rules as gradient_rules
from revprobe.hooks.gradients.recorder import record_gradients
from tiny import FIXTURES, language_model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
VOCAB, BATCH, SEQ = 56, 5, 7
SIZES = tiny.SIZES | {"hidden_size": 16, "intermediate_size": 24}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
# Weights wide enough that nothing is near zero.
drawn = partial(tiny.drawn, scale=0.15, dtype=torch.float64)
Loss = Callable[[slice], Tensor]


# --- the reference --------------------------------------------------------------------------------------------------


def recorded(
    module: nn.Module, parameters: dict, loss: Loss, batch: int, left: Tensor, right: Tensor
) -> dict[str, Tensor]:
    # For what is nonlinear in positions before the batch is.
    loss_of = lambda n: loss(slice(n, n + 1))[0]  # noqa: E731
    with record_gradients(module, parameters, batch, loss_of=loss_of) as recorder:
        return recorder.backward(loss(slice(None)), left, right).inner


def autograd_gradients(parameters: dict, loss: Loss, batch: int = BATCH) -> dict[str, Tensor]:
    """Shapes: `-> batch numel` for each parameter, one example at a time."""
    flags = [p.requires_grad for p in parameters.values()]
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for p in parameters.values():
        p.requires_grad_(True)
    for n in range(batch):
        found = torch.autograd.grad(loss(slice(n, n + 1)).sum(), list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros(p.numel()).to(p) if g is None else g.flatten())
    for p, flag in zip(parameters.values(), flags, strict=True):
        p.requires_grad_(flag)
    return {name: torch.stack(each) for name, each in rows.items()}


def worst_error(module: nn.Module, loss: Loss, batch: int = BATCH, parameters: dict | None = None) -> float:
    """The largest error of any inner product (over |a| |b|) and of any norm (over |a|), a and b whole gradients."""
    parameters = parameters or dict(module.named_parameters())
    left, right = torch.cartesian_prod(torch.arange(batch), torch.arange(batch)).T
    products = recorded(module, parameters, loss, batch, left, right)
    true = autograd_gradients(parameters, loss, batch)
    whole = torch.cat(list(true.values()), 1).norm(dim=1)
    assert (whole > 0).all(), "a zero gradient compares with anything"
    worst = 0.0
    for name, each in true.items():
        error = (products[name] - (each @ each.T).flatten()).abs() / (whole[left] * whole[right])
        norm = products[name][left == right].clamp(min=0).sqrt()
        worst = max(worst, float(error.max()), float(((norm - each.norm(dim=1)).abs() / whole).max()))
    return worst


def language_loss(module: nn.Module, *, shift: int = 0, padded: bool = True) -> Loss:
    """Mean negative log-likelihood of two targets; examples of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (BATCH, SEQ), generator=generator)
    lengths = torch.tensor([7, 5, 7, 6, 4]) if padded else torch.full((BATCH,), SEQ)
    mask = (torch.arange(SEQ) < lengths[:, None]).long()
    rows = torch.stack([lengths - 3 - shift, lengths - 2 - shift], 1)
    targets = torch.randint(0, 50, (BATCH, 2), generator=generator)

    def loss(part: slice) -> Tensor:
        logits = module(input_ids=ids[part], attention_mask=mask[part]).logits
        at_rows = logits[torch.arange(len(logits))[:, None], rows[part]].log_softmax(-1)
        return -at_rows.gather(-1, targets[part][..., None])[..., 0].mean(1)

    return loss


def of(config: type, settings: dict = GROUPED, **more: object) -> nn.Module:
    causal = config not in (transformers.BertConfig, transformers.ModernBertConfig)
    return language_model(config(**settings, **more), "causal" if causal else "masked")


def with_lora() -> nn.Module:
    """Llama with adapters on two projections, drawn like the rest (B would be zero)."""
    import peft

    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    module = peft.get_peft_model(drawn(of(transformers.LlamaConfig)), config)
    return drawn(module)


# --- agreement with autograd ----------------------------------------------------------------------------------------

MODELS = {
    "gpt2": lambda: of(transformers.GPT2Config, GPT2),
    "llama": lambda: of(transformers.LlamaConfig),
    "llama, tied": lambda: of(transformers.LlamaConfig, tie_word_embeddings=True),
    "qwen2": lambda: of(transformers.Qwen2Config),
    "bert": lambda: of(transformers.BertConfig, SIZES),
    "modernbert": lambda: of(transformers.ModernBertConfig, {**SIZES, "global_attn_every_n_layers": 2}),
    "llada": lambda: load_model(FIXTURES / "llada-tiny").module,
    "dream": lambda: load_model(FIXTURES / "dream-tiny").module,
    "gemma (scaled, tied)": lambda: of(transformers.GemmaConfig),
    "gemma3 (scaled, tied)": lambda: of(transformers.Gemma3TextConfig, sliding_window=4),
    "bart decoder (scaled)": lambda: transformers.BartForCausalLM(
        transformers.BartConfig(
            vocab_size=VOCAB, d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=24,
            scale_embedding=True, max_position_embeddings=32, pad_token_id=55, is_decoder=True,
        )
    ),
    "lora": with_lora,
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_products_and_norms_equal_autograd(name, dtype):
    module = drawn(MODELS[name], dtype=dtype)
    # Gemma's norms turn their input to float32, so a model in float64 is exact to float32 only.
    tolerance = TOLERANCE[torch.float32 if name.startswith("gemma") else dtype]
    assert worst_error(module, language_loss(module, shift=int(name == "dream"))) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_adapters_alone_equal_autograd_with_the_base_frozen(dtype):
    module = with_lora().to(dtype)
    adapters = {name: p for name, p in module.named_parameters() if "lora_" in name}
    assert {p.requires_grad for name, p in module.named_parameters() if name not in adapters} == {False}
    assert worst_error(module, language_loss(module), parameters=adapters) < TOLERANCE[dtype]


class Pieces(nn.Module):
    """A layer called twice, a scalar parameter, a parameter that is a module's output, a tied head, bare scales."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCAB, width, padding_idx=0), nn.Linear(width, width)
        self.positions, self.gate = Positions(width), Gate()
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        hidden = self.embed(input_ids) + self.positions()[:, : input_ids.shape[1]]
        hidden = self.gate(self.layer(self.layer(hidden).tanh()).cumsum(1))
        return SimpleNamespace(logits=self.head(hidden))


class Positions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, SEQ, width))

    def forward(self) -> Tensor:
        return self.table


class Gate(nn.Module):
    """A parameter without an axis, used twice in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(0.7))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.sharpness + (hidden * self.sharpness).sin()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shared_layers_scalars_and_parameters_used_in_their_own_forward_equal_autograd(dtype):
    module = drawn(Pieces(), dtype=dtype)
    assert worst_error(module, language_loss(module)) < TOLERANCE[dtype]


# --- the rule of scaled embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if "scaled" in name])
def test_a_scaled_embedding_forms_no_table_per_example(name, monkeypatch):
    """The lookup rule serves it: a replay would hold vocab x dim numbers for every example."""
    replayed = []
    plain = gradient_reading.replay
    monkeypatch.setattr(
        gradient_reading, "replay", lambda module, *rest: replayed.append(module) or plain(module, *rest)
    )
    module = drawn(MODELS[name])
    recorded(module, dict(module.named_parameters()), language_loss(module), BATCH, *torch.arange(BATCH).expand(2, -1))
    assert replayed and not any(isinstance(m, nn.Embedding) and hasattr(m, "embed_scale") for m in replayed)


def test_a_scale_left_out_turns_the_agreement_red(monkeypatch):
    plain = gradient_rules.lookup
    monkeypatch.setattr(
        gradient_reading, "lookup", lambda module, ids, gradient, scale: plain(module, ids, gradient, 1.0)
    )
    module = drawn(MODELS["gemma (scaled, tied)"])
    assert worst_error(module, language_loss(module)) > 1e-3


class OddEmbedding(nn.Embedding):
    """Has `embed_scale`, and does something else with it."""

    def __init__(self, kind: str) -> None:
        super().__init__(VOCAB, 6)
        self.kind = kind
        self.embed_scale = nn.Parameter(torch.tensor(1.5)) if kind == "learned" else 1.5
        if kind == "normed":
            self.weight.data = F.normalize(self.weight.data, dim=-1)  # so that its values are those of a scaling

    def forward(self, ids: Tensor) -> Tensor:
        if self.kind == "normed":
            return F.embedding(ids, F.normalize(self.weight, dim=-1)) * self.embed_scale
        rows = super().forward(ids) * self.embed_scale
        return rows * 2 if self.kind == "more" else rows


@pytest.mark.parametrize("kind", ["learned", "normed", "more"])
def test_an_embedding_that_is_more_than_a_scaled_lookup_is_replayed(kind):
    """Normed rows have the values of a scaled lookup and another gradient: the graph tells, not the values."""
    torch.manual_seed(0)
    module = Pieces()
    module.embed = OddEmbedding(kind)
    assert worst_error(module.double(), language_loss(module)) < 1e-10


# --- run again, and in fewer bits -----------------------------------------------------------------------------------


def test_modules_run_again_in_the_backward_pass_are_counted_once():
    """Checkpointing inside a model, whatever its mode: the second run is not a second use."""

    class Saving(Pieces):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
            hidden = self.embed(input_ids) + self.positions()[:, : input_ids.shape[1]]
            hidden = checkpoint(lambda h: self.gate(self.layer(self.layer(h).tanh())), hidden, use_reentrant=False)
            return SimpleNamespace(logits=self.head(hidden))

    module = drawn(Saving())
    assert worst_error(module, language_loss(module)) < 1e-10


def test_bfloat16_factors_are_multiplied_in_float32():
    """Factors gathered by plain hooks, multiplied in float64: float32 sums agree to 1e-5, bfloat16 sums to 1e-2."""
    torch.manual_seed(0)
    module = drawn(Pieces(16), dtype=torch.bfloat16)
    ins, outs = [], []
    names = {"layer.weight": module.layer.weight, "layer.bias": module.layer.bias}
    with record_gradients(module, names, BATCH) as recorder:
        module.layer.register_forward_hook(lambda m, args, out: ins.append(args[0].detach()) or outs.append(out))
        losses = language_loss(module)(slice(None)).float()
        grads = torch.autograd.grad(losses.sum(), outs, retain_graph=True)
        every = torch.arange(BATCH)
        found = recorder.backward(losses, every, every.roll(1)).inner
    widened = [[t.double() for t in ts] for ts in (grads, ins)]
    weight = sum(g.mT @ a for g, a in zip(*widened, strict=True)).flatten(1)
    bias = sum(g.sum(1) for g in widened[0])
    for name, true in (("layer.weight", weight), ("layer.bias", bias)):
        other = true.roll(1, 0)
        error = (found[name] - (true * other).sum(1)).abs() / (true.norm(dim=1) * other.norm(dim=1))
        assert grads[0].dtype == torch.bfloat16 and found[name].dtype == torch.float32
        assert float(error.max()) < 1e-5, f"{name} was summed in fewer bits"


def test_key_biases_under_rotary_positions_equal_autograd():
    """Qwen2: RoPE turns the bias by the key's position, so it is no constant along a row: small, but not zero."""
    module = drawn(MODELS["qwen2"])
    parameters = {name: p for name, p in module.named_parameters() if name.endswith("k_proj.bias")}
    assert len(parameters) == 2 and worst_error(module, language_loss(module), parameters=parameters) < 1e-10


# --- properties -----------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + 1e-3).rsqrt()


class Stack(nn.Module):
    """Residual blocks in any order; a repeated letter in upper case is the same module again."""

    def __init__(self, blocks: list[str], width: int, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width, padding_idx=0)
        made = {
            "linear": lambda: nn.Linear(width, width),
            "bare linear": lambda: nn.Linear(width, width, bias=False),
            "conv1d": lambda: transformers.pytorch_utils.Conv1D(width, width),
            "norm": lambda: nn.LayerNorm(width),
            "rms": lambda: nn.RMSNorm(width),
            "scale": lambda: Scale(width),
            "positions": lambda: nn.Embedding(9, width),
        }
        shared = nn.Linear(width, width)
        self.blocks = nn.ModuleList(shared if block == "shared" else made[block]() for block in blocks)
        self.head = nn.Linear(width, 11)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            given = torch.arange(ids.shape[1])[None] if isinstance(block, nn.Embedding) else hidden
            mixed = block(given)
            hidden = hidden + (mixed + 0.1 * mixed.cumsum(1)).tanh()
        return self.head(hidden)


BLOCKS = ["linear", "bare linear", "conv1d", "norm", "rms", "scale", "positions", "shared"]


@settings(max_examples=60)
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), max_size=6),
    width=st.integers(2, 7),
    seq=st.integers(1, 6),
    batch=st.integers(1, 6),
    tied=st.booleans(),
    forming=st.sampled_from([None, True, False]),
    seed=st.integers(0, 10_000),
)
def test_random_stacks_are_exact_symmetric_and_obey_cauchy_schwarz(blocks, width, seq, batch, tied, forming, seed):
    """Shapes may coincide (batch, seq and width are drawn alike); ids hold padding; targets and their number vary."""
    torch.manual_seed(seed)
    module = Stack(blocks, width, tied).double()
    ids = torch.randint(0, 11, (batch, seq)).masked_fill(torch.rand(batch, seq) < 0.2, 0)
    wanted = (torch.rand(batch, seq) < 0.5).double()
    wanted[:, 0] = 1
    targets = torch.randint(0, 11, (batch, seq))

    def loss(part: slice) -> Tensor:
        chosen = module(ids[part]).log_softmax(-1).gather(-1, targets[part][..., None])[..., 0]
        return -(chosen * wanted[part]).sum(1) / wanted[part].sum(1)

    with pytest.MonkeyPatch.context() as patch:
        if forming is not None:
            patch.setattr(gradient_products, "_forming_is_cheaper", lambda *_: forming)
        assert worst_error(module, loss, batch) < 1e-10
        left, right = torch.cartesian_prod(torch.arange(batch), torch.arange(batch)).T
        found = recorded(module, dict(module.named_parameters()), loss, batch, left, right)
        each = {name: p.reshape(batch, batch) for name, p in found.items()}
        gram = torch.stack(list(each.values())).sum(0)
    for products in (gram, *each.values()):
        scale = 1e-12 * gram.diagonal().max()
        torch.testing.assert_close(products, products.T, rtol=1e-10, atol=float(scale))
        squares = products.diagonal()
        assert (squares >= -scale).all() and (products**2 <= squares[:, None] * squares * (1 + 1e-9) + scale**2).all()
    norms = gram.diagonal().sqrt()
    assert torch.allclose(gram.diagonal() / (norms * norms), torch.ones(batch).double(), rtol=1e-12)
