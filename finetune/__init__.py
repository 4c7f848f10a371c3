"""What changes the model: relations, objectives, training, snapshots, runs and sweeps.

relations   the facts, the texts trained on, the pairs that probe them
objectives  the masked-diffusion and the causal loss
trainer     transformers' Trainer with them; ema: the average of the weights
snapshots   the callback that probes while a model trains; saving: whole or absent; missing: readings taken again
config      what a run and a sweep are; mistakes: what a wrong one says; building: from a config to objects
runs        one run in one folder; sweeps: many, side by side; progress, terminal: what is shown of them
finetuning  LoRA on one direction; finetune_config, finetune_building: from its config to objects; lora: the adapter;
            text_rows: its rows; tiny_models: bases built here; table7, figure4, finetune_report: what is shown of it
"""
