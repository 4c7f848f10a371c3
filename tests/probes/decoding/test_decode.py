"""Decoding is what it says: unmasking finds the mode of a known joint, `generate` is greedy, no trace is left.

The toy model below has a joint that is known by enumeration: its logits at a masked position are the exact conditional
given what is visible. Against it stand slow decoders written from the description alone.
"""

import itertools
import math
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from revprobe import ProbedModel, RaddConfig, RaddForMaskedLM, RevprobeError, decode
from revprobe.models.bases.configs import POSITION_ENCODINGS, DreamConfig, LLaDAConfig
from revprobe.models.families.dream import DreamForMaskedDiffusion
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from revprobe.probes.decoding.causal import end_tokens
from revprobe.probes.decoding.decode import answer_text, decode_tokens, decoding_settings, encode_prompts
from revprobe.probes.decoding.masked import ALGORITHMS, Prompt, Unmasking, _Canvas
from tiny import word_tokenizer

WORDS, MASK = 4, 4  # tokens of the toy's vocabulary, and the id after them
UNK, END, MASK_WORD, BEGIN = range(4)  # ids of the small tokenizer's special tokens
PROMPTS = ["w1 w2 w3", "w5", "w7 w8", "w5 w5 w9 w2 w2 w4 w6"]


class Known(nn.Module):
    """A masked model with a known joint: log p(x) is `energy(x)` up to a constant, the same at any length."""

    run_lengths: ClassVar[list[int]] = []

    def __init__(self, energy, shift: int = 0) -> None:
        super().__init__()
        self.energy, self.shift = energy, shift
        self.embed = nn.Embedding(WORDS + 1, 1)  # says where the model is, and how large its vocabulary
        Known.run_lengths = []  # of the class: probing puts a module's own attributes back, and what stands in them

    def forward(self, input_ids, attention_mask=None):
        Known.run_lengths.append(input_ids.shape[1])
        sizes = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(1).tolist()
        logits = torch.zeros(*input_ids.shape, WORDS + 1)
        for row, size in enumerate(sizes):
            for at, probabilities in conditionals(self.energy, input_ids[row, :size].tolist()).items():
                logits[row, at - self.shift, :WORDS] = torch.tensor(probabilities).log()
                logits[row, at - self.shift, MASK] = 50.0  # the mask token must never be revealed
        return logits


def pairwise(seed: int, strength: float = 0.6):
    """An energy of random couplings between all pairs of positions, by distance."""
    couplings = np.random.default_rng(seed).normal(0, strength, (4, WORDS, WORDS))
    return lambda x: sum(couplings[min(j - i, 3), x[i], x[j]] for i, j in itertools.combinations(range(len(x)), 2))


def tabled(joint: dict[tuple[int, ...], float]):
    """The energy of a joint given outright; what is not in it has no probability."""
    return lambda x: math.log(max(joint.get(tuple(x), 0.0), 1e-12))


def completions(energy, ids: list[int]) -> dict[tuple[int, ...], float]:
    """Every way to fill the masks with its probability, by enumeration."""
    places = [i for i, token in enumerate(ids) if token == MASK]
    weights = {}
    for words in itertools.product(range(WORDS), repeat=len(places)):
        filled = list(ids)
        for place, word in zip(places, words, strict=True):
            filled[place] = word
        weights[tuple(filled)] = math.exp(energy(filled))
    total = sum(weights.values())
    return {filled: weight / total for filled, weight in weights.items()}


def conditionals(energy, ids: list[int]) -> dict[int, list[float]]:
    """The distribution at each masked position given the visible tokens."""
    found = {i: [0.0] * WORDS for i, token in enumerate(ids) if token == MASK}
    for filled, probability in completions(energy, ids).items():
        for place, distribution in found.items():
            distribution[filled[place]] += probability
    return found


SURENESS = {
    "confidence": lambda p: max(p),
    "entropy": lambda p: sum(q * math.log(q) for q in p),
    "margin": lambda p: sorted(p)[-1] - sorted(p)[-2],
}


