"""What is read is the query's own self-attention with the model's own weights, numbered by layer; all else is named."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from revprobe import ProbedModel, RevprobeError, edit_attention, probe_attention_correlation
from revprobe.hooks.layer_numbers import layer_numbers
from revprobe.models.structure import attention_of
from tiny import GROUPED, drawn, language_model, pairs_at, tapped

IDS = torch.tensor([[3, 7, 9, 11, 13, 2], [5, 8, 1, 30, 31, 4]])
EVERY = torch.arange(6).expand(2, -1)
D = 8


class Model(nn.Module):
    """Blocks with residuals over tokens and positions; `attend(q, k, v)` is what a block does."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(56, D), nn.Embedding(32, D)
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(D, 56)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, attend: Callable[..., torch.Tensor], heads: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in "qkv")
        self.attend, self.heads = attend, heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cut = lambda y: y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)  # noqa: E731
        mixed = self.attend(*(cut(part(x)) for part in (self.q, self.k, self.v)))
        return mixed.transpose(1, 2).reshape(x.shape)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


def looped(q, k, v):
    return torch.cat([F.scaled_dot_product_attention(*(t[:, [h]] for t in (q, k, v))) for h in range(q.shape[1])], 1)


def folded(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return (torch.bmm(q, k.mT) * q.shape[-1] ** -0.5).softmax(-1).bmm(v).view(-1, 2, *v.shape[1:])


def heads_first(q, k, v):
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return (F.softmax(scores(q, k), dim=-1) @ v).transpose(0, 1)


def rows_first(q, k, v):
    logits = torch.einsum("bhid,bhjd->ijbh", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("ijbh,bhjd->bhid", logits.softmax(1), v)


READ = {
    "sdpa": F.scaled_dot_product_attention,
    "heads one after the other": looped,
    "heads folded into the batch": folded,
    "heads first": heads_first,
    "rows and keys first": rows_first,
    "log-softmax": lambda q, k, v: F.log_softmax(scores(q, k), -1).exp() @ v,
    "each row's largest taken off": lambda q, k, v: (
        ((s := scores(q, k)) - s.max(dim=-1, keepdim=True).values).softmax(-1) @ v
    ),
}


def made(*attend: Callable[..., torch.Tensor]) -> ProbedModel:
    module = drawn(lambda: Model([Block(one) for one in attend]), scale=0.5)
    return ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)


def by_hand(model: ProbedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and weights of every layer from plain products, whatever the blocks do."""
    module, found = model.module, []
    with torch.no_grad():
        x = module.embed(IDS) + module.place(torch.arange(6))
        for block in module.blocks:
            q, k = (part(x).view(2, 6, 2, -1).transpose(1, 2) for part in (block.q, block.k))
            found.append((scores(q, k), scores(q, k).softmax(-1)))
            x = x + block(x)
    return found


@pytest.mark.parametrize("way", READ)
def test_scores_and_weights_are_the_plain_ones_however_the_attention_is_written(way):
    """Read in another layout, or numbered by call, this turns red; the second layer is SDPA (mixed sources)."""
    model = made(READ[way], F.scaled_dot_product_attention)
    with torch.no_grad(), tapped(model, EVERY, EVERY, 6) as tap:
        model.logits(IDS)
    assert list(tap.layers()) == [0, 1]
    for call, (score, weight) in zip(tap.layers().values(), by_hand(model), strict=True):
        torch.testing.assert_close(call.score, score, atol=1e-5, rtol=0)
        torch.testing.assert_close(call.weight, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", READ)
def test_one_edited_head_moves_the_logits_alike_however_the_attention_is_written(way):
    found = []
    for attend in (READ[way], F.scaled_dot_product_attention):
        model = made(attend, attend)
        with torch.no_grad(), edit_attention(model, [[2], [3]], [[0], [1]], layers=[0], heads=[1]):
            found.append(model.logits(IDS))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)  # of logits around 10
    with torch.no_grad():
        assert (found[0] - model.logits(IDS)).abs().max() > 1e-4


def by_exponentials(q, k, v):
    weights = scores(q, k).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def gated(q, k, v):
    return scores(q, k).softmax(-1) * 0.7 @ v


def shifted(q, k, v):
    return F.scaled_dot_product_attention(q, k.roll(1, 2), v.roll(1, 2))


class ThreeHeads(nn.Module):
    """Heads before sequences in every product, and as many of them as a look has sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(12, D)

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part(x).unflatten(-1, (3, 4)).permute(2, 0, 1, 3) for part in (self.q, self.k, self.v)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        return self.o((scores(q, k).softmax(-1) @ v).permute(1, 2, 0, 3).flatten(2))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_heads_are_told_from_sequences_where_there_are_as_many(batch):
    module = drawn(lambda: Model([ThreeHeads()]), scale=0.5)
    model = ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)
    ids, every = torch.arange(10, 10 + 6 * batch).view(batch, 6), torch.arange(6).expand(batch, -1)
    with torch.no_grad(), tapped(model, every, every, 6) as tap:
        model.logits(ids)
        q, k, _ = module.blocks[0].heads(module.embed(ids) + module.place(torch.arange(6)))
    torch.testing.assert_close(tap.layers()[0].weight, scores(q, k).softmax(-1).transpose(0, 1), atol=1e-5, rtol=0)


def test_two_calls_of_the_same_queries_and_keys_under_other_masks_are_two():
    """Of the same queries and keys alone a second call was taken for a repeat of the first, and not shown."""

    def windows(q, k, v):
        near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1).triu(-1)
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v, attn_mask=near)

    reading = probe_attention_correlation(made(windows), pairs_at((2, 5), (5, 2)))
    assert sorted(reading.frame["head"].unique()) == [0, 1, 2, 3]


