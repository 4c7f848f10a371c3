"""What Section 6 in miniature consists of, and what the paper prints of it: fixed before the runs, whatever was run.

A test holds this against the YAML files in examples/.
"""

from __future__ import annotations

from typing import NamedTuple

MAIN, ABLATIONS, METHODS, MODELS = "section6", "section6-ablations", "section6-methods", "mini-models"
# What is left out first when time runs short stands last.
DROP_ORDER = (MAIN, ABLATIONS, METHODS)
PLANNED = {MAIN: 75, ABLATIONS: 48, METHODS: 36}  # runs
MASKED, CAUSAL = ("mini-llada", "mini-dream", "mini-mlm"), ("mini-llama", "mini-qwen2")
DIFFUSION = ("mini-llada", "mini-dream")
TABLE_MODELS = ("mini-llada", "mini-dream", "mini-llama", "mini-qwen2", "mini-mlm")
SEEDS = (0, 1, 2)
# Which cells need not have learned the forward direction, by design: models of the main table, and ablations.
EXEMPT_MODELS, EXEMPT_ABLATIONS = ("mini-mlm",), ("never-first", "never-second")
LEARNED, FLOOR = 0.90, 0.05
PLAIN = "plain"


class Trained(NamedTuple):
    """A dataset and the direction that is trained."""

    dataset: str
    direction: str

    @property
    def words(self) -> str:
        return f"{self.dataset} ({self.direction})"


DATASETS = (
    Trained("parent-child", "P2C"),
    Trained("parent-child", "C2P"),
    Trained("person-description", "P2D"),
    Trained("person-description", "D2P"),
    Trained("trex", "s2o"),
)
# Per cent, (forward, reverse): all of Table 7 but Qwen-3.5 4B, which has no counterpart here.
TABLE_7: dict[Trained, dict[str, tuple[float, float]]] = {
    trained: dict(zip(("mini-llada", "mini-dream", "mini-llama", "mini-qwen2"), printed, strict=True))
    for trained, printed in zip(
        DATASETS,
        (
            ((76.7, 48.3), (62.0, 50.0), (89.9, 15.9), (89.9, 0.5)),
            ((87.7, 43.7), (83.0, 54.0), (95.9, 6.9), (89.0, 1.4)),
            ((72.7, 99.5), (54.3, 99.8), (72.7, 3.5), (70.7, 2.2)),
            ((99.7, 41.3), (100.0, 27.2), (83.0, 1.8), (80.0, 1.5)),
            ((92.3, 81.5), (83.0, 35.0), (87.3, 2.8), (89.8, 2.3)),
        ),
        strict=True,
    )
}
PAPER_NAMES = {
    "mini-llada": "LLaDA 8B",
    "mini-dream": "Dream 7B",
    "mini-llama": "LLaMA-3.1 8B",
    "mini-qwen2": "Qwen-2.5 7B",
}


class Cell(NamedTuple):
    """The runs that differ by their seed alone."""

    sweep: str
    model: str
    dataset: str
    direction: str
    variant: str = ""

    @property
    def words(self) -> str:
        """How tables call it: the model, then what it is varied by, then what it was trained on."""
        varied = f", {self.variant}" if self.variant else ""
        return f"{self.model}{varied}, {self.dataset} ({self.direction})"


def main_cell(model: str, trained: Trained) -> Cell:
    """A cell of the main table."""
    return Cell(MAIN, model, trained.dataset, trained.direction)


def ablation_cell(variant: str) -> Cell:
    """A cell of the ablations; the plain one is the main table's."""
    model, trained = "mini-llada", DATASETS[0]
    return main_cell(model, trained) if variant == PLAIN else Cell(ABLATIONS, model, *trained, variant)