def slow_decode(energy, prompt: list[int], length: int, algorithm: str, steps: int, block: int) -> list[int]:
    """Unmasking as LLaDA describes it, one row and one token at a time; `steps` and `block` must divide `length`."""
    ids = prompt + [MASK] * length
    blocks = length // block
    for start in range(len(prompt), len(prompt) + length, block):
        per_step = [block // (steps // blocks)] * (steps // blocks)
        for extra in range(block % (steps // blocks)):
            per_step[extra] += 1
        for count in per_step:
            seen = {i: p for i, p in conditionals(energy, ids).items() if start <= i < start + block}
            surest = sorted(seen, key=lambda i: -SURENESS[algorithm](seen[i]))[:count]
            for place in surest:
                ids[place] = max(range(WORDS), key=lambda word: seen[place][word])
    return ids[len(prompt) :]


def known(energy, shift: int = 0) -> ProbedModel:
    return ProbedModel(
        Known(energy, shift), objective="masked", mask_token_id=MASK, logit_shift=shift, begin_token_id=0, check=False
    )


# --- item 3: the argmax of a known joint ----------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(sorted(ALGORITHMS)), st.integers(0, 1), st.integers(1, 4), st.data())
def test_greedy_unmasking_finds_the_argmax_of_a_joint_with_a_majority(seed, algorithm, shift, block, data):
    """A sequence with more than half of the mass is the likeliest token at every position, whatever was revealed of
    it before: every order, block and number of steps must end there. A shift that is off by one turns this red.
    """
    rng = np.random.default_rng(seed)
    length = 4
    everything = list(itertools.product(range(WORDS), repeat=length))
    mode = everything[rng.integers(len(everything))]
    rest = rng.dirichlet(np.full(len(everything), 0.05)) * 0.49
    joint = {(1, *x): p + 0.51 * (x == mode) for x, p in zip(everything, rest, strict=True)}
    assert max(joint, key=joint.get) == (1, *mode)
    steps = data.draw(st.integers(math.ceil(length / block), length))
    how = Unmasking(algorithm, steps, block)
    assert decode_tokens(known(tabled(joint), shift), [Prompt((1,))], [length], how) == [list(mode)]


# Left to right, the likeliest first token is 0, and no pair that begins with it is likely.
ORDER_MATTERS = {(1, 2): 0.35, (0, 0): 0.15, (0, 1): 0.14, (0, 2): 0.11, (2, 2): 0.25}


def test_the_surest_position_comes_first_and_blocks_of_one_go_left_to_right():
    """The second token is surer (0.71 against 0.40): taking it first finds the mode, left to right does not."""
    joint = {(3, *x): p for x, p in ORDER_MATTERS.items()}
    model = known(tabled(joint))
    for algorithm in ALGORITHMS:
        assert decode_tokens(model, [Prompt((3,))], [2], Unmasking(algorithm)) == [[1, 2]], algorithm
        assert decode_tokens(model, [Prompt((3,))], [2], Unmasking(algorithm, block_length=1)) == [[0, 0]], algorithm
    assert decode_tokens(model, [Prompt((3,))], [2], Unmasking(steps=1)) == [[0, 2]], "both at once: the two marginals"


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("steps", "block"), [(4, 4), (2, 4), (3, 4), (1, 4), (4, 2), (2, 2), (4, 1)])
def test_unmasking_equals_the_slow_decoder_step_by_step(steps, block, shift):
    """Random couplings, three prompts of different lengths in one batch. Wrong order, counts, block or row: red."""
    prompts = [[1], [2, 0, 3], [0, 3]]
    differ = 0
    for seed in range(4):
        energy = pairwise(seed)
        for algorithm in ALGORITHMS:
            how = Unmasking(algorithm, steps, block)
            found = decode_tokens(known(energy, shift), [Prompt(tuple(p)) for p in prompts], [4] * 3, how)
            assert found == [slow_decode(energy, p, 4, algorithm, steps, block) for p in prompts], (seed, algorithm)
            differ += found != [slow_decode(energy, p, 4, algorithm, 4, 1) for p in prompts]
    assert differ or block == 1, "these joints must tell orders apart"


def test_left_to_right_is_the_chain_of_conditionals():
    """Blocks of one token against the plain left-to-right argmax of the enumerated joint."""
    for seed in range(6):
        energy, ids = pairwise(seed), [2, 1]
        for _ in range(4):
            seen = {}  # the next token's distribution, the later ones summed out
            for filled, p in completions(energy, ids + [MASK] * (6 - len(ids))).items():
                seen[filled[len(ids)]] = seen.get(filled[len(ids)], 0.0) + p
            ids.append(max(seen, key=seen.get))
        how = Unmasking("entropy", block_length=1)
        assert decode_tokens(known(energy), [Prompt((2, 1))], [4], how) == [ids[2:]]


def test_answers_of_different_lengths_share_a_batch():
    """Each row has a schedule and a canvas of its own; the number of runs is that of the longest."""
    energy, lengths = pairwise(7), [1, 4, 2]
    model = known(energy)
    prompts = [Prompt((1,)), Prompt((2, 3)), Prompt((0,), (3,))]
    found = decode_tokens(model, prompts, lengths, Unmasking())
    assert len(model.module.run_lengths) == 4
    alone = [decode_tokens(model, [p], [n], Unmasking())[0] for p, n in zip(prompts, lengths, strict=True)]
    assert found == alone and [len(row) for row in found] == lengths
    assert found[1] == slow_decode(energy, [2, 3], 4, "confidence", 4, 4)


def test_a_shift_1_model_gets_a_begin_token_before_an_empty_prompt():
    energy = pairwise(3)
    assert decode_tokens(known(energy, 1), [Prompt(())], [3]) == [slow_decode(energy, [0], 3, "entropy", 3, 3)]
    model = known(energy, 1)
    model.begin_token_id = None
    with pytest.raises(RevprobeError, match="predicts nothing without a begin token"):
        decode_tokens(model, [Prompt(())], [3])


# --- schedules and settings -----------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 50))
def test_a_schedule_reveals_every_token_once_block_after_block(length, steps, block):
    how = Unmasking(steps=steps, block_length=block)
    blocks = math.ceil(length / block)
    if min(steps, length) < blocks:
        with pytest.raises(RevprobeError, match="every block takes at least one step"):
            how.schedule(length)
        return
    plan = how.schedule(length)
    assert sum(count for *_, count in plan) == length and len(plan) <= steps
    assert [start for start, *_ in plan] == sorted(start for start, *_ in plan)
    for start in {start for start, *_ in plan}:
        counts = [count for first, _, count in plan if first == start]
        assert sum(counts) == min(start + block, length) - start
        assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_a_schedule_is_lladas_where_llada_has_one():
    """128 tokens, blocks of 32, 64 steps: two tokens a step; 10 tokens in 4 steps: 3, 3, 2, 2."""
    assert [n for *_, n in Unmasking(steps=64, block_length=32).schedule(128)] == [2] * 64
    assert Unmasking(steps=4).schedule(10) == [(0, 10, 3), (0, 10, 3), (0, 10, 2), (0, 10, 2)]
    assert Unmasking(block_length=3).schedule(7) == [(0, 3, 1)] * 3 + [(3, 6, 1)] * 3 + [(6, 7, 1)]


def test_the_default_order_is_the_published_one(words):
    assert decoding_settings(llada(words)).algorithm == "confidence"
    assert decoding_settings(dream(words)).algorithm == "entropy"
    assert decoding_settings(llama(words)) is None


# --- real architectures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token a word: four special ones, then w0 to w39."""
    return word_tokenizer((f"w{i}" for i in range(40)), special=("unk", "eos", "mask", "bos"))


def llada(tokenizer, **sizes) -> ProbedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 64, "init_std": 0.5} | sizes
    config = LLaDAConfig(vocab_size=44, mask_token_id=MASK_WORD, max_sequence_length=64, **sizes)
    return ProbedModel(LLaDAForMaskedDiffusion(config), tokenizer, objective="masked")


def dream(tokenizer) -> ProbedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = DreamConfig(vocab_size=44, mask_token_id=MASK_WORD, intermediate_size=64, initializer_range=0.5, **sizes)
    return ProbedModel(DreamForMaskedDiffusion(config), tokenizer, objective="masked")


def radd(tokenizer, encoding: str) -> ProbedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "initializer_range": 0.4, "max_length": 20}
    config = RaddConfig(vocab_size=44, mask_token_id=MASK_WORD, position_encoding=encoding, pad_token_id=None, **sizes)
    return ProbedModel(RaddForMaskedLM(config), tokenizer, objective="masked")


