"""Every family of transformers language models through one interface, against runs of the bare model, one by one.

Tiny random configs, saved and loaded by folder. Weights are drawn wide enough that nothing is near zero; float64
for gradients and probabilities would hide rounding, so all is float32 and the tolerances are those of float32.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import transformers
from torch import Tensor, nn

from revprobe import (
    ProbedModel,
    Query,
    RevprobeError,
    letter_tokenizer,
    load_model,
    probe_attention_correlation,
    probe_gradient_cosine,
    probe_reverse_probability,
)
from revprobe.models.probed import as_probed
from revprobe.models.structure import parameter_roles
from revprobe.probes.passes import batches
from tiny import GROUPED, SIZES, drawn, language_model, text_like_pairs

SEPARATE = {"q": 1, "k": 1, "v": 1, "o": 1}


@dataclass(frozen=True)
class Family:
    """A config, and what must be found out about it: objective, and the parameters of layer 0 by role."""

    config: type
    layer: dict[str, int]
    outside: dict[str, int]
    settings: dict = field(default_factory=lambda: GROUPED)
    objective: str = "causal"
    sdpa: bool = True  # else its attention is seen at its softmax


LLAMA = {**SEPARATE, "mlp": 3, "norm": 2}
ENDS = {"embed": 1, "norm": 1, "unembed": 1}
WITH_BIAS = {"q": 2, "k": 2, "v": 2, "o": 2, "mlp": 4, "norm": 4}
FUSED = {"qkv": 2, "o": 2, "mlp": 4, "norm": 4}
FAMILIES = {
    "gpt2": Family(
        transformers.GPT2Config,
        FUSED,
        {"embed": 1, "position": 1, "norm": 2},
        {"vocab_size": 56, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 54},
    ),
    "llama": Family(transformers.LlamaConfig, LLAMA, ENDS),
    "qwen2": Family(transformers.Qwen2Config, {**LLAMA, "q": 2, "k": 2, "v": 2}, ENDS),
    "qwen3": Family(transformers.Qwen3Config, {**LLAMA, "norm": 4}, ENDS),
    "gemma": Family(transformers.GemmaConfig, LLAMA, {"embed": 1, "norm": 1}),
    "mistral": Family(transformers.MistralConfig, LLAMA, ENDS, {**GROUPED, "sliding_window": 4}),
    "opt": Family(
        transformers.OPTConfig,
        WITH_BIAS,
        {"embed": 1, "position": 1, "norm": 2},
        {**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "bloom": Family(
        transformers.BloomConfig,
        FUSED,
        {"embed": 1, "norm": 4},
        {"vocab_size": 56, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 54},
        sdpa=False,
    ),
    "gpt_neox": Family(transformers.GPTNeoXConfig, FUSED, {"embed": 1, "norm": 2, "unembed": 1}, SIZES),
    "phi": Family(transformers.PhiConfig, {**WITH_BIAS, "norm": 2}, {"embed": 1, "norm": 2, "unembed": 2}, SIZES),
    "bert": Family(
        transformers.BertConfig,
        WITH_BIAS,
        {"embed": 2, "position": 1, "norm": 4, "unembed": 3},
        SIZES,
        "masked",
    ),
    "roberta": Family(
        transformers.RobertaConfig,
        WITH_BIAS,
        {"embed": 2, "position": 1, "norm": 4, "unembed": 3},
        {**SIZES, "max_position_embeddings": 128},
        "masked",
    ),
    "distilbert": Family(
        transformers.DistilBertConfig,
        WITH_BIAS,
        {"embed": 1, "position": 1, "norm": 4, "unembed": 3},
        {"vocab_size": 56, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        "masked",
    ),
    "modernbert": Family(
        transformers.ModernBertConfig,
        {"qkv": 1, "o": 1, "mlp": 2, "norm": 1},  # layer 0 has no norm before its attention
        {"embed": 1, "norm": 3, "unembed": 2},
        {**SIZES, "global_attn_every_n_layers": 2, "local_attention": 4},
        "masked",
    ),
}


@cache
def saved(name: str) -> Path:
    """A random model of the family, in a folder of its own, with a tokenizer beside it."""
    family = FAMILIES[name]
    module = drawn(lambda: language_model(family.config(**family.settings), family.objective), scale=0.15)
    folder = Path(mkdtemp(prefix=f"revprobe-{name}-"))
    module.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@cache
def model_of(name: str) -> ProbedModel:
    return load_model(saved(name), **({"attn_implementation": "sdpa"} if FAMILIES[name].sdpa else {}))


PAIRS = text_like_pairs()


# --- slow references: the bare module, one unpadded query at a time -------------------------------------------------


def shown(model: ProbedModel, query: Query, hidden: list[int]) -> Tensor:
    ids = torch.tensor([query.token_ids])
    if model.objective == "masked":
        ids[0, hidden] = model.mask_token_id
    return ids


def shift_of(name: str) -> int:
    return int(FAMILIES[name].objective == "causal")


def loss_by_hand(model: ProbedModel, shift: int, query: Query) -> Tensor:
    logits = model.module(shown(model, query, list(query.target_positions))).logits[0]
    rows = [p - shift for p in query.target_positions]
    return nn.functional.cross_entropy(logits[rows], torch.tensor(query.target))


@torch.no_grad()
def probability_by_hand(model: ProbedModel, shift: int, query: Query) -> float:
    """Reveal the target left to right; multiply the softmax's entries."""
    product = 1.0
    for place, position in enumerate(query.target_positions):
        logits = model.module(shown(model, query, list(query.target_positions[place:]))).logits[0, position - shift]
        product *= float(logits.double().softmax(-1)[query.token_ids[position]])
    return product


