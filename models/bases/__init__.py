"""The classes that families are made of: transformers' decoders without their causal mask, and our own encoder."""
