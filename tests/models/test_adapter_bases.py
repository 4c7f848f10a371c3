"""Which base an adapter is put on: the one it was trained on, at its revision, or none with the reason.

What is right is what peft answers for the adapter on the model it was trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import revprobe as rp
from revprobe import RevprobeError
from revprobe.finetune.config.finetuning import LoraOptions
from revprobe.finetune.training.lora import add_lora
from revprobe.models.peft_adapters import base_of
from tiny import FIXTURES, GROUPED, drawn, language_model

IDS = torch.tensor([[54, 3, 7, 9, 12, 30, 8]])


def llama(seed: int = 0, **settings: Any) -> nn.Module:
    module = drawn(language_model(transformers.LlamaConfig(**GROUPED | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def adapter_on(base: Any, folder: Path, settings: peft.PeftConfig | None = None, **config: Any) -> Tensor:
    """Save an adapter on a base that lies at a place, with some of its config changed; what peft answers with it."""
    torch.manual_seed(5)
    chosen = settings or peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    module = peft.get_peft_model(base, chosen).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        answers = module(IDS).logits
    module.save_pretrained(folder)
    change(folder, **config)
    return answers


def change(folder: Path, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def at(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def answers(model: rp.ProbedModel) -> Tensor:
    with torch.no_grad():
        return model.logits(IDS)


# ---- a run's own base, and any other folder of that name ----


@pytest.mark.parametrize("where", ["adapters/one", "checkpoints/one", "runs/step-000005", "checkpoints/checkpoint-5"])
def test_a_folder_called_base_is_no_base_of_adapters_beside_it(where: str, tmp_path: Path) -> None:
    """models/base beside models/adapters/x was put under x, whatever x was trained on."""
    llama(1).save_pretrained(tmp_path / "chat")
    llama(2).save_pretrained(tmp_path / "base")
    wanted = adapter_on(at(tmp_path / "chat"), tmp_path / where)
    assert torch.allclose(answers(rp.load_model(tmp_path / where)), wanted, atol=1e-5)


def a_run(folder: Path) -> tuple[Path, Tensor]:
    """A run that built its own base, with one checkpoint of its adapter."""
    llama(1).save_pretrained(folder / "base")
    checkpoint = folder / "checkpoints" / "step-000005"
    wanted = adapter_on(at(folder / "base"), checkpoint)
    (checkpoint / "COMPLETE").touch()
    return checkpoint, wanted


@pytest.mark.parametrize("kind", ["moved", "copied", "on windows", "from another folder"])
def test_a_run_that_was_moved_or_copied_has_its_base_with_it(kind: str, tmp_path: Path) -> None:
    _, wanted = a_run(tmp_path / "run")
    (shutil.copytree if kind == "copied" else shutil.move)(tmp_path / "run", tmp_path / "other")
    if kind == "on windows":
        change(tmp_path / "other" / "checkpoints" / "step-000005", base_model_name_or_path="C:\\runs\\run\\base")
    if kind == "from another folder":
        change(tmp_path / "other" / "checkpoints" / "step-000005", base_model_name_or_path="runs/run/base")
    model = rp.load_model(tmp_path / "other")
    assert torch.allclose(answers(model), wanted, atol=1e-5)
    assert base_of(tmp_path / "other" / "checkpoints" / "step-000005") == tmp_path / "other" / "base"


@pytest.mark.parametrize("stated", ["another folder", "the same config, other weights", "openai-community/gpt2"])
def test_a_checkpoint_that_names_another_base_than_its_runs_is_refused(stated: str, tmp_path: Path) -> None:
    checkpoint, _ = a_run(tmp_path / "run")
    llama(2).save_pretrained(tmp_path / "another folder")
    llama(1).save_pretrained(tmp_path / "the same config, other weights")
    other = at(tmp_path / "the same config, other weights")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "the same config, other weights")
    change(checkpoint, base_model_name_or_path=stated if "/" in stated else str(tmp_path / stated))
    with pytest.raises(RevprobeError, match=r"names the base .* and its run's folder has another, .*base; delete"):
        rp.load_model(tmp_path / "run")
    change(checkpoint, base_model_name_or_path=None)
    rp.load_model(tmp_path / "run")


# ---- the revision of a base on the hub ----


def on_the_hub(cache: Path, name: str, **fill: Callable[[Path], Any]) -> Path:
    """A name in the hub's cache with a snapshot for each revision, the first of which is main; the last snapshot."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    for number, (revision, fills) in enumerate(fill.items()):
        snapshot = place / "snapshots" / f"{number:040x}"
        snapshot.mkdir(parents=True)
        fills(snapshot)
        for called in [revision] + (["main"] if number == 0 else []):
            (place / "refs" / called).write_text(snapshot.name)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a base of two revisions."""
    of = {f"v{seed}": lambda folder, seed=seed: llama(seed).save_pretrained(folder) for seed in (1, 2)}
    on_the_hub(tmp_path / "cache", "me/base", **of)
    return tmp_path / "cache"


def pinned(cache: Path, folder: Path, revision: str = "v2") -> Tensor:
    """An adapter trained on a revision of me/base."""
    base = transformers.LlamaForCausalLM.from_pretrained("me/base", revision=revision, cache_dir=cache)
    return adapter_on(base, folder, base_model_name_or_path="me/base", revision=revision)


@pytest.mark.filterwarnings("ignore:the tokenizer of")
@pytest.mark.parametrize("revision", ["v1", "v2"])
def test_an_adapter_is_put_on_the_revision_it_pins(revision: str, cache: Path, tmp_path: Path) -> None:
    wanted = pinned(cache, tmp_path / "adapter", revision)
    model = rp.load_model(tmp_path / "adapter", cache_dir=str(cache))
    assert torch.allclose(answers(model), wanted, atol=1e-5)
    with pytest.raises(RevprobeError, match=r"revision='v3': .* pins its base 'me/base' to 'v\d'; leave revision out"):
        rp.load_model(tmp_path / "adapter", cache_dir=str(cache), revision="v3")
    change(tmp_path / "adapter", revision=None)
    asked = rp.load_model(tmp_path / "adapter", cache_dir=str(cache), revision=revision)
    assert torch.allclose(answers(asked), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the tokenizer of")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with its base's config"])
def test_a_hub_name_of_an_adapter_is_read_as_a_folder_is(beside: bool, cache: Path, tmp_path: Path) -> None:
    """transformers would put it on by itself where a config.json lies beside it."""
    wanted = pinned(cache, tmp_path / "adapter")
    if beside:
        llama(1).config.save_pretrained(tmp_path / "adapter")
    fill = {
        "main": lambda folder: None,
        "tuned": lambda f: shutil.copytree(tmp_path / "adapter", f, dirs_exist_ok=True),
    }
    on_the_hub(cache, "me/lora", **fill)
    model = rp.load_model("me/lora", revision="tuned", cache_dir=str(cache))
    assert model.name == "me/lora" and torch.allclose(answers(model), wanted, atol=1e-5)


def test_a_hub_adapter_with_pickled_or_missing_weights_is_refused(cache: Path, tmp_path: Path) -> None:
    """transformers reads pickled adapters, and leaves a tensor that is missing at its random start."""
    pinned(cache, tmp_path / "adapter")
    llama(1).config.save_pretrained(tmp_path / "adapter")

    def pickled(folder: Path) -> None:
        shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()

    on_the_hub(cache, "me/pickled", main=pickled)
    with pytest.raises(RevprobeError, match=r"holds no adapter_model.safetensors; an adapter is read from safetensors"):
        rp.load_model("me/pickled", cache_dir=str(cache))

    def of_another_model(folder: Path) -> None:
        shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
        adapter_on(llama(2, num_hidden_layers=1), folder, base_model_name_or_path="me/base")

    on_the_hub(cache, "me/half", main=of_another_model)
    with pytest.raises(RevprobeError, match=r"is of another model: .*layers.1.* do not match"):
        rp.load_model("me/half", cache_dir=str(cache))


# ---- adapters on adapters ----


@pytest.mark.parametrize(
    "first",
    [
        peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["LoRA", "LN tuning", "prompt"],
)
def test_an_adapter_on_an_adapter_is_refused_and_so_is_training_one(first: peft.PeftConfig, tmp_path: Path) -> None:
    """The second took the first's place: what was measured was the second on the raw base."""
    llama(1).save_pretrained(tmp_path / "plain")
    adapter_on(at(tmp_path / "plain"), tmp_path / "first", first)
    adapter_on(at(tmp_path / "plain"), tmp_path / "second", base_model_name_or_path=str(tmp_path / "first"))
    with pytest.raises(RevprobeError, match=r"second has an adapter itself, which the second would overwrite; merge"):
        rp.load_model(tmp_path / "second")
    for options in (None, LoraOptions(rank=2)):
        with pytest.raises(RevprobeError, match=r"first has an adapter of peft on it, and fine-tuning starts from"):
            add_lora(rp.load_model(tmp_path / "first"), options)


