"""What changes the model: trainings asked for in YAML, their runs in folders, and what is worked out from these.

config      a run and a sweep: one_layer, finetuning, pretraining; mistakes: what a wrong one says
training    objectives: the masked-diffusion and the causal loss; trainer: transformers' Trainer with them; dataset,
            lora: a fine-tuning's rows and adapter; ema: the average of the weights;
            probe_callback, prediction_callback: what is read while a model trains; adamw_update: its coming step;
            checkpointing: whole or absent; distributed: several processes; stacked_models: several models as one
pretraining small models in published layouts: layouts, corpus, rows; tiny_models: those a run builds for itself
runs        one run in one folder: one_layer, finetuning (finetune_setup: from its config to objects); batched, jobs:
            many as one or side by side; sweeps: their folder; progress, record: what is shown of them
memory      what a fine-tuning will need, from shapes alone
analysis    what is worked out from a finished run's checkpoints
"""
