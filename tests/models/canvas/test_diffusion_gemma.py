"""DiffusionGemma, loaded and run as one sequence, against the stored outputs of transformers' class and a slow forward.

The reference's canvas is called apart from its prompt, the last prompt is left-padded; here both forms are tried. Seen:
below 6e-6 in float32. `slow_gemma.py` is a forward pass of its own, in float64.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from long_cases import rest_long
from safetensors.torch import load_file, save_file
from slow_gemma import SlowGemma
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

import revprobe as rp
from revprobe.models.canvas.noise import drawn_tokens
from revprobe.models.structure import attention_of
from tiny import FIXTURES, drawn, tapped

CLOSE = 2e-5
FIXTURE = FIXTURES / "diffusiongemma-tiny"
PROMPT, CANVAS = 10, 8  # tokens, of the reference


@cache
def reference() -> dict[str, Tensor]:
    return load_file(FIXTURE / "reference.safetensors")


@cache
def loaded() -> rp.ProbedModel:
    return rp.load_model(FIXTURE)


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def checkpoint(folder: Path, seed: int, **changed: object) -> Path:
    """A checkpoint of transformers' class, its sizes drawn by the seed, every weight and buffer off its first value."""
    draw = torch.Generator().manual_seed(seed)
    one_of = lambda *choices: choices[int(torch.randint(len(choices), (), generator=draw))]  # noqa: E731
    layers = one_of(1, 2, 3, 4)
    kinds = [one_of("sliding_attention", "full_attention") for _ in range(layers - 1)] + ["full_attention"]
    text = {
        "vocab_size": one_of(61, 90, 128),
        "hidden_size": one_of(16, 24, 40),
        "intermediate_size": one_of(20, 32),
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "num_attention_heads": 4,
        "num_key_value_heads": one_of(1, 2, 4),
        "num_global_key_value_heads": one_of(1, 2, None),
        "head_dim": one_of(8, 12),
        "global_head_dim": one_of(8, 16, 24),
        "sliding_window": one_of(2, 3, 5, 8),
        "num_experts": one_of(3, 4, 6),
        "top_k_experts": one_of(1, 2, 3),
        "moe_intermediate_size": one_of(8, 12),
        "max_position_embeddings": 64,
        "final_logit_softcapping": one_of(30.0, 5.0),
        "use_bidirectional_attention": one_of("vision", None),
    }
    vision = json.loads((FIXTURE / "config.json").read_text())["vision_config"]
    length = one_of(3, 5, 8, 11)
    settings = {"text_config": text | changed, "vision_config": vision, "canvas_length": length, "image_token_id": 60}
    module = drawn(lambda: DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**settings)), seed=seed, scale=0.2)
    for name, buffer in module.named_buffers():
        if name.endswith("layer_scalar"):
            buffer += 0.3 * torch.rand(1)
    module.save_pretrained(folder)
    return folder


def slow_of(folder: Path) -> SlowGemma:
    return SlowGemma(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()))


# --- parity ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_the_reference_called_as_transformers_class() -> None:
    module, expected = loaded().module, reference()
    prompt, canvas = expected["input_ids"], expected["decoder_input_ids"]
    bare = module(prompt, decoder_input_ids=canvas)
    assert largest(bare.logits, expected["logits_nomask"]) < CLOSE
    assert largest(bare.encoder_last_hidden_state, expected["encoder_last_hidden_state"]) < CLOSE
    masks = {key: expected[key] for key in ("attention_mask", "position_ids", "decoder_attention_mask")}
    padded = module(prompt, decoder_input_ids=canvas, **masks, decoder_position_ids=expected["decoder_position_ids"])
    assert largest(padded.logits, expected["logits"]) < CLOSE
    kept = expected["attention_mask"][-1].bool()
    alone = module(prompt[-1:, kept], decoder_input_ids=canvas[-1:])
    assert largest(alone.logits[0], expected["logits_last_row_alone"]) < CLOSE
    again = module(prompt, decoder_input_ids=canvas, self_conditioning_logits=expected["logits_nomask"])
    assert largest(again.logits, expected["logits_self_conditioned"]) < CLOSE


