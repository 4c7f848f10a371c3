"""Loading: what is found, what is refused, and what the wrapper checks."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from revprobe import (
    ProbedModel,
    RaddConfig,
    RaddForMaskedLM,
    RevprobeError,
    letter_pairs,
    letter_tokenizer,
    list_models,
    load_model,
    one_layer_gpt2,
    probe,
    register_model,
)
from revprobe.models import registry
from revprobe.models.checkpoints import COMPLETE, step_name
from revprobe.models.probed import as_probed
from revprobe.models.structure import parameter_role
from tiny import GROUPED, language_model, pairs_at


def save(module, folder) -> None:
    module.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints at 0 (raw and ema), 500 (raw only) and a half-written one at 700."""
    for step, ema in ((0, True), (500, False), (700, False)):
        folder = tmp_path / "rope-l10-s0" / "checkpoints" / step_name(step)
        save(RaddForMaskedLM(RaddConfig()), folder)
        if ema:
            save(RaddForMaskedLM(RaddConfig()), folder / "ema")
        if step != 700:
            (folder / COMPLETE).touch()
    return tmp_path / "rope-l10-s0"


def test_a_run_gives_its_last_complete_checkpoint(run):
    model = load_model(run)
    assert (model.name, model.step, model.weights, model.objective) == ("rope-l10-s0", 500, "raw", "masked")
    assert model.mask_token_id == 53 and model.tokenizer.convert_tokens_to_ids("z") == 26


def test_step_and_weights_choose_the_checkpoint(run):
    assert (load_model(run, step=0).weights, load_model(run, step=-2, weights="raw").weights) == ("ema", "raw")
    by_path = load_model(run / "checkpoints" / "step-000000" / "ema")
    assert (by_path.name, by_path.step, by_path.weights) == ("rope-l10-s0", 0, "ema")
    with pytest.raises(RevprobeError, match="has no checkpoint at step 700; it has 0, 500"):
        load_model(run, step=700)
    with pytest.raises(RevprobeError, match="has no 'ema' weights; it has raw"):
        load_model(run, weights="ema")


def test_causal_models_load_with_their_shift(tmp_path):
    save(one_layer_gpt2(), tmp_path)
    model = load_model(tmp_path)
    assert (model.objective, model.logit_shift, model.max_length) == ("causal", 1, 64)


def without_config(folder):
    (folder / "config.json").unlink()
    return "has no config.json"


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return "cannot load the weights"


