"""LLaDA and Dream in the published layout: against the reference modelling code's own outputs, and by hand.

`tests/fixtures/` holds tiny checkpoints with logits and scores of the published code (float32, CPU, one thread). The
differences seen here are 0.0; the tolerance of 1e-5 is for machines that pick other kernels.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from long_cases import rest_long
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from revprobe import (
    ProbedModel,
    Query,
    ReversalPair,
    ReversalPairs,
    RevprobeError,
    load_model,
    probe,
    probe_attention_correlation,
    probe_gradient_cosine,
    probe_reverse_probability,
)
from revprobe.models.bases.configs import DreamConfig, LLaDAConfig
from revprobe.models.families.dream import DreamForMaskedDiffusion
from revprobe.models.families.llada import LLaDAForMaskedDiffusion, official_name
from tiny import FIXTURES, pairs_at, tapped

FOLDERS = ["llada-tiny", "llada-tiny-sharded", "dream-tiny"]
AUTO = [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM]
PAIRS = pairs_at((2, 5), (5, 2), count=8, length=8, vocab=240, ragged=True)


@pytest.fixture
def folder(tmp_path):
    """A copy of the LLaDA checkpoint to damage."""
    return Path(shutil.copytree(FIXTURES / "llada-tiny", tmp_path / "llada"))


def reference(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / name / "reference.safetensors")


@torch.no_grad()
def worst_logit_error(module, name: str) -> float:
    """Over valid positions with padding, and over all positions without a mask."""
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    padded = (module(ids, attention_mask=mask).logits - expected["logits"])[mask.bool()]
    return float(torch.cat([padded.flatten(), (module(ids).logits - expected["logits_nomask"]).flatten()]).abs().max())


# --- the reference's numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_the_published_codes_with_and_without_padding(name):
    model = load_model(FIXTURES / name)
    assert worst_logit_error(model.module, name) < 1e-5
    assert (model.objective, model.logit_shift) == ("masked", int(name.startswith("dream")))
    assert model.mask_token_id == model.module.config.mask_token_id


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_implementations_give_the_same_logits(name, implementation):
    assert worst_logit_error(load_model(FIXTURES / name, attn_implementation=implementation).module, name) < 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_the_taps_scores_equal_the_published_codes_in_every_layer_and_head(name):
    expected = reference(name)
    ids, scores = expected["input_ids"][:1], expected["scores_row0"]
    everywhere = torch.arange(ids.shape[1])[None]
    model = load_model(FIXTURES / name)
    with torch.no_grad(), tapped(model, everywhere, everywhere, everywhere.shape[1]) as tap:
        model.module(ids)
    seen = torch.stack([call.score[0] for _, call in sorted(tap.layers().items())])
    torch.testing.assert_close(seen, scores, atol=1e-5, rtol=0)


def test_two_tensors_of_one_shape_in_each_others_place_are_seen(folder):
    """The planted fault: a renaming that crosses the MLP's gate and up projections, or the query and the key."""
    for one, other in (("ff_proj", "up_proj"), ("q_proj", "k_proj")):
        weights = load_file(FIXTURES / "llada-tiny" / "model.safetensors")
        names = [f"model.transformer.blocks.0.{part}.weight" for part in (one, other)]
        weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert worst_logit_error(load_model(folder).module, "llada-tiny") > 1e-3


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_a_padded_batch_equals_its_rows_alone(name):
    model, pairs = load_model(FIXTURES / name), PAIRS
    together = probe(model, pairs, batch_size=16, control=False)
    alone = probe(model, pairs, batch_size=2, control=False)
    for reading, other in zip(together, alone, strict=True):
        columns = reading.frame.select_dtypes("number").columns
        torch.testing.assert_close(
            torch.tensor(reading.frame[columns].to_numpy(float)),
            torch.tensor(other.frame[columns].to_numpy(float)),
            atol=1e-5,
            rtol=1e-4,
            equal_nan=True,
        )


# --- the layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_saving_gives_back_the_published_names_tensors_and_config(name, shard, tmp_path):
    model = load_model(FIXTURES / name)
    model.module.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    saved, official = (
        {k: v for path in folder.glob("model*.safetensors") for k, v in load_file(path).items()}
        for folder in (tmp_path, FIXTURES / name)
    )
    assert saved.keys() == official.keys() and all(torch.equal(saved[k], official[k]) for k in official)
    written, published = (json.loads((f / "config.json").read_text()) for f in (tmp_path, FIXTURES / name))
    differ = {key for key in published if written.get(key) != published[key]}
    assert differ <= {"architectures", "transformers_version", "torch_dtype", "use_cache", "rope_scaling"}
    assert worst_logit_error(load_model(tmp_path).module, name) < 1e-5


