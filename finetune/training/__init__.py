"""How a model is changed and watched: trainer, objectives, data, LoRA, checkpoints, callbacks."""
