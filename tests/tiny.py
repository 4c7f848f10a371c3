"""Tiny models, tokenizers and pairs for the tests, and where the tests' files are: `from tiny import radd, FIXTURES`.

A model drawn here has the same weights in every call and on every machine, none near its initial value: a reading that
is zero or one only because the weights are small would pass for right. Sizes, seed and scale are the caller's to say
where a test rests on them.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

import revprobe as rp
from revprobe.hooks.attention import tap_attention
from revprobe.models.families.fast_dllm import FastDLLMConfig, FastDLLMForMaskedDiffusion
from revprobe.models.families.sdar import SDARConfig, SDARForMaskedDiffusion
from revprobe.models.probed import CalledModule
from revprobe.models.structure import attention_of

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"

# Models of transformers over the tokens of `letter_tokenizer`, whose mask is 53; grouped: two query heads share a key.
MASK = 53
SIZES = {
    "vocab_size": 56,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 54,
    "eos_token_id": 54,
    "pad_token_id": 55,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


def module_at(path: Path) -> ModuleType:
    """The module of a file that belongs to no package: an example, or what stands beside a test."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"no Python file {path}"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- models ---------------------------------------------------------------------------------------------------------


def tapped(model: rp.ProbedModel | nn.Module, rows: Tensor, columns: Tensor, length: int) -> Any:
    """`tap_attention` for runs over `length` tokens, of a wrapped model or of a bare language model."""
    asked = model if isinstance(model, rp.ProbedModel) else CalledModule(model)
    return tap_attention(asked.module, rows, columns, attention_of(asked), (length, length))


def drawn(
    made: nn.Module | Callable[[], nn.Module], *, seed: int = 0, scale: float = 0.1, dtype: torch.dtype | None = None
) -> Any:
    """A module with noise of standard deviation `scale` on every weight, biases and norms included; in eval mode.

    Give a function that makes the module where its initial weights are to be the same in every call as well.
    """
    torch.manual_seed(seed)
    module = made if isinstance(made, nn.Module) else made()
    module = module.to(dtype) if dtype else module
    for parameter in module.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return module.eval()


def language_model(config: transformers.PreTrainedConfig, objective: str = "causal", **options: Any) -> nn.Module:
    """The module of a config of transformers with the head for the objective, at its initial weights."""
    auto = transformers.AutoModelForCausalLM if objective == "causal" else transformers.AutoModelForMaskedLM
    return auto.from_config(config, **options)


def radd(
    encoding: str = "rope", *, seed: int = 0, scale: float = 0.1, dtype: torch.dtype | None = None, **sizes: Any
) -> rp.ProbedModel:
    """RADD of one layer, one head and d_model 16 over letters, unless asked otherwise."""
    config = rp.RaddConfig(**{"position_encoding": encoding, "d_model": 16} | sizes)
    module = drawn(lambda: rp.RaddForMaskedLM(config), seed=seed, scale=scale, dtype=dtype)
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked")


def causal(
    config: transformers.PreTrainedConfig, *, scale: float = 0.1, dtype: torch.dtype | None = None, **options: Any
) -> rp.ProbedModel:
    """The causal model of a config over letters; `options` go to transformers, like `attn_implementation`."""
    module = drawn(lambda: language_model(config, **options), scale=scale, dtype=dtype)
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="causal")


