"""What a model does with its weights beyond the tokens of the look: the tap sees it in the run that it reads."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from long_cases import rest_long
from torch import nn

from revprobe import ProbedModel, Query, ReversalPair, ReversalPairs, RevprobeError, probe_attention_correlation
from revprobe.hooks.attention_look import CHANGED, OUTPUT
from revprobe.models.structure import attention_of
from tiny import GROUPED, drawn, language_model, tapped

D, SHORT, LONG = 8, 12, 20
EVERY = torch.arange(LONG).expand(2, -1)


class Block(nn.Module):
    def __init__(self, attend) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in "qkv")
        self.attend = attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, attends) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(56, D), nn.Embedding(32, D), nn.Linear(D, 56)
        self.blocks = nn.ModuleList(map(Block, attends))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def made(*attends) -> ProbedModel:
    module = drawn(lambda: Model(attends), scale=0.5)
    return ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)


def weighed(q, k):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def window(w):
    w = w * torch.ones_like(w).triu(1 - SHORT).tril(SHORT - 1)
    return w / w.sum(-1, keepdim=True)


def window_written_in(w):
    return w.mul_(torch.ones_like(w).triu(1 - SHORT).tril(SHORT - 1))


def largest_written_in(w):
    return w.masked_fill_(w < w.topk(SHORT, -1).values[..., -1:], 0.0)


CHANGES = {
    "a window": window,
    "a window, written into the weights": window_written_in,
    "the largest kept": lambda w: w * (w >= w.topk(SHORT, -1).values[..., -1:]),
    "the largest kept, written into the weights": largest_written_in,
    "a gate": lambda w: w * 0.9,
    "averaged over heads": lambda w: w.mean(1, keepdim=True).expand_as(w),
    "heads in another order": lambda w: w.flip(1),
    "sharpened": lambda w: w**2 / (w**2).sum(-1, keepdim=True),
}


def changed(change, always: bool, q, k, v):
    w = weighed(q, k)
    return (change(w) if always or w.shape[-1] > SHORT else w) @ v


def folded(change, q, k, v):
    w = weighed(q, k)
    return ((change(w) if w.shape[-1] > SHORT else w).flatten(0, 1) @ v.flatten(0, 1)).unflatten(0, v.shape[:2])


def logged(change, q, k, v):
    w = F.log_softmax(q @ k.mT * q.shape[-1] ** -0.5, -1).exp()
    return torch.einsum("bhij,bhjd->bhid", change(w) if w.shape[-1] > SHORT else w, v)


def pairs(length: int, target: int, evidence: int) -> ReversalPairs:
    found = []
    for fact in range(3):
        one = [10 + (3 * place + 7 * fact) % 40 for place in range(length)]
        other = [*one]
        other[target], other[evidence] = one[evidence], one[target]
        queries = Query(one, [target], [evidence]), Query(other, [evidence], [target])
        found.append(ReversalPair(*queries, kind="same_target", fact=str(fact)))
    return ReversalPairs.from_pairs(found)


@pytest.mark.parametrize("batch_size", rest_long([4, 1]))
@pytest.mark.parametrize("in_folds", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_long_queries_alone_have_changed_are_not_read_of_them(change, in_folds, batch_size):
    """Evidence 17 tokens off, outside a window, had weight 0.05; of queries within the window all stands."""
    attend = partial(folded, CHANGES[change]) if in_folds else partial(changed, CHANGES[change], False)
    model = made(attend, F.scaled_dot_product_attention)
    short = probe_attention_correlation(model, pairs(SHORT, 1, 9), control=False, batch_size=batch_size)
    assert short.frame.weight_forward.notna().all() and "left_out" not in short.meta
    long = probe_attention_correlation(model, pairs(LONG, 1, 18), control=False, batch_size=batch_size)
    rows = long.frame[long.frame.layer == 0]
    assert rows[["weight_forward", "weight_reverse", "score_forward"]].isna().all(axis=None), change
    assert rows.reason.str.contains(CHANGED, regex=False).all()
    assert long.frame[long.frame.layer == 1].weight_forward.notna().all()
    assert long.meta["left_out"] == {"blocks.0": CHANGED}


@pytest.mark.parametrize("change", ["a window, written into the weights", "the largest kept, written into the weights"])
def test_what_is_written_into_the_weights_at_any_length_is_seen(change):
    """The look remembered the very tensor that was written into."""
    narrow = {"a window, written into the weights": lambda w: w.mul_(torch.ones_like(w).triu(-2).tril(2))}
    change = narrow.get(change, lambda w: w.masked_fill_(w < w.topk(3, -1).values[..., -1:], 0.0))
    found = attention_of(made(partial(changed, change, True), F.scaled_dot_product_attention))
    assert dict(found.left_out) == {"blocks.0": CHANGED} and found.heads == {1: 2}


def same(w):
    return w


SOUND = {
    "plain": partial(changed, same, True),
    "a copy": partial(changed, torch.clone, True),
    "folded": partial(folded, same),
    "logarithms": partial(logged, same),
    "keys first": lambda q, k, v: (v.mT @ weighed(q, k).mT).mT,
    "rows and keys first": lambda q, k, v: torch.einsum(
        "ijbh,bhjd->bhid", torch.einsum("bhid,bhjd->ijbh", q, k).mul(q.shape[-1] ** -0.5).softmax(1), v
    ),
    "heads folded before": lambda q, k, v: (
        (q.flatten(0, 1) @ k.flatten(0, 1).mT * q.shape[-1] ** -0.5).softmax(-1).unflatten(0, q.shape[:2]) @ v
    ),
    "sdpa": F.scaled_dot_product_attention,
}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("way", SOUND)
def test_long_queries_are_read_however_their_weights_meet_the_values(way, batch):
    model, ids = made(SOUND[way]), torch.arange(batch * LONG).view(batch, LONG) % 50
    every = torch.arange(LONG).expand(batch, -1)
    with torch.no_grad(), tapped(model, every, every, LONG) as tap:
        model.logits(ids)
        x = model.module.embed(ids) + model.module.place(torch.arange(LONG))
        block = model.module.blocks[0]
        q, k = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (block.q, block.k))
    torch.testing.assert_close(tap.layers()[0].weight, weighed(q, k), atol=1e-5, rtol=0)


def test_an_sdpa_call_of_another_form_is_held_against_its_own_output():
    """Once for each longer batch: in the same form torch's own function does the same to other numbers."""

    def dropped(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 * (q.shape[2] > SHORT))

    model = made(dropped, F.scaled_dot_product_attention)
    for length, left_out in ((SHORT, {}), (LONG, {"blocks.0": OUTPUT}), (SHORT, {})):
        every = torch.arange(length).expand(2, -1)
        with torch.no_grad(), tapped(model, every, every, length) as tap:
            model.logits(EVERY[:, :length])
        assert tap.left_out == left_out and list(tap.layers()) == [0, 1][len(left_out) :]
    assert attention_of(model).reproduced == {("blocks.0", 0): SHORT, ("blocks.1", 0): LONG}


