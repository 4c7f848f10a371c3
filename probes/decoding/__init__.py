"""How a model answers in its own words, and whether the answer is right."""
