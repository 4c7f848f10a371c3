"""What is measured on: RADD, the one-layer GPT-2, and the wrapper that every probe speaks to."""
