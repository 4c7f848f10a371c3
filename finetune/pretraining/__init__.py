"""Small models in published layouts, and what they read before they are fine-tuned."""