def test_a_folder_with_llamas_own_names_loads_too(tmp_path):
    load_model(FIXTURES / "llada-tiny").module.save_pretrained(tmp_path, save_original_format=False)
    assert "model.embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert worst_logit_error(load_model(tmp_path).module, "llada-tiny") < 1e-5


def test_every_tensor_has_an_official_name():
    """The names in error messages are those of the renaming that loads and saves."""
    ours = dict(load_model(FIXTURES / "llada-tiny").module.named_parameters())
    assert {official_name(name) for name in ours} == set(load_file(FIXTURES / "llada-tiny" / "model.safetensors"))


LOADERS = {"load_model": load_model, **{auto.__name__: auto.from_pretrained for auto in AUTO}}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_missing_or_left_over_tensor_is_an_error_that_names_it(load, folder):
    """However it is loaded: transformers alone fills the gap at random."""
    weights = load_file(folder / "model.safetensors")
    name = "model.transformer.blocks.1.ff_out.weight"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RevprobeError, match=rf"missing {name} \(here model\.layers\.1\.mlp\.down_proj\.weight\)"):
        load(folder)
    save_file(
        weights | {"model.transformer.wpe.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RevprobeError, match=r"unexpected model\.transformer\.wpe\.weight"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "llada-tiny-sharded", tmp_path / "llada"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RevprobeError, match="model-00002-of-00002"):
        load_model(folder)


def test_pickles_are_refused_also_where_no_folder_is_looked_into(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RevprobeError, match="holds only pickled weights"):
        load_model(folder)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", rest_long(["llada", "dream"]))
def test_no_code_of_the_folder_runs_and_nothing_is_asked(name, tmp_path):
    """A fresh process without a terminal; the folder's own modelling files leave a mark when imported."""
    folder = Path(shutil.copytree(FIXTURES / f"{name}-tiny", tmp_path / name))
    for part in ("configuration", "modeling", "tokenization"):
        (folder / f"{part}_{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    code = (
        "import sys, revprobe\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM\n"
        f"folder = {str(folder)!r}\n"
        "print(type(AutoConfig.from_pretrained(folder)).__module__)\n"
        "for auto in (AutoModel, AutoModelForMaskedLM): print(type(auto.from_pretrained(folder)).__module__)\n"
        "print(type(revprobe.load_model(folder).module).__module__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["revprobe.models.bases.configs", *[f"revprobe.models.families.{name}"] * 3], (
        done.stderr
    )
    assert not (tmp_path / "ran").exists()


def test_an_unknown_family_with_code_of_its_own_is_refused_without_asking(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llada_moe_of_tomorrow"}))
    with pytest.raises(RevprobeError, match=r"of type 'llada_moe_of_tomorrow', which neither .* own code .* never"):
        load_model(folder)


# --- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alibi": True}, "alibi=True is not supported"),
        ({"block_type": "sequential"}, "block_type='sequential' is not supported; expected 'llama'"),
        ({"residual_dropout": 0.1}, "residual_dropout=0.1"),
        ({"activation_type": "swiglu"}, "expected one of silu, gelu, relu"),
        ({"is_causal": True}, "is_causal=True"),
        ({"mask_token_id": None}, "names no mask token; pass mask_token_id="),
        ({"mask_token_id": 126336}, r"mask token 126336 is outside the vocabulary \(0 to 255\)"),
        ({"n_layers": 3}, "missing model.transformer.blocks.2"),
        ({"n_layers": 1}, "unexpected model.transformer.blocks.1"),
    ],
)
def test_what_a_bidirectional_llama_is_not_is_refused(change, words, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(RevprobeError, match=words):
        load_model(folder)


def test_dreams_sliding_windows_are_refused():
    with pytest.raises(RevprobeError, match="use_sliding_window=True is not supported"):
        DreamConfig(use_sliding_window=True)


def test_sizes_follow_the_published_rules():
    """Key-value heads default to all heads, to one under multi_query_attention; both tables to embedding_size."""
    assert LLaDAConfig(n_heads=4, d_model=64).n_kv_heads == 4
    assert LLaDAConfig(n_heads=4, d_model=64, multi_query_attention=True).num_key_value_heads == 1
    assert LLaDAConfig(d_model=64, mlp_ratio=3).intermediate_size == 192
    assert LLaDAConfig(vocab_size=250, embedding_size=256).vocab_size == 256


def test_the_official_sizes_have_the_official_number_of_parameters():
    """8.02 and 7.62 billion, built without memory."""
    llada = LLaDAConfig(mlp_hidden_size=12288, embedding_size=126464)
    dream = DreamConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        modules = [LLaDAForMaskedDiffusion(llada), DreamForMaskedDiffusion(dream)]
    assert [sum(p.numel() for p in m.parameters()) for m in modules] == [8_015_581_184, 7_615_616_512]


@pytest.mark.parametrize(("name", "shift"), [("llada-tiny", 0), ("dream-tiny", 1)])
def test_the_loss_of_labels_follows_the_shift(name, shift):
    """transformers would shift both, by the class's name."""
    module = load_model(FIXTURES / name).module
    ids = reference(name)["input_ids"][:1]
    labels = ids.clone()
    labels[:, ::2] = -100
    output = module(ids, labels=labels)
    rows = [p for p in range(1, ids.shape[1], 2)]
    expected = torch.nn.functional.cross_entropy(output.logits[0, [p - shift for p in rows]], ids[0, rows])
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


# --- where the weights are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
@pytest.mark.parametrize("name", FOLDERS)
def test_device_maps_load_the_same_model(name, device_map):
    assert worst_logit_error(load_model(FIXTURES / name, device_map=device_map).module, name) < 1e-5


def test_weights_left_on_disk_are_read_for_scores_and_probabilities_and_named_for_gradients(tmp_path):
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load_model(FIXTURES / "llada-tiny", device_map=where, offload_folder=str(tmp_path))
    whole, pairs = load_model(FIXTURES / "llada-tiny"), PAIRS
    assert worst_logit_error(model.module, "llada-tiny") < 1e-5
    for measure in (probe_attention_correlation, probe_reverse_probability):
        assert measure(model, pairs).value == pytest.approx(measure(whole, pairs).value, abs=1e-5)
    with pytest.raises(RevprobeError, match=r"model\.layers\.1\..*is on disk"):
        probe_gradient_cosine(model, pairs)


def test_loading_builds_the_model_without_memory(monkeypatch):
    """Weights go from the file to their place: nothing is allocated and drawn at random first."""
    seen = []
    build = LLaDAForMaskedDiffusion.__init__
    monkeypatch.setattr(
        LLaDAForMaskedDiffusion,
        "__init__",
        lambda self, config: (build(self, config), seen.append({p.device.type for p in self.parameters()}))[0],
    )
    load_model(FIXTURES / "llada-tiny")
    assert seen == [{"meta"}]


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_bfloat16_loads_and_stays_near(name):
    model = load_model(FIXTURES / name, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    expected = reference(name)["logits_nomask"]
    with torch.no_grad():
        error = (model.module(reference(name)["input_ids"]).logits.float() - expected).abs().max()
    assert 0 < error < 0.1 * expected.abs().max()


# --- training's ways ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_gradient_checkpointing_changes_nothing(name):
    """Also in training mode, where a causal mask would come back unseen."""
    results = []
    for checkpointed in (False, True):
        module = load_model(FIXTURES / name).module.train()
        if checkpointed:
            module.gradient_checkpointing_enable()
        logits = module(reference(name)["input_ids"]).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in module.named_parameters()}))
    (plain, grads), (logits, others) = results
    assert torch.equal(plain, logits) and all(torch.equal(grads[n], others[n]) for n in grads)


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_adapters_wrap_and_merge_and_are_probed(name):
    peft = pytest.importorskip("peft")
    base = load_model(FIXTURES / name)
    wrapped = peft.get_peft_model(base.module, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    torch.manual_seed(0)
    for parameter_name, p in wrapped.named_parameters():
        if "lora_B" in parameter_name:
            p.data.normal_(std=0.1)
    model, pairs = ProbedModel(wrapped, objective="masked"), PAIRS
    assert (model.logit_shift, model.mask_token_id) == (base.logit_shift, base.mask_token_id)
    adapted = probe(model, pairs, control=False)
    adapters = [n for n, _ in wrapped.named_parameters() if "lora_" in n]
    assert set(probe_gradient_cosine(model, pairs, parameters=adapters).frame.role) == {"q", "v"}
    merged_module = wrapped.merge_and_unload()
    assert worst_logit_error(merged_module, name) > 1e-3, "the adapters did nothing"
    merged = probe(ProbedModel(merged_module, objective="masked"), pairs, control=False)
    for index in (0, 2):  # scores and probabilities; the gradient's parameters differ
        assert adapted[index].value == pytest.approx(merged[index].value, abs=1e-4)


# --- Dream's shift, by hand -----------------------------------------------------------------------------------------

WIDTH = 8
BEGIN, MASK = 6, 7


def hand_built_dream() -> tuple[ProbedModel, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A Dream whose every number is known: one-hot embeddings; attention and MLP add nothing; so row r's logits are
    sqrt(8) times the column of its own token. Queries and keys use the slowest RoPE plane, which does not turn.

    Returns the model, the table of logits (`token -> vocab`), and each token's query and key values.
    """
    config = DreamConfig(
        vocab_size=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
        rope_theta=1e12,
        rms_norm_eps=0.0,
        mask_token_id=MASK,
        bos_token_id=BEGIN,
        pad_token_id=None,
    )
    module = DreamForMaskedDiffusion(config).eval()
    generator = torch.Generator().manual_seed(23)
    head = torch.randn(WIDTH, WIDTH, generator=generator)
    query, key = torch.randn(2, WIDTH, generator=generator)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        layer = module.model.layers[0]
        for norm in (module.model.norm, layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1.0)
        module.model.embed_tokens.weight.copy_(torch.eye(WIDTH))
        module.lm_head.weight.copy_(head)
        layer.self_attn.q_proj.weight[3], layer.self_attn.k_proj.weight[3] = query, key
        # A breath of attention, so that the wrapper can see that later tokens reach earlier rows.
        layer.self_attn.v_proj.weight.copy_(torch.eye(WIDTH))
        layer.self_attn.o_proj.weight.copy_(1e-6 * torch.eye(WIDTH))
    root = math.sqrt(WIDTH)  # the norm turns a one-hot vector into sqrt(8) times itself
    return ProbedModel(module, objective="masked"), root * head.T, root * query, root * key


def read_by_hand(row_token: int, target: int, evidence: int, logits, query, key) -> tuple[float, float, float]:
    """Probability, score, and norm of the unembedding's gradient, all at the row that holds `row_token`."""
    p = logits[row_token].softmax(-1)
    residual = p - torch.nn.functional.one_hot(torch.tensor(target), WIDTH)
    score = float(query[row_token] * key[evidence]) / math.sqrt(WIDTH)
    return float(p[target]), score, float(residual.norm()) * math.sqrt(WIDTH)


def readings_by_side(model: ProbedModel, pairs: ReversalPairs) -> list[tuple[float, float, float]]:
    probability = probe_reverse_probability(model, pairs, control=False).frame.set_index("direction").probability
    attention = probe_attention_correlation(model, pairs, control=False).frame.iloc[0]
    gradient = probe_gradient_cosine(model, pairs, parameters=["lm_head.weight"], control=False).frame.iloc[0]
    return [(probability[s], attention[f"score_{s}"], gradient[f"norm_{s}"]) for s in ("forward", "reverse")]


def test_dream_reads_probability_score_and_gradient_at_the_row_before_the_target():
    model, *tables = hand_built_dream()
    # Forward [1 4 2 T 3]: target 5 at position 3, read where token 2 stands. Reverse [0 T 4 1]: read where 0 stands.
    pair = ReversalPair(Query([1, 4, 2, 5, 3], [3], [1]), Query([0, 5, 4, 1], [1], [2]))
    pairs = ReversalPairs.from_pairs([pair])
    expected = [read_by_hand(2, 5, 4, *tables), read_by_hand(0, 5, 4, *tables)]
    for found, known in zip(readings_by_side(model, pairs), expected, strict=True):
        assert found == pytest.approx(known, abs=1e-4)
    at_the_mask = read_by_hand(MASK, 5, 4, *tables)
    assert all(abs(a - b) > 1e-2 for known in expected for a, b in zip(known, at_the_mask, strict=True))
    model.logit_shift = 0  # the planted fault: LLaDA's row
    for found in readings_by_side(model, pairs):
        assert found == pytest.approx(at_the_mask, abs=1e-4)


def test_a_target_at_position_0_is_read_at_a_begin_token_never_at_a_negative_row():
    model, *tables = hand_built_dream()
    pairs = ReversalPairs.from_pairs([ReversalPair(Query([5, 4, 2], [0], [1]), Query([1, 4, 5], [2], [1]))])
    expected = [read_by_hand(BEGIN, 5, 4, *tables), read_by_hand(4, 5, 4, *tables)]
    for found, known in zip(readings_by_side(model, pairs), expected, strict=True):
        assert found == pytest.approx(known, abs=1e-4)
    model.begin_token_id = None
    with pytest.raises(RevprobeError, match="cannot predict without a begin token; pass begin_token_id="):
        probe(model, pairs)


def test_importing_the_package_registers_both_families():
    code = (
        "import revprobe; from transformers import AutoConfig as A; print([type(A.for_model(m)).__name__ for m in %r])"
    )
    command = [sys.executable, "-c", code % (["llada", "Dream"],)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['LLaDAConfig', 'DreamConfig']"
    assert AutoConfig.for_model("llada").model_type == "llada"
