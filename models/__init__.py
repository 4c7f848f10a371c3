"""What is measured on: RADD, LLaDA, Dream, the one-layer GPT-2, any transformers language model, and their wrapper."""