@torch.no_grad()
def test_logits_equal_the_reference_as_one_sequence_and_are_none_in_the_prompt() -> None:
    """The wrapper gives whole sequences, the mask says where the canvas begins; left padding is no token."""
    model, expected = loaded(), reference()
    ids = torch.cat([expected["input_ids"], expected["decoder_input_ids"]], 1)
    marks = torch.cat([expected["attention_mask"], torch.full((3, CANVAS), 2)], 1)
    logits = model.logits(ids, marks)
    assert largest(logits[:, PROMPT:], expected["logits"]) < CLOSE
    assert logits[:, :PROMPT].isneginf().all()
    assert (model.objective, model.logit_shift, model.canvas_length, model.draws) == ("masked", 0, 8, 8)
    assert "canvas of 8 tokens behind a prompt, 8 draws of random tokens" in repr(model)


@torch.no_grad()
def test_scores_equal_the_references_decoder_and_encoder_in_every_layer_and_head() -> None:
    model, expected = loaded(), reference()
    ids = torch.cat([expected["input_ids"], expected["decoder_input_ids"]], 1)[:1]
    marks = torch.tensor([[1] * PROMPT + [2] * CANVAS])
    everywhere = torch.arange(PROMPT + CANVAS)[None]
    with tapped(model, everywhere, everywhere, PROMPT + CANVAS) as tap:
        model.logits(ids, marks)
    layers = tap.layers()
    assert sorted(layers) == [0, 1]
    for layer, call in layers.items():
        decoder, encoder = expected[f"decoder_scores_row0.{layer}"], expected[f"encoder_scores_row0.{layer}"]
        own = call.score[0, :, PROMPT:, -decoder.shape[-1] :]
        assert own.shape == decoder.shape and largest(own, decoder) < CLOSE
        assert call.score[0, :, PROMPT:, : -decoder.shape[-1]].isneginf().all(), "beyond the window"
        prompt = call.score[0, :, :PROMPT, :PROMPT]
        seen = prompt.isfinite()
        assert largest(prompt[seen], encoder[seen]) < CLOSE
        assert not seen.triu(1).any() and call.score[0, :, :PROMPT, PROMPT:].isneginf().all()
        sizes = (torch.arange(PROMPT) + 1).clamp(max=6 if layer == 0 else PROMPT)
        assert torch.equal(seen[0].sum(-1), sizes), "a sliding layer sees the last six"


@pytest.mark.parametrize("seed", rest_long(range(7), 3))
@torch.no_grad()
def test_random_sizes_equal_a_slow_forward_and_transformers(tmp_path: Path, seed: int) -> None:
    """Prompts longer and shorter than the window, canvases shorter than the model's, of its length and longer."""
    folder = checkpoint(tmp_path / "model", seed)
    model, slow = rp.load_model(folder), slow_of(folder)
    native = DiffusionGemmaForBlockDiffusion.from_pretrained(folder)
    for prompt_length, canvas_length in ((1, model.canvas_length), (6, 2), (9, model.canvas_length + 2)):
        ids = torch.randint(model.vocab_size, (2, prompt_length + canvas_length))
        expected = native(ids[:, :prompt_length], decoder_input_ids=ids[:, prompt_length:]).logits
        marks = torch.tensor([[1] * prompt_length + [2] * canvas_length] * 2)
        everywhere = torch.arange(ids.shape[1]).expand(2, -1)
        with tapped(model, everywhere, everywhere, ids.shape[1]) as tap:
            logits = model.logits(ids, marks)[:, prompt_length:]
        assert largest(logits, expected) < CLOSE
        for row in range(2):
            assert largest(logits[row], slow.canvas(ids[row, :prompt_length], ids[row, prompt_length:])) < 5e-5
            for layer, call in tap.layers().items():
                own, theirs = call.score[row, :, prompt_length:], slow.scores[layer]
                assert torch.equal(own.isfinite(), theirs.isfinite())
                seen = own.isfinite()
                assert largest(own[seen], theirs[seen]) < 1e-4


