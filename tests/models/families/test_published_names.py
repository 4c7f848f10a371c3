"""Names on the hub: what a checkpoint's files do not say is known by its name, and its memory is planned by it."""

import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import in_cache
from slow_decoder import draw_checkpoint, write_checkpoint
from typer.testing import CliRunner

import revprobe as rp
from revprobe.cli.main import app
from revprobe.finetune.config.finetuning import FinetunedModel
from revprobe.finetune.memory.from_config import on_meta
from revprobe.models.families.known import FAMILIES, family_of_config
from revprobe.models.published import PUBLISHED, published_config
from tiny import FIXTURES

# model_type in config.json, and the transformers model whose tensors it has.
KINDS = {"A2D Qwen3": ("a2d-qwen3", "qwen3"), "A2D Qwen2": ("a2d-qwen2", "qwen2"), "SDAR": ("sdar", "qwen3")}
KINDS |= {"Fast-dLLM v2": ("Fast_dLLM_Qwen", "qwen2")}


@pytest.mark.filterwarnings("ignore:the tokenizer of")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("A2D Qwen3", "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"),
        ("A2D Qwen3", "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"),
        ("A2D Qwen2", "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1"),
        ("SDAR", "JetLM/SDAR-1.7B-Chat"),
        ("SDAR", "JetLM/SDAR-8B-Chat-b32"),
        ("SDAR", "Gen-Verse/TraDo-8B-Thinking"),
        ("Fast-dLLM v2", "Efficient-Large-Model/Fast_dLLM_v2_7B"),
    ],
)
def test_what_the_files_do_not_say_is_known_by_the_name(family: str, name: str, tmp_path: Path, monkeypatch) -> None:
    """As many rows as the published mask token needs; SDAR's file still says blocks of 4, as a copy would."""
    monkeypatch.chdir(tmp_path)
    model_type, kind = KINDS[family]
    said = {"SDAR": {"block_size": 4}, "Fast-dLLM v2": {"bd_size": 32}}.get(family, {})
    small = {"vocab_size": 151680, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"num_hidden_layers": 1, "tie_word_embeddings": True, "intermediate_size": 8}
    weights, config = draw_checkpoint(0, kind, model_type=model_type, **small, **said)
    write_checkpoint(tmp_path / "made", weights, config)
    model = rp.load_model(name, cache_dir=in_cache(tmp_path / "made", name, tmp_path / "cache"))
    mask = 151669 if kind == "qwen3" else 151665
    suffix = re.search(r"-b(\d+)$", name)
    block = int(suffix[1]) if suffix else {"SDAR": 4}.get(family, None if "-mdlm-" in name else 32)
    assert (model.mask_token_id, model.block_size) == (mask, block)
    model.module.save_pretrained(tmp_path / "saved")
    again = rp.load_model(tmp_path / "saved")
    assert (again.mask_token_id, again.block_size) == (mask, block)


def test_a_folder_named_after_another_block_size_than_its_file_says_is_asked_about(tmp_path: Path) -> None:
    """Which of the two it was trained with is not known, and a wrong one gives numbers without a word."""
    weights, config = draw_checkpoint(1, "qwen3", model_type="sdar", block_size=4, mask_token_id=3)
    for name in ("SDAR-1.7B-Chat-b32", "SDAR-1.7B-Chat-b4", "SDAR-1.7B-Chat"):
        write_checkpoint(tmp_path / name, weights, config)
    asked = tmp_path / "SDAR-1.7B-Chat-b32"
    with pytest.warns(UserWarning, match="named after blocks of 32 tokens, and its config.json says 4"):
        with pytest.raises(rp.RevprobeError, match="pass block_size="):
            rp.load_model(asked)
        assert rp.load_model(asked, block_size=32).block_size == 32
    assert [rp.load_model(tmp_path / name).block_size for name in ("SDAR-1.7B-Chat-b4", "SDAR-1.7B-Chat")] == [4, 4]


# --- planned by name --------------------------------------------------------------------------------------------------

# Parameters of the published weights, in billions as their pages round them.
BILLIONS = {
    "GSAI-ML/LLaDA-1.5": 8.02,
    "Dream-org/Dream-Coder-v0-Instruct-7B": 7.62,
    "Dream-org/DreamOn-v0-7B": 7.62,
    "apple/DiffuCoder-7B-cpGRPO": 7.62,
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": 0.60,
    "nvidia/Nemotron-Labs-Diffusion-3B-Base": 3.83,
    "nvidia/Nemotron-Labs-Diffusion-8B": 8.49,
    "nvidia/Nemotron-Labs-Diffusion-14B": 13.51,
}


@pytest.mark.parametrize("name", BILLIONS)
def test_published_shapes_have_the_published_sizes(name: str) -> None:
    config = published_config(name)
    assert config is not None
    family = family_of_config(config)
    assert family is not None
    with torch.device("meta"):
        module = family.model_class(config)
    assert round(sum(p.numel() for p in module.parameters()) / 1e9, 2) == BILLIONS[name]


def test_planned_names_say_what_a_family_says_of_them() -> None:
    known = {name: said for family in FAMILIES for name, said in family.published.items()}
    for name in PUBLISHED:
        config = published_config(name)
        assert config is not None and config.mask_token_id is not None, name
        for key, value in known.get(name, {}).items():
            assert getattr(config, key) == value, name


@pytest.mark.parametrize(
    "name", ["apple/DiffuCoder-7B-Base", "JetLM/SDAR-8B-Chat-b32", "nvidia/Nemotron-Labs-Diffusion-8B"]
)
def test_they_are_built_without_their_files(name: str) -> None:
    """Also where transformers' Auto classes do not know the family."""
    module, objective = on_meta(FinetunedModel(name=name))
    assert (objective, next(module.parameters()).dtype, next(module.parameters()).device.type) == (
        "masked",
        torch.bfloat16,
        "meta",
    )


def test_a_fine_tuning_of_a_family_is_planned_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    relation = "relation: {name: invented_names, direction: P2C}"
    model = f"model: {{name: {FIXTURES / 'sdar-tiny'}}}"
    path.write_text(f"name: p\n{model}\n{relation}\ntraining: {{steps: 2, batch_size: 4}}\n")
    found = CliRunner().invoke(app, ["plan", str(path), "--tokens", "12"])
    assert found.exit_code == 0, found.output + str(found.exception)
    assert "headroom" in found.output
