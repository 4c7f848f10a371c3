"""What goes wrong first with a published checkpoint: one line for each, from `load_model` and from the command line.

Every fixture of `test_every_family.py` is damaged in every way below; a new family comes in by its line there. A line
is a `RevprobeError` that names what is wrong, and nothing else on stderr: no table of transformers, no question.
"""

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import INDEX, WHOLE, copied, in_shards, set_in_config, settings
from long_cases import rest_long
from safetensors.torch import load_file, save_file

import revprobe as rp
from revprobe.cli.main import main
from tiny import FIXTURES, module_at

CASES = module_at(Path(__file__).with_name("test_every_family.py")).CASES
# The key of config.json that has the vocabulary's size, if not vocab_size; and the number of layers.
SIZE = {"radd-tiny": "tokens"}
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "n_blocks")
# The size of the vocabulary says which token is the mask, too: the last.
MASK_IS_LAST = {"radd-tiny", "mdlm-tiny", "bd3lm-tiny"}


def weights(folder: Path) -> Path:
    """The one file of weights, whatever it is called."""
    (file,) = (file for file in folder.glob("*.safetensors") if file.name != "reference.safetensors")
    return file


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# --- the failures: each damages a folder or what is asked for, and gives the words that must be said ------------------


def mask_outside_the_vocabulary(name: str, folder: Path, asked: dict) -> str:
    asked["mask_token_id"] = 99999
    return r"mask token 99999 is outside the vocabulary \(0 to \d+\); expected the id"


def mask_in_the_config_outside_the_vocabulary(name: str, folder: Path, asked: dict) -> str:
    set_in_config(folder, **{SIZE.get(name, "vocab_size") if name in MASK_IS_LAST else "mask_token_id": 99999})
    asked.pop("mask_token_id", None)
    return r"mask token 99999 is outside the vocabulary|does not match its config: mismatched .* for \((99999|100000), "


def tensors_of_another_family(name: str, folder: Path, asked: dict) -> str:
    other = next(one for one in CASES if one.split("-")[0] != name.split("-")[0])
    shutil.copy(weights(FIXTURES / other), weights(folder))
    return r"does not match its config|its config\.json says|is no model folder: it has no config\.json"


def tensors_of_other_sizes(name: str, folder: Path, asked: dict) -> str:
    """transformers says "for details look at the above report", which is a table."""
    tensors = load_file(weights(folder))
    first = min(key for key in tensors if tensors[key].dim() == 2 and "norm" not in key)
    save_file(tensors | {first: tensors[first][:, 1:].contiguous()}, weights(folder), {"format": "pt"})
    return r"does not match its config: mismatched .*\(\d+, \d+\) for \(\d+, \d+\)"


def truncated_file(name: str, folder: Path, asked: dict) -> str:
    cut(weights(folder))
    return r"cannot load the weights of .*\.safetensors: .*; the file is cut off or no safetensors, so download"


def truncated_shard(name: str, folder: Path, asked: dict) -> str:
    cut(in_shards(folder)[1])
    return r"cannot load the weights of .*model-00002-of-00002\.safetensors: .*; the file is cut off or no safetensors"


def empty_file(name: str, folder: Path, asked: dict) -> str:
    weights(folder).write_bytes(b"")
    return r"cannot load the weights of .*\.safetensors: .*; the file is cut off or no safetensors"


def missing_shard(name: str, folder: Path, asked: dict) -> str:
    in_shards(folder)[1].unlink()
    return r"model\.safetensors\.index\.json names 'model-00002-of-00002\.safetensors', which is not there; download"


def index_of_files_elsewhere(name: str, folder: Path, asked: dict) -> str:
    in_shards(folder)
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("model-00002", "../other/model-00002"))
    return r"index\.json names '\.\./other/model-00002.*', which lies outside its folder; put the file into it"


def only_pickled(name: str, folder: Path, asked: dict) -> str:
    torch.save(load_file(weights(folder)), folder / "pytorch_model.bin")
    weights(folder).unlink()
    return r"holds only pickled weights \(pytorch_model\.bin\), which can run code when read; convert them once"


