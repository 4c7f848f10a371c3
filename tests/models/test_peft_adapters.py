"""Adapters of every kind, loaded from a folder and probed while they train: what is measured is what was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from long_cases import rest_long
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import revprobe as rp
from revprobe import Query, ReversalPair, ReversalPairs, RevprobeError
from revprobe.models.peft_adapters import is_adapter_parameter, without_wrapper
from tiny import GROUPED, drawn, language_model

PROJECTIONS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, **PROJECTIONS),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **PROJECTIONS),
    "LoRA and whole modules": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **PROJECTIONS),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, **PROJECTIONS),
    "LoKr": lambda: peft.LoKrConfig(r=4, **PROJECTIONS),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, **PROJECTIONS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **PROJECTIONS),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "prefix": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **VIRTUAL),
}
PROMPTS = ("prompt", "prefix", "p-tuning")


def llama() -> nn.Module:
    return drawn(language_model(transformers.LlamaConfig(**GROUPED)))


def adapted(kind: str, base: nn.Module) -> peft.PeftModel:
    """An adapter that moves the model's answers, as training would have made it."""
    module = peft.get_peft_model(base, KINDS[kind]()).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def pairs(length: int = 8, facts: int = 4) -> ReversalPairs:
    draws, found = np.random.default_rng(0), []
    for fact in range(facts):
        one, other = draws.integers(5, 50, length).tolist(), draws.integers(5, 50, length + fact % 2).tolist()
        other[1], other[-1] = one[-1], one[1]
        sides = Query(one, [length - 1], [1]), Query(other, [len(other) - 1], [1])
        found.append(ReversalPair(sides[0], sides[1], kind="swapped", fact=str(fact)))
    return ReversalPairs.from_pairs(found)


def right(module: nn.Module, query: Query) -> torch.Tensor:
    """Log-probability by peft's own forward pass, whose rows end with the query's tokens."""
    logits = module(torch.tensor([query.token_ids])).logits[0]
    return logits[len(logits) - 2].double().log_softmax(-1)[query.target[0]]


def cosine(module: nn.Module, pair: ReversalPair, names: set[str]) -> float:
    parameters = [p for n, p in module.named_parameters() if n in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    one, other = (
        torch.autograd.grad(right(module, query), parameters, materialize_grads=True)
        for query in (pair.forward, pair.reverse)
    )
    dot = lambda a, b: sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))  # noqa: E731
    return dot(one, other) / (dot(one, one) * dot(other, other)) ** 0.5