def llama(tokenizer, **options) -> ProbedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=44, initializer_range=0.5, **sizes, **options)
    return ProbedModel(LlamaForCausalLM(config), tokenizer, objective="causal")


def gpt2(tokenizer) -> ProbedModel:
    """Learned positions: padding on the left would move them."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=44, n_embd=32, n_head=2, n_layer=2, n_positions=32, initializer_range=0.5)
    return ProbedModel(GPT2LMHeadModel(config), tokenizer, objective="causal")


MASKED = {"llada": llada, "dream": dream} | {f"radd-{e}": lambda t, e=e: radd(t, e) for e in POSITION_ENCODINGS}


@pytest.mark.parametrize("build", MASKED.values(), ids=MASKED)
def test_a_padded_prompt_is_read_as_it_is_alone(build, words):
    """Log-probabilities at the answers of a padded batch against those of single rows, to 1e-5; then the answers."""
    model = build(words)
    model.module.eval()
    prompts, lengths = encode_prompts(model, PROMPTS), [5, 2, 4, 3]
    with torch.no_grad():
        texts = [p.blanks(n, MASK_WORD) for p, n in zip(prompts, lengths, strict=True)]
        batch = _Canvas(model, texts)
        assert batch.attention is not None, "these rows must need padding"
        row, at = batch.hidden.nonzero(as_tuple=True)
        together = batch._read(batch.run(), row, at)
        for i, text in enumerate(texts):
            one = _Canvas(model, [text])
            alone = one._read(one.run(), *one.hidden.nonzero(as_tuple=True))
            torch.testing.assert_close(together[row == i], alone, atol=1e-5, rtol=0)
    answers = decode(model, PROMPTS, max_new_tokens=lengths)
    assert answers == decode(model, PROMPTS, max_new_tokens=lengths, batch_size=1)
    assert len(set(answers)) > 1, "answers must depend on the prompt"


class NoMask(nn.Module):
    """A masked model that takes no attention mask, as research code often does."""

    shapes: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids):
        self.shapes.append(tuple(input_ids.shape))
        return self.inner(input_ids=input_ids).logits


def test_a_module_without_attention_mask_gets_batches_of_one_length(words):
    inner = llada(words)
    model = ProbedModel(NoMask(inner.module), words, objective="masked", mask_token_id=MASK_WORD, logit_shift=0)
    model.module.shapes.clear()
    prompts = [*PROMPTS, "w9 w9"]
    assert decode(model, prompts, max_new_tokens=3) == decode(inner, prompts, max_new_tokens=3)
    assert (2, 5) in model.module.shapes and {width for _, width in model.module.shapes} == {4, 5, 6, 10}


class IgnoresMask(NoMask):
    """Takes a mask, and lets padding reach real tokens all the same."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids)