def no_weights(name: str, folder: Path, asked: dict) -> str:
    weights(folder).unlink()
    torch.save({}, folder / "training_args.bin")
    return r"holds no model\.safetensors; the checkpoint is missing|it has no config\.json"


def only_code(name: str, folder: Path, asked: dict) -> str:
    code = {"AutoConfig": "configuration_new.NewConfig", "AutoModel": "modeling_new.NewModel"}
    told = {key: value for key, value in settings(folder).items() if key != "tokens"}
    (folder / "config.json").write_text(json.dumps(told | {"model_type": "new_diffusion", "auto_map": code}))
    for part in ("configuration", "modeling"):
        (folder / f"{part}_new.py").write_text("raise SystemExit('code of a model folder was run')\n")
    return r"of type 'new_diffusion', which neither .* knows; its own code \(AutoConfig, .*\) is never run; .*SDAR"


def one_layer_too_few(name: str, folder: Path, asked: dict) -> str:
    told = settings(folder)
    sizes = told["model"] if name == "radd-tiny" else told
    key = next(key for key in LAYERS if key in sizes)
    sizes[key] += 1
    (folder / "config.json").write_text(json.dumps(told))
    return rf"does not match its config: missing \S+{sizes[key] - 1}\.\S+|does not say of each of \d layers"


def vocabulary_larger_than_the_rows(name: str, folder: Path, asked: dict) -> str:
    key = SIZE.get(name, "vocab_size")
    set_in_config(
        folder, **{one: settings(folder)[key] + 5 for one in (key, "embedding_size") if one in settings(folder)}
    )
    return r"does not match its config: mismatched .*\(\d+, \d+\) for \(\d+, \d+\)"


def unknown_option(name: str, folder: Path, asked: dict) -> str:
    asked["blok_size"] = 4
    return "have no option 'blok_size'; the closest is 'block_size'"


def option_of_another_family(name: str, folder: Path, asked: dict) -> str:
    asked["n_heads"] = 4
    return "have no option 'n_heads'; expected one of "


def causal(name: str, folder: Path, asked: dict) -> str:
    asked["objective"] = "causal"
    return "objective='causal': .* is .*, a masked model; leave objective out"