@pytest.mark.parametrize("kind", rest_long(KINDS, 4))
def test_a_folder_is_the_base_with_its_adapter(kind, tmp_path: Path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    module = adapted(kind, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    module.save_pretrained(tmp_path / "adapter")
    model, asked = rp.load_model(tmp_path / "adapter"), pairs()
    assert isinstance(model.module, peft.PeftModel) is (kind in PROMPTS)
    frame = rp.probe_reverse_probability(model, asked, control=False).frame
    plain = rp.probe_reverse_probability(rp.load_model(tmp_path / "base"), asked, control=False).frame
    for row in frame.itertuples():
        expected = float(right(module, getattr(asked[row.pair], row.direction)))
        assert row.log_probability == pytest.approx(expected, abs=2e-5)
    assert np.abs(frame["log_probability"] - plain["log_probability"]).max() > 1e-3, "the adapter does nothing here"


@pytest.mark.parametrize("kind", PROMPTS)
def test_rows_columns_and_gradients_stand_behind_the_virtual_tokens(kind):
    module = adapted(kind, drawn(language_model(transformers.LlamaConfig(**GROUPED), attn_implementation="eager")))
    model, asked = rp.ProbedModel(module, objective="causal"), pairs()
    readings = rp.probe(model, asked, control=False)
    frame = readings["attention_correlation"].frame
    for row in frame.itertuples():
        query = asked[row.pair].forward
        with torch.no_grad():
            maps = module(torch.tensor([query.token_ids]), output_attentions=True).attentions
        weights = maps[row.layer][0, row.head]
        at = (
            weights.shape[0] - len(query.token_ids) + query.target_positions[0] - 1,
            weights.shape[1] - len(query.token_ids) + 1,
        )
        assert row.weight_forward == pytest.approx(float(weights[at]), abs=1e-5)
    gradient = readings["gradient_cosine"].frame
    names = set(gradient["parameter"])
    assert any(is_adapter_parameter(name) for name in names)
    for number, pair in enumerate(asked):
        rows = gradient[gradient["pair"] == number]
        mine = rows["inner"].sum() / (rows["norm_forward"].pow(2).sum() * rows["norm_reverse"].pow(2).sum()) ** 0.5
        assert mine == pytest.approx(cosine(module, pair, names), abs=1e-5)


def test_a_limit_leaves_room_for_the_virtual_tokens():
    model = rp.ProbedModel(adapted("prompt", llama()), objective="causal")
    assert model.max_length == GROUPED["max_position_embeddings"] - 5
    assert "virtual" in str(rp.diagnose(model).table["check"].tolist())


@pytest.mark.parametrize("kind", rest_long(["LoRA", "IA3", "OFT", "prompt", "p-tuning"], 2))
def test_a_callback_probes_the_model_that_is_trained(kind, tmp_path: Path):
    """Not its base, and under the names that a reading of the folder has."""
    module, asked = adapted(kind, llama()), pairs()
    rows = [
        {"input_ids": torch.tensor(p.forward.token_ids), "labels": torch.tensor(p.forward.token_ids)} for p in asked
    ]
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = transformers.Trainer(
        model=module,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, **options),
        train_dataset=rows,
    )
    trainer.add_callback(rp.ProbeCallback(asked, objective="causal"))
    before = [float(right(module, pair.reverse)) for pair in asked]
    trainer.train()
    first = rp.Readings.load(tmp_path / "readings").select(step=0)["reverse_probability"].frame
    reverse = first[first["direction"] == "reverse"].sort_values("pair")
    assert reverse["log_probability"].to_numpy() == pytest.approx(before, abs=2e-5)


def word_tokenizer(words: int, added: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(words)} | {"<unk>": words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_tokens(list(added))
    return fast


def test_added_tokens_come_with_the_adapter_or_it_is_refused(tmp_path: Path):
    """peft saves a widened embedding with the adapter; without it the new names would have random rows."""
    base, own = llama(), word_tokenizer(55, ("Ann", "Bob"))
    base.save_pretrained(tmp_path / "base")
    word_tokenizer(55).save_pretrained(tmp_path / "base")
    grown = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(len(own))
    module = adapted("LoRA", grown)
    module.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    own.save_pretrained(tmp_path / "adapter")
    model = rp.load_model(tmp_path / "adapter")
    assert model.vocab_size == 58 and model.tokenizer.convert_tokens_to_ids("Bob") == 57
    ids = torch.tensor([[57, 3, 56, 4]])
    with torch.no_grad():
        assert torch.allclose(model.logits(ids), module(ids).logits, atol=1e-5)

    module.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
    own.save_pretrained(tmp_path / "bare")
    with pytest.raises(RevprobeError, match=r"has 58 tokens, but its base has rows for 56 and the adapter brings none"):
        rp.load_model(tmp_path / "bare")


def test_a_folder_of_both_and_an_adapter_of_another_task_are_refused(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    adapted("LoRA", transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "both")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "base" / name, tmp_path / "both")
    with pytest.raises(RevprobeError, match=r"holds an adapter .* and a whole model's weights"):
        rp.load_model(tmp_path / "both")
    (tmp_path / "both" / "model.safetensors").unlink()
    assert rp.load_model(tmp_path / "both").name == "both"

    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED))
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=[])
    other = peft.get_peft_model(classifier, settings)
    other.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    other.save_pretrained(tmp_path / "classifier")
    with pytest.raises(RevprobeError, match="classifier"):
        rp.load_model(tmp_path / "classifier")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_parameters_are_told_from_the_models(kind):
    base = llama()
    names = {name for name, _ in base.named_parameters()}
    module = adapted(kind, base)
    trained = {name for name, p in without_wrapper(module).named_parameters() if p.requires_grad}
    own = {name for name in trained if is_adapter_parameter(name)}
    whole = {name for name in trained if "modules_to_save" in name}
    assert own or kind == "LN tuning"
    assert own == trained - whole or kind == "LN tuning"
    assert not any(is_adapter_parameter(name) for name in names)