def pickled(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return r"holds only pickled weights \(pytorch_model.bin\)"


def nothing(folder):
    (folder / "model.safetensors").unlink()
    return "holds no model.safetensors"


def tensor_missing(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    return "missing lm_head.weight"


def config_of_another_model(folder):
    one_layer_gpt2().config.save_pretrained(folder)
    return "does not match its config"


def other_sizes(folder):
    RaddConfig(d_model=32).save_pretrained(folder)
    return "cannot load the weights|does not match its config"


def unreadable_config(folder):
    (folder / "config.json").write_text("{")
    return "cannot read the config"


@pytest.mark.parametrize(
    "damage",
    [
        without_config,
        truncated,
        pickled,
        nothing,
        tensor_missing,
        config_of_another_model,
        other_sizes,
        unreadable_config,
    ],
)
def test_a_damaged_checkpoint_gets_one_line_that_says_what_is_wrong(damage, tmp_path):
    save(RaddForMaskedLM(RaddConfig()), tmp_path)
    words = damage(tmp_path)
    with pytest.raises(RevprobeError, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_offers_the_nearest(run):
    with pytest.raises(RevprobeError, match=r"no model folder at .*rope-l10-s1.*the closest is .*rope-l10-s0"):
        load_model(run.parent / "rope-l10-s1")


def test_a_missing_folder_with_one_slash_is_not_asked_of_the_hub(run, monkeypatch):
    """`runs/rope-l10-s1` in a place that has a folder `runs` is a typing mistake, not somebody's hub model."""
    monkeypatch.chdir(run.parents[1])
    parent = run.parent.name
    words = rf"no model folder at '{parent}/rope-l10-s1'; the closest is '{parent}/rope-l10-s0'"
    with pytest.raises(RevprobeError, match=words):
        load_model(f"{parent}/rope-l10-s1")
    (run.parent / "zzzzzz").touch()
    with pytest.raises(RevprobeError, match=rf"no model folder at '{parent}/zzzzz'; check the path"):
        load_model(f"{parent}/zzzzz")


def test_a_file_where_a_folder_is_expected_is_called_a_file(run, monkeypatch):
    """Not "no model folder at X; the closest is X"."""
    file = run / "config.yaml"
    file.touch()
    monkeypatch.chdir(run)
    for given in (file, str(file), "config.yaml"):
        with pytest.raises(RevprobeError, match=r"config.yaml' is a file; expected the folder of a run or of a model"):
            load_model(given)


HUB = """
import revprobe, sys
try:
    revprobe.load_model(sys.argv[1])
except revprobe.RevprobeError as error:
    print(error)
"""


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """Its client tries every file six times with growing pauses, half a minute in all, with a line for each."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    asked.append(1)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        hub |= {"HF_HOME": str(tmp_path), "NO_PROXY": "*", "no_proxy": "*"}
        command = [sys.executable, "-P", "-c", HUB, "somebody/a-model"]
        done = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True, cwd=tmp_path)
        server.close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot read the config of 'somebody/a-model'") and done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert len(asked) <= 2, f"asked {len(asked)} times"


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(run, device):
    with pytest.raises(RevprobeError, match=rf"device '{device}' cannot be used here \(.*\); expected one of cpu"):
        load_model(run / "checkpoints" / "absent", device=device)


def test_a_run_without_a_complete_checkpoint_says_so(run):
    shutil.rmtree(run / "checkpoints" / "step-000000")
    shutil.rmtree(run / "checkpoints" / "step-000500")
    with pytest.raises(RevprobeError, match="has no complete checkpoint"):
        load_model(run)


def test_a_registered_loader_is_called_with_its_options(monkeypatch):
    monkeypatch.setattr(registry, "_LOADERS", {})

    @register_model("mine")
    def load_mine(layers=1):
        """My own model."""
        return ProbedModel(RaddForMaskedLM(RaddConfig(n_layers=layers)), objective="masked")

    assert len(load_model("mine", layers=3).module.blocks) == 3
    assert "My own model." in set(list_models().about)
    with pytest.raises(RevprobeError, match="'mine' is registered already"):
        register_model("mine", lambda: None)


def test_dtype_is_applied_on_loading(run):
    assert load_model(run, dtype="float64").dtype == torch.float64


def test_the_wrapper_finds_out_what_it_is_told_wrong():
    mdm, arm = RaddForMaskedLM(RaddConfig()), one_layer_gpt2()
    with pytest.raises(RevprobeError, match="wrapped as causal, but a later token changes its earlier logits"):
        ProbedModel(mdm, objective="causal")
    with pytest.raises(RevprobeError, match="wrapped as masked, but no later token reaches"):
        ProbedModel(arm, objective="masked", mask_token_id=53)
    with pytest.raises(RevprobeError, match="unknown objective 'casual'; the closest is 'causal'"):
        ProbedModel(arm, objective="casual")
    with pytest.raises(RevprobeError, match="names no mask token"):
        ProbedModel(Bidirectional(), objective="masked")
    with pytest.raises(RevprobeError, match="cannot tell at which row Bidirectional predicts"):
        ProbedModel(Bidirectional(), objective="masked", mask_token_id=53)
    with pytest.raises(RevprobeError, match="mask token 56 is outside the vocabulary"):
        ProbedModel(Bidirectional(), objective="masked", mask_token_id=56, logit_shift=0)
    with pytest.raises(RevprobeError, match="tokenizer's mask token is 53, the config's is 52"):
        ProbedModel(RaddForMaskedLM(RaddConfig(mask_token_id=52)), letter_tokenizer(), objective="masked")
    with pytest.raises(RevprobeError, match="logit_shift 2"):
        ProbedModel(arm, objective="causal", logit_shift=2)
    with pytest.raises(RevprobeError, match="logit_shift 0 reads GPT2LMHeadModel at the target itself"):
        ProbedModel(arm, objective="causal", logit_shift=0)
    with pytest.raises(RevprobeError, match="expected a model, got str"):
        as_probed("gpt2")


class Bidirectional(nn.Module):
    """Somebody's own model: no config, no attention_mask, logits as a bare tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(56, 8), nn.Linear(8, 56)

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.head(hidden + nn.functional.scaled_dot_product_attention(hidden, hidden, hidden))


def test_bare_modules_are_wrapped_by_what_they_do():
    assert as_probed(RaddForMaskedLM(RaddConfig())).objective == "masked"
    assert as_probed(one_layer_gpt2()).objective == "causal"


def test_a_users_own_module_is_probed_without_an_adapter():
    model = ProbedModel(Bidirectional(), letter_tokenizer(), objective="masked", mask_token_id=53, logit_shift=0)
    readings = probe(model, letter_pairs(5, model=model), only=["gradient", "probability"])
    assert all(np_finite(r.value) for r in readings)


def np_finite(value: float) -> bool:
    return value == value and abs(value) < float("inf")


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("blocks.0.attention.q_proj.weight", "q", 0),
        ("blocks.0.attention.o_proj.weight", "o", 0),
        ("blocks.3.mlp.up_proj.bias", "mlp", 3),
        ("blocks.0.mlp_norm.weight", "norm", 0),
        ("embed_tokens.weight", "embed", None),
        ("embed_positions.weight", "position", None),
        ("lm_head.weight", "unembed", None),
        ("final_norm.bias", "norm", None),
        ("transformer.wte.weight", "embed", None),
        ("transformer.wpe.weight", "position", None),
        ("transformer.h.2.attn.c_attn.weight", "qkv", 2),
        ("transformer.h.2.attn.c_proj.weight", "o", 2),
        ("transformer.h.2.mlp.c_proj.bias", "mlp", 2),
        ("transformer.ln_f.weight", "norm", None),
        ("model.layers.5.self_attn.k_proj.weight", "k", 5),
        ("base_model.model.model.layers.5.self_attn.v_proj.lora_A.default.weight", "v", 5),
        ("bert.encoder.layer.1.attention.self.query.weight", "q", 1),
        ("bert.encoder.layer.1.attention.output.dense.weight", "o", 1),
        ("bert.encoder.layer.1.output.dense.weight", "mlp", 1),
        ("somewhere.else", "other", None),
    ],
)
def test_roles_are_read_off_the_path(name, role, layer):
    found = parameter_role(name)
    assert (found.role, found.layer) == (role, layer)


def test_what_is_worked_out_keeps_its_precision_whoever_loads(tmp_path):
    """A loader's model was cast as a whole, rotary angles too."""
    language_model(LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    register_model("cast", lambda **options: LlamaForCausalLM.from_pretrained(tmp_path))
    asked, ids = {"dtype": "bfloat16"}, torch.arange(50)[None]
    mine, folder = load_model("cast", **asked), load_model(tmp_path, **asked)
    types = {
        name: (value.dtype, folder.module.state_dict()[name].dtype) for name, value in mine.module.state_dict().items()
    }
    assert set(types.values()) == {(torch.bfloat16, torch.bfloat16)}
    assert mine.module.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(mine.logits(ids), folder.logits(ids))


class TurnsByTables(nn.Module):
    """Attention that multiplies by sines it holds, and casts nothing back."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(60, 16), nn.Linear(16, 48), nn.Linear(16, 60)
        inverse = 10_000 ** (-torch.arange(8.0) / 8)
        angles = torch.outer(torch.arange(32.0), inverse).repeat(1, 2)
        self.register_buffer("inv_freq", inverse, persistent=False)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids, attention_mask=None):
        q, k, v = self.qkv(self.embed(input_ids)).chunk(3, -1)
        q, k = (
            x * self.cos[: x.shape[1]] + torch.cat([-x[..., 8:], x[..., :8]], -1) * self.sin[: x.shape[1]]
            for x in (q, k)
        )
        return self.head(nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


def test_tables_that_meet_the_weights_are_cast_with_them():
    """Kept in float32 they made queries float32 beside values in bfloat16, an error of torch."""
    options = {"objective": "masked", "mask_token_id": 59, "logit_shift": 0}
    register_model("tables", lambda **_: ProbedModel(TurnsByTables(), **options))
    model, ids = load_model("tables", dtype="bfloat16"), torch.arange(10)[None]
    assert model.module.inv_freq.dtype == torch.float32 and model.module.cos.dtype == torch.bfloat16
    with torch.no_grad():
        assert model.logits(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("asked", ["float32", torch.float32])
def test_the_older_name_of_dtype_is_obeyed(asked, tmp_path):
    """It was taken for an option of `from_pretrained` beside the dtype, and lost."""
    language_model(LlamaConfig(**GROUPED)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, torch_dtype=asked).dtype == torch.float32
    assert load_model(tmp_path).dtype == torch.bfloat16
    with pytest.raises(RevprobeError, match=r"dtype=.* and torch_dtype=.* are one option; leave torch_dtype out"):
        load_model(tmp_path, torch_dtype=asked, dtype="bfloat16")
    with pytest.raises(RevprobeError, match=r"torch_dtype=5: expected a torch.dtype or its name"):
        load_model(tmp_path, torch_dtype=5)


def test_a_subfolder_is_named_as_the_place_itself(tmp_path):
    """Config and tokenizer were read from the folder above, weights from the subfolder."""
    language_model(LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    language_model(LlamaConfig(**GROUPED, rope_theta=500.0)).save_pretrained(tmp_path / "ck")
    with pytest.raises(RevprobeError, match=r"subfolder='ck': name the folder itself, load_model\('.*/ck'\)"):
        load_model(tmp_path, subfolder="ck")
    assert load_model(tmp_path / "ck").module.config.rope_parameters["rope_theta"] == 500.0


def test_an_index_in_another_cache_is_held_to_its_folder_too(tmp_path):
    snapshot = tmp_path / "models--me--strange" / "snapshots" / ("c" * 40)
    language_model(LlamaConfig(**GROUPED)).save_pretrained(tmp_path / "elsewhere")
    language_model(LlamaConfig(**GROUPED)).config.save_pretrained(snapshot)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../../elsewhere/model.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "models--me--strange" / "refs").mkdir()
    (tmp_path / "models--me--strange" / "refs" / "main").write_text(snapshot.name)
    with pytest.raises(RevprobeError, match=r"which lies outside its folder"):
        load_model("me/strange", cache_dir=str(tmp_path), objective="causal")


OWN_CODE = {
    "another class": ({"AutoModelForCausalLM": "modeling_both.LlamaBothWays"}, "modeling_both.LlamaBothWays"),
    "the same name, elsewhere": (
        {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"},
        "modeling_x.LlamaForCausalLM",
    ),
    "of another repository": ({"AutoModel": "me/code--modeling_b.Both"}, "me/code--modeling_b.Both"),
    "what transformers took over": ({"AutoModelForCausalLM": "me/x--modeling_llama.LlamaForCausalLM"}, None),
    "its config alone": ({"AutoConfig": "configuration_x.Config"}, None),
}


@pytest.mark.parametrize("case", OWN_CODE)
def test_code_of_a_folder_that_is_passed_over_is_told(case, tmp_path):
    """A Llama's files may be those of a model that attends in both directions, by code that is never run."""
    named, passed_over = OWN_CODE[case]
    language_model(LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": named}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = load_model(tmp_path)
    assert [passed_over in str(one.message) for one in told] == ([] if passed_over is None else [True])
    reading = probe(model, pairs_at((1, 4), (1, 5), count=8), only=["probability"])[0]
    assert reading.meta.get("code_not_run") == passed_over


def test_two_tensors_that_the_config_says_are_one_are_refused(tmp_path):
    """transformers reads them as two, with a line in its log: a model that its config does not describe."""
    tied = language_model(LlamaConfig(**GROUPED, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved
    same = saved | {"lm_head.weight": saved["model.embed_tokens.weight"].clone()}
    save_file(same, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path).logits(torch.arange(9)[None]), tied(torch.arange(9)[None]).logits)
    other = saved | {"lm_head.weight": saved["model.embed_tokens.weight"] + 0.1}
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RevprobeError, match=r"its head differs from its embedding, which its config says are one"):
        load_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(load_model(tmp_path).module.lm_head.weight, other["lm_head.weight"])