def kept_largest(weights):
    best = weights.topk(2, -1)
    kept = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
    return kept / kept.sum(-1, keepdim=True)


def decayed(weights):
    places = torch.arange(weights.shape[-1])
    return weights * 0.7 ** (places - places[:, None]).abs()


# What leaves a one where it is, and changes all other weights.
CHANGES = {
    "the two largest kept": kept_largest,
    "squared": lambda weights: weights**2 / (weights**2).sum(-1, keepdim=True),
    "decayed": decayed,
    "averaged over heads": lambda weights: weights.mean(1, keepdim=True).expand_as(weights),
    "clipped": lambda weights: (1.2 * weights - 0.1).clamp(0, 1),
    "small ones dropped": lambda weights: weights * (weights > 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_changed_after_the_softmax_are_not_read(change):
    changed = lambda q, k, v: CHANGES[change](scores(q, k).softmax(-1)) @ v  # noqa: E731
    reading = probe_attention_correlation(made(changed, F.scaled_dot_product_attention), pairs_at((2, 5), (5, 2)))
    assert reading.frame[reading.frame.layer == 0].weight_forward.isna().all(), change
    assert reading.frame[reading.frame.layer == 1].weight_forward.notna().all()


@pytest.mark.parametrize(
    ("attend", "reason"),
    [(by_exponentials, "come from no softmax that is seen"), (gated, "changed before they meet the values")],
)
def test_a_layer_that_cannot_be_read_is_nan_with_its_reason_and_the_others_stand(attend, reason):
    model = made(attend, F.scaled_dot_product_attention)
    reading = probe_attention_correlation(model, pairs_at((2, 5), (5, 2)))
    unread = reading.frame[reading.frame.layer == 0]
    assert unread.score_forward.isna().all() and unread.reason.str.contains(reason).all()
    assert reading.frame[reading.frame.layer == 1].score_forward.notna().all()
    assert any(reason in why for why in reading.meta["left_out"].values())
    with pytest.raises(RevprobeError, match="no attention"):
        attention_of(made(attend))


def test_shifted_keys_and_an_encoder_decoder_are_refused():
    with pytest.raises(RevprobeError, match="shifted"):
        attention_of(made(shifted))
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 54}
    ends = {"vocab_size": 56, "pad_token_id": 55, "bos_token_id": 54, "eos_token_id": 54, "forced_eos_token_id": None}
    for config, kind in (
        (transformers.MBartConfig(**sizes, **heads, **ends), transformers.MBartForConditionalGeneration),
        (transformers.PLBartConfig(**sizes, **heads, **ends), transformers.PLBartForConditionalGeneration),
    ):
        for attention in ("eager", "sdpa"):
            module = drawn(
                lambda config=config, kind=kind, a=attention: kind._from_config(config, attn_implementation=a)
            )
            model = ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0, check=False)
            with pytest.raises(RevprobeError, match="cross attention"):
                attention_of(model)


def test_a_sink_takes_its_part_of_the_weight():
    """gpt-oss adds a learned logit to each row: against its own output_attentions."""
    config = transformers.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    module = drawn(lambda: language_model(config, attn_implementation="eager"))
    with torch.no_grad(), tapped(module, EVERY, EVERY, 6) as tap:
        own = module(IDS, output_attentions=True).attentions
    assert len(own) == 2 and float(own[0].sum(-1).max()) < 0.999
    for call, weight in zip(tap.layers().values(), own, strict=True):
        torch.testing.assert_close(call.weight, weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(call.mass, weight.sum(-1), atol=1e-5, rtol=0)


def test_a_cap_is_in_the_scores_that_are_read():
    config = transformers.Gemma2Config(**GROUPED, attn_logit_softcapping=0.5, query_pre_attn_scalar=8)
    module = drawn(lambda: language_model(config, attn_implementation="eager"), scale=0.5)
    with torch.no_grad(), tapped(module, EVERY, EVERY, 6) as tap:
        own = module(IDS, output_attentions=True).attentions
    for call, weight in zip(tap.layers().values(), own, strict=True):
        assert call.score[call.score.isfinite()].abs().max() <= 0.5
        torch.testing.assert_close(call.weight, weight, atol=1e-5, rtol=0)


def test_lists_that_run_one_after_the_other_are_numbered_on_and_those_side_by_side_alike():
    class Two(nn.Module):
        def __init__(self, side_by_side: bool) -> None:
            super().__init__()
            self.one, self.two = (nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)) for _ in range(2))
            self.side_by_side = side_by_side

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order = [*zip(self.one, self.two, strict=True)] if self.side_by_side else [self.one, self.two]
            for part in order:
                for block in part:
                    x = block(x)
            return x

    for side_by_side, expected in ((False, [0, 1, 2, 3]), (True, [0, 1, 0, 1])):
        model = Two(side_by_side)
        numbers = layer_numbers(model, lambda model=model: model(torch.ones(1, 2)))
        assert [numbers(f"{name}.{n}.0.weight") for name in ("one", "two") for n in range(2)] == expected