@torch.no_grad()
def test_the_encoders_own_scalars_are_felt_from_the_third_layer_on(tmp_path: Path) -> None:
    """A norm takes the first layer's out of the keys of the second, and the fixture has no third to show them."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    folder = checkpoint(tmp_path / "model", 0, num_hidden_layers=3, layer_types=kinds)
    prompt, canvas = torch.arange(10, 15)[None], torch.arange(20, 23)[None]
    before = rp.load_model(folder).module(prompt, decoder_input_ids=canvas).logits
    tensors = load_file(folder / "model.safetensors")
    tensors["model.encoder.language_model.layers.0.layer_scalar"] *= 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    after = rp.load_model(folder).module(prompt, decoder_input_ids=canvas).logits
    native = DiffusionGemmaForBlockDiffusion.from_pretrained(folder)
    assert largest(after, native(prompt, decoder_input_ids=canvas).logits) < CLOSE
    assert largest(after, before) > 1e-3


@torch.no_grad()
def test_both_styles_of_config_load_and_what_is_saved_is_read_by_transformers(tmp_path: Path) -> None:
    model, expected = loaded(), reference()
    model.module.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert "per_layer_config" in text and "global_head_dim" not in text
    again = rp.load_model(tmp_path)
    ids = torch.cat([expected["input_ids"][:, :1], expected["decoder_input_ids"]], 1)
    assert torch.equal(again.logits(ids), model.logits(ids))
    same = ("objective", "mask_token_id", "logit_shift", "canvas_length", "draws", "vocab_size")
    assert [getattr(again, key) for key in same] == [getattr(model, key) for key in same]
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(FIXTURE / "model.safetensors").keys()
    native = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)
    found = native(expected["input_ids"], decoder_input_ids=expected["decoder_input_ids"]).logits
    assert largest(found, expected["logits_nomask"]) < CLOSE


def test_a_table_longer_than_the_config_says_counts(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["vocab_size"] = 190
    (folder / "config.json").write_text(json.dumps(settings))
    model = rp.load_model(folder)
    assert model.vocab_size == 200 and model.mask_token_id == 200
    ids = torch.arange(192, 201)[None]
    assert torch.equal(model.logits(ids), loaded().logits(ids))


# --- random tokens ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_places_hold_the_tokens_of_their_draw_whatever_shares_the_batch() -> None:
    model, hidden = loaded(), loaded().mask_token_id
    state = torch.random.get_rng_state()
    ids = torch.tensor([[2, 50, hidden + 3, 60, hidden + 3, 70], [2, 51, 61, hidden, hidden, 71]])
    noise = drawn_tokens(8, 8, 200)
    filled = ids.clone()
    filled[0, [2, 4]], filled[1, [3, 4]] = noise[3, [1, 3]], noise[0, [2, 3]]
    assert torch.equal(model.logits(ids), model.logits(filled))
    assert largest(model.logits(ids[:1])[:, 1:], model.logits(filled)[:1, 1:]) < CLOSE
    assert torch.equal(torch.random.get_rng_state(), state), "draws are private"


def test_tokens_are_uniform_and_a_draw_is_the_same_however_many_there_are() -> None:
    noise = drawn_tokens(400, 50, 10)
    counts = torch.bincount(noise.flatten(), minlength=10)
    assert counts.sum() == 20000 and (counts - 2000).abs().max() < 5 * (20000 * 0.1 * 0.9) ** 0.5
    by_place = torch.stack([torch.bincount(noise[:, place], minlength=10) for place in range(50)])
    assert (by_place - 40).abs().max() < 6 * 6, "each place of its own"
    assert torch.equal(noise[:3], drawn_tokens(3, 50, 10))
    assert not torch.equal(noise[0], noise[1])


def test_a_hidden_token_in_the_prompt_or_behind_the_canvas_is_an_error() -> None:
    model = loaded()
    with pytest.raises(rp.RevprobeError, match="a token is hidden outside the canvas, which has 8 tokens behind"):
        model.logits(torch.tensor([[200, 3, 4, 5]]))
    with pytest.raises(rp.RevprobeError, match="a token is hidden outside the canvas, which has 8 tokens behind"):
        model.logits(torch.tensor([[2, *range(3, 11), 200]]))


# --- what is listed, and refused --------------------------------------------------------------------------------------


def test_layers_are_the_decoders_and_the_encoder_is_listed_with_its_reason() -> None:
    attention = attention_of(loaded())
    assert [(site.layer, site.path, site.heads) for site in attention.sites] == [
        (layer, f"model.decoder.layers.{layer}.self_attn", 4) for layer in (0, 1)
    ]
    assert "run as the prompt's rows" in attention.left_out["model.encoder.language_model"]
    assert "reads images" in attention.left_out["model.encoder.vision_tower"]
    assert "run as the prompt's rows" in repr(rp.diagnose(loaded()))


def test_it_is_diagnosed_as_trustworthy(capfd: pytest.CaptureFixture[str]) -> None:
    found = rp.diagnose(FIXTURE)
    assert found.trustworthy, repr(found)
    assert "hidden by random tokens" in repr(found) and "a token of the canvas sees all of it" in repr(found)
    assert capfd.readouterr().err == ""


def test_it_is_listed_with_its_shift_and_attention() -> None:
    row = rp.list_models().set_index("name").loc["DiffusionGemma"]
    assert (row["objective"], row["attention"], row["shift"], row["noise"]) == ("masked", "full", 0, "uniform")


def copied(folder: Path) -> Path:
    shutil.copytree(FIXTURE, folder / "copy", ignore=shutil.ignore_patterns("reference.safetensors"))
    return folder / "copy"


def rewritten(folder: Path, **changed: object) -> None:
    settings = json.loads((folder / "config.json").read_text())
    text = {key: one for key, one in changed.items() if key in settings["text_config"] and key not in settings}
    settings = settings | {key: one for key, one in changed.items() if key not in text}
    settings["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(settings))


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.encoder.language_model.layers.1.layer_scalar"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_an_encoder_of_its_own(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = "encoder.language_model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {f"model.{key}": torch.ones(48, 32)}, folder / "model.safetensors", {"format": "pt"})


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:90000])


def truncated_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        own = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(own, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:40000])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_canvas(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    del settings["canvas_length"]
    (folder / "config.json").write_text(json.dumps(settings))


def another_family(folder: Path) -> None:
    shutil.copy(FIXTURES / "sdar-tiny" / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "asked", "words"),
    [
        (without_a_tensor, {}, r"missing model\.encoder\.language_model\.layers\.1\.layer_scalar;"),
        (with_an_encoder_of_its_own, {}, r"unexpected model\.encoder\.language_model\.layers\.0\.self_attn\.q_proj"),
        (truncated, {}, r"the file is cut off or no safetensors"),
        (truncated_shard, {}, r"00002-of-00002\.safetensors: .*; the file is cut off"),
        (pickled, {}, r"holds only pickled weights \(pytorch_model\.bin\)"),
        (another_family, {}, r"does not match its config"),
        (without_canvas, {}, r"lacks canvas_length; expected the published keys"),
        (lambda f: rewritten(f, vocab_size=210), {}, r"mismatched .*\(200, 32\) for \(210, 32\)"),
        (lambda f: rewritten(f, num_hidden_layers=1), {}, r"per_layer_config. keys must be integer layer indices"),
        (lambda f: rewritten(f, tie_word_embeddings=False), {}, r"tie_word_embeddings=False is not supported"),
        (lambda f: rewritten(f, use_bidirectional_attention="all"), {}, r"'all' is not supported, since a prompt"),
        (lambda f: None, {"draws": 0}, r"draws=0: expected at least 1 draw"),
        (lambda f: None, {"mask_token_id": 5}, r"mask_token_id=5: it has no mask token"),
        (lambda f: None, {"block_size": 4}, r"block_size=4: its canvas is one block, read as a whole"),
        (lambda f: None, {"objective": "causal"}, r"is DiffusionGemma, a masked model; leave objective out"),
    ],
)
def test_what_goes_wrong_first_is_one_line(tmp_path: Path, damage, asked: dict, words: str) -> None:
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(rp.RevprobeError, match=words) as error:
        rp.load_model(folder, **asked)
    assert "\n" not in str(error.value)
