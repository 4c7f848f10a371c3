"""Families whose published files no class of transformers reads: how each is recognised, and what it is called here."""