def gpt2(kernel: str = "sdpa", *, scale: float = 0.1) -> rp.ProbedModel:
    """GPT-2 of two layers and two heads: learned positions, one fused projection, tied unembedding."""
    tokens = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.GPT2Config(**tokens, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return causal(config, scale=scale, attn_implementation=kernel)


def llama(kernel: str = "sdpa", *, scale: float = 0.1, dtype: torch.dtype | None = None) -> rp.ProbedModel:
    """Llama of two layers, four query heads on two key heads."""
    return causal(transformers.LlamaConfig(**GROUPED), scale=scale, dtype=dtype, attn_implementation=kernel)


def in_blocks(size: int | None = 4, *, shift: int = 0, scale: float = 0.1) -> rp.ProbedModel:
    """A model that writes in blocks: SDAR, or with shift 1 Fast-dLLM v2. Two layers, four query heads on two."""
    config_class, model_class = {
        0: (SDARConfig, SDARForMaskedDiffusion),
        1: (FastDLLMConfig, FastDLLMForMaskedDiffusion),
    }[shift]
    config = config_class(**(GROUPED if shift == 0 else {k: v for k, v in GROUPED.items() if k != "head_dim"}))
    module = drawn(lambda: model_class(config), scale=scale)
    told = {"mask_token_id": MASK, "block_size": size or "whole", "begin_token_id": 54}
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", **told)


def bridged(model: rp.ProbedModel) -> rp.ProbedModel:
    """The same model behind TransformerLens' view of it."""
    told = {"objective": model.objective, "mask_token_id": model.mask_token_id, "logit_shift": model.logit_shift}
    return rp.ProbedModel(model.to_bridge(), model.tokenizer, **told)


def wired(*, carries: bool = True, facts: int = 10) -> tuple[rp.ProbedModel, rp.ReversalPairs]:
    """RADD of two layers and two heads in which layer 1, head 0 alone answers, and pairs that it answers.

    It looks everywhere alike and writes the target of whichever evidence it sees (evidence 10 + i, target 30 + i).
    Layer 0 copies, no MLP writes anything. `carries=False`: that head writes nothing either.
    """
    model = radd("none", n_layers=2, n_heads=2, d_model=64, scale=0.3)
    module = model.module
    with torch.no_grad():
        for block in module.blocks:
            for part in (block.attention.q_proj, block.attention.v_proj, block.attention.o_proj, block.mlp.down_proj):
                part.weight.zero_()
            block.mlp.down_proj.bias.zero_()
            for norm in (block.attention_norm, module.final_norm):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
        seen = nn.functional.layer_norm(module.embed_tokens.weight, (64,))
        attention, carried = module.blocks[1].attention, torch.arange(facts)
        attention.v_proj.weight[:facts] = torch.linalg.pinv(seen)[:, 10 : 10 + facts].T
        if carries:
            attention.o_proj.weight[:, carried] = 10.0 * module.lm_head.weight[30 : 30 + facts].T
    pairs = [
        rp.ReversalPair(
            rp.Query([1, 10 + i, 2, 3, 30 + i, 4], [4], [1]), rp.Query([5, 30 + i, 3, 10 + i, 2], [1], [3]), fact=str(i)
        )
        for i in range(facts)
    ]
    return model, rp.ReversalPairs.from_pairs(pairs)


class AttentionOnly(nn.Module):
    """The paper's model: embedding, attention without W_O, unembedding; no norm, no residual; several heads' values
    are added up. `cut` silences one head's values at one position of every sequence.
    """

    def __init__(self, heads: int = 1, dim: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(56, dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim * heads, bias=False) for _ in range(3))
        self.unembed = nn.Linear(dim, 56, bias=False)
        self.cut: tuple[int, Tensor] | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key, value = split(self.q(states)), split(self.k(states)), split(self.v(states))
        if self.cut is not None:
            head, positions = self.cut
            keep = torch.ones(value.shape[:3], dtype=value.dtype)
            keep[torch.arange(len(value)), head, positions] = 0
            value = value * keep[..., None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.unembed(mixed.sum(1))


# --- tokenizers -----------------------------------------------------------------------------------------------------


def word_tokenizer(
    words: Iterable[str],
    *,
    special: tuple[str, ...] = ("unk", "eos", "mask"),
    split: pre_tokenizers.PreTokenizer | None = None,
    normalizer: normalizers.Normalizer | None = None,
) -> transformers.PreTrainedTokenizerFast:
    """One token a word: the special ones as "<unk>" in the order given, then the words. Splits at blanks."""
    vocabulary = [*(f"<{name}>" for name in special), *words]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        backend.normalizer = normalizer
    names = {f"{name}_token": f"<{name}>" for name in special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


# --- pairs ----------------------------------------------------------------------------------------------------------


def pairs_at(
    forward: tuple[int, int],
    reverse: tuple[int, int],
    *,
    count: int = 10,
    length: int = 12,
    vocab: int = 50,
    ragged: bool = False,
) -> rp.ReversalPairs:
    """One group of pairs: (evidence, target) positions of both directions, random tokens at all others.

    ragged: every second reverse query is one token shorter, so that batches are padded.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for fact in range(count):
        target, evidence, *rest = torch.randperm(vocab, generator=generator)[: length + 2].tolist()
        queries = []
        for (at_evidence, at_target), size in ((forward, length), (reverse, length - (ragged and fact % 2))):
            tokens = rest[:size]
            tokens[at_evidence], tokens[at_target] = evidence, target
            queries.append(rp.Query(tokens, [at_target], [at_evidence]))
        pairs.append(rp.ReversalPair(*queries, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def text_like_pairs() -> rp.ReversalPairs:
    """Six pairs of unequal lengths, one- and two-token targets and evidence, evidence before the target (so that a
    causal model sees it)."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for fact in range(6):
        width = 1 + fact % 2
        ids = torch.randperm(50, generator=generator)[:16].tolist()
        evidence, target, rest = ids[:width], ids[2 : 2 + width], ids[4 : 9 + fact]
        asked = []
        for before, between in ((1, 2), (2, 1)):
            tokens = [*rest[:before], *evidence, *rest[before : before + between], *target, *rest[before + between :]]
            start = before + width + between
            asked.append(rp.Query(tokens, range(start, start + width), range(before, before + width)))
        pairs.append(rp.ReversalPair(*asked, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


# --- readings -------------------------------------------------------------------------------------------------------


def made_probabilities(draw: int, facts: Sequence[str], about: dict[str, Any]) -> rp.Reading:
    """A reading of the answer's probability that no model gave: drawn numbers for one pair of each entry of `facts`."""
    pairs = len(facts)
    p = np.random.default_rng(draw).uniform(size=2 * pairs)
    columns = {"pair": np.tile(np.arange(pairs), 2), "fact": [*facts, *facts], "log_probability": np.log(p), "rank": 1}
    columns |= {"direction": np.repeat(["forward", "reverse"], pairs), "probability": p, "argmax_match": p > 0.5}
    columns |= {"probability_control": p / 10, "argmax_match_control": False}
    return rp.Reading("reverse_probability", pd.DataFrame(columns), about)


def uneven_pairs(count: int = 4, length: int = 8) -> rp.ReversalPairs:
    """Random token ids below 50, a fact each; lengths differ by one, so that batches are padded."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for fact in range(count):
        ids = torch.randperm(50, generator=generator)[: length + fact % 2].tolist()
        swapped = [ids[0], ids[2], ids[1], *ids[3:]]
        pairs.append(rp.ReversalPair(rp.Query(ids, [4], [1]), rp.Query(swapped, [4], [2]), fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)
