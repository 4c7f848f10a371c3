"""What is measured on: RADD, LLaDA, Dream, the one-layer GPT-2, any transformers language model, and their wrapper.

Importing the package registers RADD, LLaDA and Dream with transformers' Auto classes, so that `from_pretrained` on
their folders never asks for remote code.
"""

from . import dream, llada, radd  # noqa: F401 - imported to register them