class FromTheEnd(nn.Module):
    """A causal model without `generate` that counts positions from the end, so padding moves them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask=None):
        places = torch.arange(input_ids.shape[1]).flip(0)[None]
        return self.inner(input_ids=input_ids, position_ids=places).logits


@pytest.mark.parametrize(("kind", "build"), [(IgnoresMask, llada), (FromTheEnd, gpt2)])
def test_an_answer_does_not_depend_on_what_shares_its_batch_where_padding_counts(kind, build, words):
    """The signature says nothing: both take a mask."""
    inner = build(words)
    masked = {"mask_token_id": MASK_WORD, "logit_shift": 0} if build is llada else {}
    model = ProbedModel(kind(inner.module), words, objective=inner.objective, **masked)
    prompts = [*PROMPTS, *(f"w{n} w{n + 7}" for n in range(5, 30))]
    together = decode(model, prompts, max_new_tokens=6)
    assert model.contract.equal_lengths and len(set(together)) > 1
    assert together == [decode(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def alone_by_generate(model: ProbedModel, prompt: str, tokens: int) -> str:
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": END, "pad_token_id": END}
    with torch.no_grad():
        written = model.module.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)
    return answer_text(model, written[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_causal_decoding_equals_generate_row_by_row(build, words):
    """In batches of any size, with a length for each prompt; then the loop for modules that have no `generate`."""
    model, prompts = build(words), [*PROMPTS, "w30 w2", "w11", "w12 w3 w3"]
    lengths = [6, 3, 8, 5, 8, 8, 1]
    expected = [alone_by_generate(model, p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert len(set(expected)) > 4
    assert decode(model, prompts, max_new_tokens=lengths) == expected
    assert decode(model, prompts, max_new_tokens=lengths, batch_size=2) == expected
    bare = ProbedModel(NoMask(model.module), words, objective="causal")
    assert not hasattr(bare.module, "generate")
    assert decode(bare, prompts, max_new_tokens=lengths) == expected


def test_causal_decoding_through_peft_is_that_of_the_adapted_model(words):
    """The adapter is active, and peft's own `generate`, which rewrites the base's config, is not used."""
    from peft import LoraConfig, get_peft_model

    plain = llama(words)
    before = decode(plain, PROMPTS, max_new_tokens=6)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(plain.module, lora)
    kept = adapted.get_base_model().generation_config
    model = ProbedModel(adapted, words, objective="causal")
    found = decode(model, PROMPTS, max_new_tokens=6)
    assert found == [alone_by_generate(model, p, 6) for p in PROMPTS] != before
    assert adapted.get_base_model().generation_config is kept
    unwrapped = ProbedModel(adapted.get_base_model(), words, objective="causal")
    assert found == decode(unwrapped, PROMPTS, max_new_tokens=6), "as fine-tuning hands it to the probes"
    assert found == decode(ProbedModel(NoMask(adapted), words, objective="causal"), PROMPTS, max_new_tokens=6)


def test_learned_prompts_are_decoded_with(words):
    """They live in peft's wrapper: decoding the base would score a model that was never trained."""
    from peft import PromptTuningConfig, get_peft_model

    plain = llama(words)
    adapted = get_peft_model(plain.module, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    torch.nn.init.normal_(adapted.prompt_encoder["default"].embedding.weight)
    model = ProbedModel(adapted.eval(), words, objective="causal")
    assert decode(model, PROMPTS, max_new_tokens=3) == [prompted(adapted, words, prompt, 3) for prompt in PROMPTS]
    assert decode(model, PROMPTS, max_new_tokens=3) != decode(llama(words), PROMPTS, max_new_tokens=3)


def prompted(adapted, words, prompt: str, count: int) -> str:
    """Greedy, by peft's own forward pass, one token after the other."""
    ids = words(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(adapted(torch.tensor([ids])).logits[0, -1].argmax())]
    return words.decode(ids[start:])


def test_greedy_ignores_what_a_checkpoint_would_rather_do(words):
    """Qwen's files ask for sampling and a repetition penalty; greedy is the likeliest token, and the file is kept."""
    model = llama(words)
    expected = decode(model, PROMPTS, max_new_tokens=8)
    model.module.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, min_new_tokens=8)
    kept = model.module.generation_config.to_dict()
    assert decode(model, PROMPTS, max_new_tokens=8) == expected
    assert model.module.generation_config.to_dict() == kept