def test_a_look_costs_three_runs_and_is_taken_once():
    model, runs = made(F.scaled_dot_product_attention), []
    handle = model.module.register_forward_pre_hook(lambda _, args: runs.append(tuple(args[0].shape)))
    for _ in range(3):
        attention_of(model)
    handle.remove()
    assert runs == [(3, 11)] * 3


def last_key_first(attend):
    """Attention whose keys and values are those of the token before."""
    return lambda q, k, v: attend(q, k.roll(1, 2), v.roll(1, 2))


def by_matrix(q, k, v):
    return scores(q, k).softmax(-1) @ v


@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, by_matrix])
@pytest.mark.parametrize("still", [("q.weight", "q.bias"), ("q.weight",), ("k.weight",)])
def test_what_constants_hide_is_looked_at_again_once_the_weights_have_moved(attend, still):
    """Zero-initialised queries score every key alike, whatever they are made from: nothing is concluded for good."""
    model, sound = made(last_key_first(attend)), made(attend)
    for one in (model, sound):
        for name in still:
            one.module.blocks[0].get_parameter(name).data.zero_()
        assert attention_of(one).heads == {0: 2} and not attention_of(one).told
    for one in (model, sound):
        for name in still:
            one.module.blocks[0].get_parameter(name).data.normal_()
    assert attention_of(sound).told and attention_of(sound) is attention_of(sound)
    with pytest.raises(RevprobeError, match="shifted"):
        attention_of(model)


class TwoStreams(Model):
    """The second block takes its keys from the embedding alone, as from an encoder of the same tokens."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        start = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        first, second = self.blocks
        x = start + self.head(first(start))[..., :D]
        cut = lambda y: y.view(*y.shape[:2], 2, -1).transpose(1, 2)  # noqa: E731
        mixed = second.attend(*(cut(part(y)) for part, y in ((second.q, x), (second.k, start), (second.v, start))))
        return self.head(x + mixed.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, by_matrix])
def test_a_first_layer_that_writes_nothing_yet_tells_no_streams_apart(attend):
    module = drawn(lambda: TwoStreams([Block(attend), Block(attend)]), scale=0.5)
    model = ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)
    module.blocks[0].v.weight.data.zero_()  # every token reads the same
    assert not attention_of(model).told
    module.blocks[0].v.weight.data.normal_()
    with pytest.raises(RevprobeError, match="cross attention"):
        attention_of(model)


def test_a_reading_of_a_batch_that_attends_in_blocks_says_so():
    """The look, over 11 tokens, sees whole rows; a longer query is cut into blocks."""

    def blocks(q, k, v):
        if q.shape[2] < 12:
            return F.scaled_dot_product_attention(q, k, v)
        cut = lambda t: t.unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)  # noqa: E731
        mixed = F.scaled_dot_product_attention(*(cut(t) for t in (q, k, v)))
        return mixed.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)

    model, ids = made(blocks), torch.arange(32).view(2, 16)
    at = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad(), tapped(model, at, at, 16) as tap:
        model.logits(ids)
    with pytest.raises(RevprobeError, match="blocks, pooling or padding"):
        tap.layers()


def test_a_pooled_layer_is_left_out_and_the_others_keep_their_numbers():
    """Funnel: a whole block, a pooled one, and a decoder layer over all tokens, numbered on."""
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1], "num_decoder_layers": 1}
    config = transformers.FunnelConfig(vocab_size=56, **sizes)
    module = drawn(lambda: language_model(config, "masked"))
    with torch.no_grad(), tapped(module, EVERY, EVERY, 6) as tap:
        own = module(IDS, output_attentions=True).attentions
    layers = tap.layers()
    assert list(layers) == [0, 2] and "pooling" in tap.attention.without[1]
    for layer, call in layers.items():
        torch.testing.assert_close(call.weight, own[layer], atol=1e-6, rtol=0)


def test_a_reading_of_differential_attention_has_each_head_once():
    """DiffLlama calls SDPA twice with the same queries and keys: against its eager weights."""
    module = drawn(lambda: language_model(transformers.DiffLlamaConfig(**GROUPED), attn_implementation="sdpa"))
    eager = drawn(lambda: language_model(transformers.DiffLlamaConfig(**GROUPED), attn_implementation="eager"))
    with torch.no_grad(), tapped(module, EVERY, EVERY, 6) as tap:
        module(IDS)
        own = eager(IDS, output_attentions=True).attentions
    for call, weight in zip(tap.layers().values(), own, strict=True):
        torch.testing.assert_close(call.weight, weight, atol=1e-5, rtol=0)
