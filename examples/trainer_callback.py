"""Probes in a training script of your own: one callback in any transformers Trainer, nothing else changes.

    python examples/trainer_callback.py

A small BERT, built here and untrained, learns one direction of a few invented facts by plain masked language
modelling, with transformers' own data collator. With your model and data, keep the lines marked (1) to (3).
"""

import tempfile
from pathlib import Path

from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import revprobe as rp
from revprobe.finetune.pretraining.layouts import train_tokenizer


def main() -> None:
    relation = rp.invented_names(rows=(0, 40))  # (1) facts, their texts and their pairs
    texts = relation.training_texts("P2C")
    tokenizer = train_tokenizer(texts, vocabulary=500)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size, **ids))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=40, per_device_train_batch_size=16, learning_rate=1e-3, save_steps=20, report_to="none"
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row} for row in tokenizer(texts)["input_ids"]],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
        )
        probed = rp.ProbedModel(model, tokenizer, objective="masked")
        pairs = relation.pairs(probed, "P2C", limit=20)  # (2) what the trained direction is probed with
        trainer.add_callback(rp.ProbeCallback(pairs, log=trainer.log, tokenizer=tokenizer, objective="masked"))  # (3)
        trainer.train()

        readings = rp.Readings.load(Path(folder) / "readings")
        columns = ["step", "measure", "value", "low", "high", "control"]
        print(readings.measures()[columns].to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