def worst_gradient_error(name: str, model: ProbedModel, reading, only: list[str] | None = None) -> float:
    """The largest error of any parameter's inner product, as a share of the two whole gradients' norms."""
    parameters = {n: p for n, p in model.module.named_parameters() if only is None or n in only}
    worst = 0.0
    for pair, rows in reading.frame.groupby("pair"):
        both = []
        for query in (PAIRS[pair].forward, PAIRS[pair].reverse):
            loss = loss_by_hand(model, shift_of(name), query)
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            both.append({n: torch.zeros(()) if g is None else g for n, g in zip(parameters, grads, strict=True)})
        forward, reverse = both
        whole = [torch.cat([g.flatten() for g in grads.values()]).norm() for grads in both]
        assert set(rows.parameter) == set(parameters), "a parameter is missing from the frame"
        for parameter, inner in rows.groupby("parameter").inner.sum().items():  # a fused one has a row for each part
            true = (forward[parameter] * reverse[parameter]).sum()
            worst = max(worst, float((inner - true).abs() / (whole[0] * whole[1])))
    return worst


def worst_probability_error(name: str, model: ProbedModel, reading) -> float:
    expected = [
        probability_by_hand(model, shift_of(name), getattr(PAIRS[row.pair], row.direction))
        for row in reading.frame.itertuples()
    ]
    return max(abs(row.probability - e) / e for row, e in zip(reading.frame.itertuples(), expected, strict=True))


@torch.no_grad()
def worst_weight_error(name: str, model: ProbedModel, reading) -> float:
    """Against the weights that transformers' own eager attention gives out, for every layer, head and pair."""
    eager = load_model(saved(name), attn_implementation="eager").module
    config = eager.config
    assert set(zip(reading.frame.layer, reading.frame["head"], strict=True)) == {
        (layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)
    }
    worst = 0.0
    for pair in range(len(PAIRS)):
        for side in ("forward", "reverse"):
            query = getattr(PAIRS[pair], side)
            output = eager(shown(model, query, list(query.target_positions)), output_attentions=True)
            rows = [p - shift_of(name) for p in query.target_positions]
            for row in reading.frame[reading.frame.pair == pair].itertuples():
                weights = output.attentions[row.layer][0, row.head]
                expected = weights[rows][:, list(query.evidence_positions)].sum(1).mean()
                worst = max(worst, abs(float(expected) - getattr(row, f"weight_{side}")))
    return worst


