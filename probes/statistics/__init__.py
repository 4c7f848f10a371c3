"""From rows to numbers with their uncertainty; knows nothing of models or readings."""