def test_a_transformer_lens_bridge_decodes_like_its_model(words):
    model = gpt2(words)
    bridge = ProbedModel(model.to_bridge(), words, objective="causal")
    assert decode(bridge, PROMPTS, max_new_tokens=5) == decode(model, PROMPTS, max_new_tokens=5)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_draws_follow_the_softmax_at_the_temperature():
    """4,000 draws of one token with known probabilities, against p^(1/T), to four standard errors."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    model = known(tabled({(0, word): float(q) for word, q in enumerate(p)}))
    count, temperature = 4000, 2.0
    drawn = decode_tokens(model, [Prompt((0,))] * count, [1] * count, Unmasking(temperature=temperature, seed=3))
    share = np.bincount([row[0] for row in drawn], minlength=WORDS) / count
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)).all(), (share, expected)


def test_draws_depend_on_the_seed_and_not_on_the_batch(words):
    options = {"max_new_tokens": 4, "temperature": 1.0}
    model = llada(words)
    first = decode(model, PROMPTS, seed=5, **options)
    assert first == decode(model, PROMPTS, seed=5, batch_size=1, **options)
    assert first != decode(model, PROMPTS, seed=6, **options)
    assert first != decode(model, PROMPTS, max_new_tokens=4)


# --- where an answer ends -------------------------------------------------------------------------------------------


def test_an_answer_ends_at_the_end_token_then_at_a_stop(words):
    model = llada(words)
    ids = words("w1 w2 w3 <eos> w4")["input_ids"]
    assert answer_text(model, ids) == "w1 w2 w3"
    assert answer_text(model, ids, ("w3", "w2")) == "w1"
    assert answer_text(model, ids[:3], ("w9",)) == "w1 w2 w3"
    assert answer_text(model, words("<bos> w1")["input_ids"]) == "<bos> w1", "other special tokens are no blanks"
    assert answer_text(model, [5, 44]) == "w1<44>", "an id beyond the vocabulary must not vanish"


def test_an_end_named_by_a_default_config_is_no_word(words):
    """LlamaConfig's eos is 2; a config's id counts where it is special to the tokenizer, as Llama 3's several are."""
    assert end_tokens(llama(words, eos_token_id=10)) == {END}
    assert end_tokens(llama(words, eos_token_id=[END, BEGIN])) == {END, BEGIN}
    assert end_tokens(llada(words, eos_token_id=MASK_WORD)) == {END}, "the mask is no end"
    assert end_tokens(llama(None, eos_token_id=10)) == {10}