# --- what must hold for every family --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_objective_shift_mask_and_begin_are_found_out(name):
    family, model = FAMILIES[name], model_of(name)
    assert (model.objective, model.logit_shift) == (family.objective, shift_of(name))
    assert (model.mask_token_id, model.begin_token_id, model.vocab_size) == (53, 54, 56)
    bare = (
        as_probed(model.module)
        if family.objective == "causal"
        else ProbedModel(model.module, objective="masked", mask_token_id=53)
    )
    assert (bare.objective, bare.logit_shift) == (family.objective, shift_of(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_its_role(name):
    """Counts of layer 0 and of what stands outside the layers; a fused projection stays `qkv`."""
    roles = parameter_roles(model_of(name).module).values()
    assert Counter(r.role for r in roles if r.layer == 0) == FAMILIES[name].layer
    assert Counter(r.role for r in roles if r.layer is None) == FAMILIES[name].outside


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_products_equal_autograd_of_every_parameter(name):
    model = model_of(name)
    reading = probe_gradient_cosine(model, PAIRS, control=False)
    assert worst_gradient_error(name, model, reading) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_probabilities_equal_a_plain_softmax(name):
    model = model_of(name)
    assert worst_probability_error(name, model, probe_reverse_probability(model, PAIRS, control=False)) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_equal_the_eager_attentions_own(name):
    model = model_of(name)
    assert worst_weight_error(name, model, probe_attention_correlation(model, PAIRS, control=False)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_readout_row_one_off_turns_all_three_red(name):
    """The planted fault: row i - shift read at the other shift."""
    wrong = load_model(saved(name), attn_implementation="sdpa")
    wrong.logit_shift = 1 - wrong.logit_shift
    readings = [p(wrong, PAIRS, control=False) for p in (probe_gradient_cosine, probe_reverse_probability)]
    assert worst_gradient_error(name, wrong, readings[0]) > 1e-2
    assert worst_probability_error(name, wrong, readings[1]) > 1e-2
    assert worst_weight_error(name, wrong, probe_attention_correlation(wrong, PAIRS, control=False)) > 1e-2


def test_a_padded_query_that_attends_to_padding_is_seen(monkeypatch):
    """The planted fault: the attention mask is lost, so padded rows see padding; the first batch is found out."""
    model = load_model(saved("bert"), attn_implementation="sdpa")
    plain = ProbedModel.logits
    monkeypatch.setattr(ProbedModel, "logits", lambda self, ids, mask=None: plain(self, ids))
    reading = probe_reverse_probability(model, PAIRS, control=False)
    assert worst_probability_error("bert", model, reading) < 1e-4
    assert "one differs from itself alone in log-probabilities" in reading.meta["batches"]
    monkeypatch.setattr(batches, "is_due", lambda *_: False)
    reading = probe_reverse_probability(load_model(saved("bert")), PAIRS, control=False)
    assert worst_probability_error("bert", model, reading) > 1e-2


# --- what cannot be found out is asked for --------------------------------------------------------------------------


def test_a_masked_model_without_a_mask_token_asks_for_it(tmp_path):
    transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(RevprobeError, match="is masked but names no mask token; pass mask_token_id="):
        load_model(tmp_path)
    assert load_model(tmp_path, mask_token_id=53).mask_token_id == 53


def test_a_config_that_fits_two_objectives_asks_for_one(tmp_path):
    config = transformers.BertConfig(**SIZES)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("BertForMaskedLM", "BertForPreTraining"))
    with pytest.raises(RevprobeError, match="fits both a masked and a causal language model; pass objective="):
        load_model(tmp_path, mask_token_id=53)
    assert load_model(tmp_path, mask_token_id=53, objective="masked").logit_shift == 0


def test_a_decoder_opened_in_both_directions_asks_for_its_shift():
    """LLaDA reads row i, Dream row i - 1: the class of a Llama without its causal mask tells neither."""
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    module.config.is_causal = False
    with pytest.raises(RevprobeError, match="cannot tell at which row LlamaForCausalLM predicts a masked token"):
        ProbedModel(module, objective="masked", mask_token_id=53)
    assert ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=1).logit_shift == 1


def test_a_causal_mixture_of_experts_is_not_taken_for_bidirectional():
    """Another last token regroups the experts' batches, which moves earlier logits by rounding."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    assert as_probed(transformers.Qwen3MoeForCausalLM(config)).objective == "causal"


def test_left_over_tensors_outside_the_layers_warn_and_inside_are_refused(tmp_path):
    """bert-base-uncased carries a pooler and a sentence head; a left-over layer means another model."""
    from safetensors.torch import load_file, save_file

    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    pooler = {"bert.pooler.dense.weight": torch.zeros(32, 32)}
    save_file(weights | pooler, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"bert\.pooler\.dense\.weight left over"):
        load_model(tmp_path, mask_token_id=53)
    layer = {"bert.encoder.layer.2.output.dense.weight": torch.zeros(32, 48)}
    save_file(weights | layer, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RevprobeError, match=r"unexpected bert\.encoder\.layer\.2\.output\.dense\.weight"):
        load_model(tmp_path, mask_token_id=53)


def test_robertas_context_is_shorter_than_its_position_table():
    """Its positions start after the padding token's id: 128 rows and padding id 55 leave 72 tokens."""
    assert model_of("roberta").max_length == 128 - 55 - 1


class SequenceFirst(nn.Module):
    """Flattens `seq batch` where OPT flattens `batch seq`: rows of different examples alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(56, 8), nn.LayerNorm(8), nn.Linear(8, 56)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        seen = torch.ones_like(ids)[..., None] if attention_mask is None else attention_mask[..., None]
        hidden = self.embed(ids) + (self.embed(ids) * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        rows = self.norm(hidden.transpose(0, 1).reshape(-1, 8))
        return self.head(rows.view(*ids.shape[::-1], 8).transpose(0, 1))


def test_rows_that_are_not_one_example_after_the_other_go_to_their_examples():
    """By OPT's rule each example would have the gradients of others."""
    torch.manual_seed(0)
    model = ProbedModel(SequenceFirst(), objective="masked", mask_token_id=53, logit_shift=0)
    together, alone = (probe_gradient_cosine(model, PAIRS, batch_size=size, control=False) for size in (None, 1))
    assert together.value == pytest.approx(alone.value, rel=1e-5) and "one_by_one" not in together.meta


def test_a_mixture_of_experts_has_exact_gradients_and_says_how():
    """Its router returns logits and, made of them, scores: counted once. Experts as a loop are run by the query."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    module = drawn(lambda: language_model(transformers.Qwen3MoeConfig(**GROUPED, **sizes)), scale=0.15)
    model = ProbedModel(module, objective="causal")
    routers = [name for name, _ in module.named_parameters() if name.endswith("gate.weight")]
    reading = probe_gradient_cosine(model, PAIRS, parameters=routers, control=False)
    assert worst_gradient_error("llama", model, reading, only=routers) < 1e-4
    module.set_experts_implementation("eager")
    reading = probe_gradient_cosine(model, PAIRS, control=False)
    assert worst_gradient_error("llama", model, reading) < 1e-4
    assert len(reading.meta["one_by_one"]) == 4 and all("experts" in name for name in reading.meta["one_by_one"])
    assert "Qwen3MoeExperts cannot be split by example" in next(iter(reading.meta["one_by_one"].values()))