# One bare file: no config.json, no shards.
BARE = {"smdm-tiny"}
WITH_CONFIG = [name for name in CASES if name not in BARE]
# Failure -> the fixtures it cannot happen to.
FAILURES: dict[Callable[[str, Path, dict], str], set[str]] = {
    mask_outside_the_vocabulary: set(),
    mask_in_the_config_outside_the_vocabulary: BARE,
    tensors_of_another_family: set(),
    tensors_of_other_sizes: BARE,  # they say the sizes
    truncated_file: set(),
    truncated_shard: BARE,
    empty_file: set(),
    missing_shard: BARE,
    index_of_files_elsewhere: BARE,
    only_pickled: set(),
    no_weights: set(),
    only_code: BARE,
    one_layer_too_few: BARE,
    vocabulary_larger_than_the_rows: BARE,
    unknown_option: set(),
    option_of_another_family: BARE,  # theirs
    causal: set(),
}
EACH = [
    pytest.param(name, failure, id=f"{name}-{failure.__name__}")
    for failure, never in FAILURES.items()
    for name in CASES
    if name not in never
]


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question on the terminal would wait for ever."""

    def ask(*words: object) -> str:
        pytest.fail(f"asked {words}")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(("name", "failure"), EACH)
def test_each_failure_of_each_family_is_one_line(name: str, failure: Callable, tmp_path: Path, capfd) -> None:
    folder, asked = copied(name, tmp_path / "model"), dict(CASES[name])
    words = failure(name, folder, asked)
    with pytest.raises(rp.RevprobeError, match=words) as caught:
        rp.load_model(folder, **asked)
    said = capfd.readouterr()
    assert "\n" not in str(caught.value) and (said.out, said.err) == ("", "")


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("failure", FAILURES, ids=lambda one: one.__name__)
def test_the_command_line_says_the_same_line(failure: Callable, tmp_path: Path, monkeypatch, capfd) -> None:
    """Of SDAR, whose files say all that a command needs; the families differ above."""
    folder, asked = copied("sdar-tiny", tmp_path / "model"), {}
    words = failure("sdar-tiny", folder, asked)
    load = [part for key, value in asked.items() for part in ("--load", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["revprobe", "diagnose", str(folder), *load])
    monkeypatch.delenv("REVPROBE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code == 1 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    with pytest.raises(rp.RevprobeError, match=words):
        raise rp.RevprobeError(said.err)


# --- a mask that says otherwise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_mask_that_contradicts_what_the_config_says_is_refused(name: str, tmp_path: Path) -> None:
    """It would be read in silence otherwise, with another token in every hidden place."""
    folder = copied(name, tmp_path / "model")
    stated = rp.load_model(folder, **CASES[name]).mask_token_id
    if "mask_token_id" in CASES[name]:
        set_in_config(folder, mask_token_id=stated)  # its published config does not say it
    words = f"mask_token_id=7, but the config's is {stated}; leave it out, or correct"
    words += f"|mask token 7: its mask token is {stated}, the only one it has no logit for; leave"
    with pytest.raises(rp.RevprobeError, match=words):
        rp.load_model(folder, **CASES[name] | {"mask_token_id": 7})
    assert rp.load_model(folder, **CASES[name] | {"mask_token_id": stated}).mask_token_id == stated


def test_a_mask_beyond_the_vocabulary_in_the_config_can_be_told_otherwise(tmp_path: Path) -> None:
    """The fix that the error names works."""
    folder = copied("llada-tiny", tmp_path / "model")
    set_in_config(folder, mask_token_id=126336)
    with pytest.raises(rp.RevprobeError, match=r"mask token 126336 is outside the vocabulary .*; pass mask_token_id="):
        rp.load_model(folder)
    assert rp.load_model(folder, mask_token_id=253).mask_token_id == 253


# --- pickles ---------------------------------------------------------------------------------------------------------


SHARDS = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["model.pt"], ["last.ckpt"], ["mdm-6M.pth"], SHARDS])
def test_the_conversion_that_the_error_names_works_as_it_stands(files: list[str], tmp_path: Path) -> None:
    folder = copied("sdar-tiny", tmp_path / "model")
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    for number, file in enumerate(files):
        torch.save({key: tensors[key] for key in sorted(tensors)[number :: len(files)]}, folder / file)
    torch.save({"not": "weights"}, folder / "training_args.bin")
    with pytest.raises(rp.RevprobeError, match=rf"holds only pickled weights \({files[0]}\)") as caught:
        rp.load_model(folder)
    exec(str(caught.value).split("`")[1], {})
    again = load_file(folder / WHOLE)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert rp.load_model(folder).mask_token_id == 254


def test_the_conversion_refuses_what_would_run(tmp_path: Path) -> None:
    folder = copied("sdar-tiny", tmp_path / "model")
    (folder / WHOLE).unlink()
    torch.save({"bomb": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(rp.RevprobeError) as caught:
        rp.load_model(folder)
    with pytest.raises(Exception, match="Weights only load failed"):
        exec(str(caught.value).split("`")[1], {})
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Touches a file when it is read by pickle."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_one_pickled_file_by_its_path(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "mdm-6M-100e18.pth")
    with pytest.raises(rp.RevprobeError, match=r"mdm-6M-100e18\.pth holds only pickled weights \(mdm-6M-100e18\.pth\)"):
        rp.load_model(tmp_path / "mdm-6M-100e18.pth")


# --- what is no failure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel", rest_long(["flash_attention_2", "flex_attention", "flash_attention_3", "kernels-community/flash-attn"])
)
@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_config_that_asks_for_flash_or_flex_attention_loads_with_sdpa(name: str, kernel: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "model")
    set_in_config(folder, attn_implementation=kernel, _attn_implementation=kernel)
    model = rp.load_model(folder, **CASES[name])
    assert model.module.config._attn_implementation == "sdpa"
    assert torch.equal(model.logits(IDS), rp.load_model(FIXTURES / name, **CASES[name]).logits(IDS))


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_so_does_a_plain_transformers_folder(kernel: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 56, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path)
    set_in_config(tmp_path, attn_implementation=kernel)
    assert rp.load_model(tmp_path).module.config._attn_implementation == "sdpa"
    assert rp.load_model(tmp_path, attn_implementation="eager").module.config._attn_implementation == "eager"


IDS = torch.tensor([[3, 17, 42, 8, 99, 5, 60, 12, 7]])


@pytest.mark.parametrize("dtype", rest_long([torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("name", CASES)
def test_the_checkpoints_dtype_is_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "model")
    tensors = load_file(weights(folder))
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, weights(folder), {"format": "pt"})
    if name not in BARE:
        key = "dtype" if "dtype" in settings(folder) else "torch_dtype"
        set_in_config(folder, **{key: str(dtype).removeprefix("torch.")})
    model = rp.load_model(folder, **CASES[name])
    assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}
    assert rp.load_model(folder, dtype="float32", **CASES[name]).dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in WITH_CONFIG if name not in MASK_IS_LAST])
def test_a_vocabulary_smaller_than_the_rows_is_no_failure_the_rows_count(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "model")
    plain = rp.load_model(FIXTURES / name, **CASES[name])
    set_in_config(folder, **{SIZE.get(name, "vocab_size"): plain.vocab_size - 3})
    if name == "llada-tiny":
        set_in_config(folder, embedding_size=None)
    model = rp.load_model(folder, **CASES[name])
    assert model.vocab_size == plain.vocab_size and torch.equal(model.logits(IDS), plain.logits(IDS))


QWEN = ["dream-tiny", "sdar-tiny", "fastdllm2-tiny", "a2d-qwen3-mdlm-tiny", "a2d-qwen2-mdlm-tiny"]


@pytest.mark.parametrize("name", QWEN)
def test_sliding_layers_get_the_same_mask_as_the_others(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "model")
    set_in_config(folder, layer_types=["sliding_attention", "full_attention"], sliding_window=2)
    model, plain = (rp.load_model(place, **CASES[name]) for place in (folder, FIXTURES / name))
    assert torch.equal(model.logits(IDS), plain.logits(IDS))


@pytest.mark.parametrize("name", ["a2d-qwen3-mdlm-tiny", "a2d-qwen2-bd3lm-tiny"])
def test_a2d_ignores_its_parents_windows_as_its_code_does(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "model")
    set_in_config(folder, use_sliding_window=True, sliding_window=2, max_window_layers=0, layer_types=None)
    model, plain = (rp.load_model(place, **CASES[name]) for place in (folder, FIXTURES / name))
    assert torch.equal(model.logits(IDS), plain.logits(IDS))


def test_the_files_that_an_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    """A damaged file beside the checkpoint is no reason to refuse it."""
    folder = copied("sdar-tiny", tmp_path / "model")
    in_shards(folder)
    (folder / "notes.safetensors").write_bytes(b"no tensors")
    assert rp.load_model(folder).mask_token_id == 254


# --- what the files do not say, on the command line ------------------------------------------------------------------


def test_the_command_line_takes_what_the_files_do_not_say(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    command = ["revprobe", "diagnose", str(FIXTURES / "a2d-qwen3-mdlm-tiny")]
    monkeypatch.delenv("REVPROBE_DEBUG", raising=False)
    for load, words in (
        ([], "pass block_size= with its number of tokens, or bidirectional=True"),
        (["bidirectional=true"], "names no mask token; pass mask_token_id="),
        (["bidirectional=true", "mask_token_id"], "--load 'mask_token_id': expected NAME=VALUE, such as block_size=32"),
        (["device=cpu"], "--load device=...: this command has --device of its own"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *(part for one in load for part in ("--load", one))])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert ended.value.code == 1 and words in said.err and said.err.count("\n") == 1
    # True as the message writes it.
    monkeypatch.setattr(sys, "argv", [*command, "--load", "bidirectional=True", "--load", "mask_token_id=254"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code in (0, None), said
    assert "bidirectional" in said.out and said.err == ""