# ---- adapters that are called by tokens ----


def test_an_activated_lora_works_behind_the_tokens_that_call_it_alone(tmp_path: Path) -> None:
    """Without peft's wrapper, which looks for them, it does nothing."""
    llama(1).save_pretrained(tmp_path / "plain")
    called = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[9])
    adapter_on(at(tmp_path / "plain"), tmp_path / "adapter", called)
    model, plain = rp.load_model(tmp_path / "adapter"), rp.load_model(tmp_path / "plain")
    wanted = peft.PeftModel.from_pretrained(at(tmp_path / "plain"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(model.logits(IDS), wanted(IDS).logits, atol=1e-5)
        moved = (model.logits(IDS) - plain.logits(IDS)).abs().amax(-1)[0]
        assert bool((moved[:3] == 0).all()) and bool((moved[3:] > 1e-3).all())
        assert torch.equal(model.logits(IDS[:, :3]), plain.logits(IDS[:, :3]))


# ---- what lies beside an adapter's weights, and under which names ----


@pytest.mark.parametrize("tables", [["embed_tokens"], ["embed_tokens", "lm_head"], []])
def test_whole_tables_beside_an_adapter_are_taken_and_no_other_tensor(tables: list[str], tmp_path: Path) -> None:
    """save_embedding_layers=True writes them where no token was added too."""
    llama(1).save_pretrained(tmp_path / "plain")
    wanted = adapter_on(at(tmp_path / "plain"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved, base = load_file(file), at(tmp_path / "plain")
    names = {"embed_tokens": "base_model.model.model.embed_tokens.weight", "lm_head": "base_model.model.lm_head.weight"}
    whole = {"embed_tokens": base.model.embed_tokens.weight, "lm_head": base.lm_head.weight}
    save_file(saved | {names[table]: whole[table].detach().clone() for table in tables}, file, {"format": "pt"})
    assert torch.allclose(answers(rp.load_model(tmp_path / "adapter")), wanted, atol=1e-5)
    moved = {names["lm_head"]: whole["lm_head"].detach() + 0.5}
    save_file(saved | moved, file, {"format": "pt"})
    assert torch.allclose(rp.load_model(tmp_path / "adapter").module.lm_head.weight, moved[names["lm_head"]])
    save_file(saved | {"base_model.model.model.norm.weight": torch.ones(32)}, file, {"format": "pt"})
    with pytest.raises(RevprobeError, match=r"is of another model: .*norm.weight do not match"):
        rp.load_model(tmp_path / "adapter")


def test_an_adapter_trained_on_published_code_is_told_from_another_models(tmp_path: Path) -> None:
    base = rp.load_model(FIXTURES / "llada-tiny").module
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    rp.load_model(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    published = {
        name.replace("model.layers.", "model.transformer.blocks.").replace("self_attn.", ""): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(published, file, {"format": "pt"})
    with pytest.raises(RevprobeError, match=r"was trained on the published code, .*transformer.blocks.0.q_proj"):
        rp.load_model(tmp_path / "adapter")