def test_special_tokens_around_a_prompt_stand_where_the_tokenizer_puts_them(words):
    """A masked model sees [CLS] prompt, answer, [SEP]; a causal one writes on from the prompt."""
    around = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words.backend_tokenizer.to_str()))
    around.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BEGIN), ("<eos>", END)]
    )
    around.add_special_tokens({"mask_token": "<mask>", "bos_token": "<bos>", "eos_token": "<eos>"})
    assert encode_prompts(llada(around), ["w0 w1"]) == [Prompt((BEGIN, 4, 5), (END,))]
    assert encode_prompts(llama(around), ["w0 w1"]) == [Prompt((BEGIN, 4, 5))]


def test_byte_level_text_comes_back_without_the_blank_of_its_first_token():
    """In byte-level BPE the answer's first token carries the blank before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<mask>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>")
    model = ProbedModel(Known(pairwise(0)), tokenizer, objective="masked", mask_token_id=4, logit_shift=0, check=False)
    assert answer_text(model, tokenizer(" Zoë")["input_ids"]) == "Zoë"


# --- nothing is left behind, and mistakes are told ------------------------------------------------------------------


def trace(model: ProbedModel):
    module = model.module
    return (
        [m.training for m in module.modules()],
        [(p.requires_grad, p.grad is None) for p in module.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        str(module.config),
        str(getattr(module, "generation_config", None)),
        sorted(vars(module)),
    )


@pytest.mark.parametrize("build", [llada, dream, llama, gpt2])
def test_decoding_leaves_no_trace_also_when_it_raises(build, words, monkeypatch):
    """Train mode, dropout streams, config and generation config come out as they went in."""
    model = build(words)
    model.module.train()
    model.module.gradient_checkpointing_enable()
    before, options = trace(model), {} if model.objective == "causal" else {"temperature": 1.0}
    decode(model, PROMPTS, max_new_tokens=3, **options)
    assert trace(model) == before

    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(type(model.module), "forward", broken)
    with pytest.raises(ZeroDivisionError):
        decode(model, PROMPTS, max_new_tokens=3)
    assert trace(model) == before


def test_progress_counts_prompts(words):
    told = []
    decode(llada(words), PROMPTS, max_new_tokens=2, batch_size=3, progress=lambda *counts: told.append(counts))
    assert told == [(3, 4), (4, 4)]


def test_no_prompts_is_no_work(words):
    assert decode(llada(words), [], max_new_tokens=2) == []


MISTAKES = [
    ({"prompts": ["w1", ""]}, "prompt 1 .* has no token"),
    ({"prompts": "w1"}, "expected a list of texts"),
    ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ({"max_new_tokens": [3]}, "1 max_new_tokens for 2 prompts"),
    ({"max_new_tokens": 63}, "more than .* takes .64."),
    ({"steps": 0}, "steps 0: expected at least 1"),
    ({"steps": 1, "block_length": 2}, "every block takes at least one step"),
    ({"algorithm": "confidnce"}, "closest is 'confidence'"),
    ({"temperature": -1.0}, "temperature -1.0"),
    ({"stop": ("",)}, "ends every answer before it begins"),
    ({"batch_size": 0}, "batch_size=0"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_told_before_the_model_runs(options, message, words, monkeypatch):
    model = llada(words)
    monkeypatch.setattr(model, "logits", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(RevprobeError, match=message):
        decode(model, **({"prompts": ["w1 w2", "w3"], "max_new_tokens": 3} | options))


def test_settings_of_masked_models_are_refused_for_causal_ones(words):
    for name, value in {"steps": 4, "block_length": 2, "algorithm": "entropy", "temperature": 0.5}.items():
        with pytest.raises(RevprobeError, match=f"{name}=.*causal model decodes greedily"):
            decode(llama(words), ["w1"], max_new_tokens=3, **{name: value})


def test_broken_weights_and_missing_tokenizers_are_named(words):
    with pytest.raises(RevprobeError, match="has no tokenizer"):
        decode(llada(None), ["w1"], max_new_tokens=2)
    for build in (llada, lambda t: ProbedModel(NoMask(llama(t).module), t, objective="causal")):
        model = build(words)
        next(iter(model.module.parameters())).data.fill_(math.nan)
        with pytest.raises(RevprobeError, match="holds NaN"):
            decode(model, ["w1"], max_new_tokens=2)