SOUND_AND_CHANGED = (partial(changed, same, True), partial(changed, window, False))


@pytest.mark.parametrize("runs", [SOUND_AND_CHANGED, SOUND_AND_CHANGED[::-1]], ids=["changed last", "changed first"])
def test_of_several_runs_inside_a_tap_none_answers_for_one_that_is_not_read(runs):
    model = made(partial(changed, window, False))
    at = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad(), tapped(model, at, at, LONG) as tap:
        for attend in runs:
            model.module.blocks[0].attend = attend
            model.logits(EVERY)
    with pytest.raises(RevprobeError, match="changed before they meet the values"):
        tap.layers()


WINDOWS = {
    "mistral": (transformers.MistralConfig, {"sliding_window": 5}),
    "qwen2": (transformers.Qwen2Config, {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}),
    "gemma2": (transformers.Gemma2Config, {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gpt-oss": (transformers.GptOssConfig, {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


# The others have sinks or caps, which SDPA has not.
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "eager") for name in WINDOWS), ("mistral", "sdpa"), ("qwen2", "sdpa")]
)
def test_a_window_that_is_in_the_mask_is_read_as_the_model_has_it(name, attention):
    """Padded as well: what stands behind the real tokens of a row is none of what is read."""
    kind, sizes = WINDOWS[name]
    config = kind(**GROUPED, **sizes)
    module = drawn(lambda: language_model(config, attn_implementation=attention))
    eager = drawn(lambda: language_model(config, attn_implementation="eager"))
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, 15:] = 0
    rows, columns = torch.tensor([[19, 9, 3], [14, 9, 3]]), EVERY
    with torch.no_grad(), tapped(module, rows, columns, LONG) as tap:
        module(EVERY, attention_mask=mask)
        own = eager(EVERY, attention_mask=mask, output_attentions=True).attentions
    layers = tap.layers()
    assert len(layers) == len(own) and float(own[0][0, 0, 19, 2]) == 0.0 < float(own[0][0, 0, 19, 16])
    for layer, weight in enumerate(own):
        for row in range(2):
            torch.testing.assert_close(layers[layer].weight[row], weight[row][:, rows[row]], atol=1e-5, rtol=0)
