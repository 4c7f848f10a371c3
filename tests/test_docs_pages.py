"""What the guide promises on sight: code fits its box, all figures are in the gallery, every probe has its question."""

import ast
import inspect
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

import revprobe as rp
from revprobe.probes.figures import assumptions, by_layer, denoising, plot, route_edits
from revprobe.probes.statistics.by_role import NETWORK

FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
# What fits the site's column, see docs/width.css.
LONGEST = 96
# Figures of a reading, by the variable that the gallery calls it, and their kinds beside the first.
KINDS = {
    "reading": plot.KINDS,
    "gradients": plot.GRADIENT_KINDS,
    "stored": ("parts", "matrix"),
    "cut": route_edits.KINDS,
    "lens": by_layer.KINDS,
    "steps": denoising.KINDS,
    "audit": assumptions.KINDS,
}
# Functions that take a model or a run and measure something.
MEASURES = re.compile(
    r"^(probe|trace|audit|rank|compare_models|diagnose|decoded_match|block_sweep)|^(objective|one_step)|curves$"
)


@pytest.fixture(scope="module")
def gallery(root: Path) -> dict[str, Any]:
    return runpy.run_path(str(root / "docs" / "gallery.py"))


def test_every_line_of_code_fits_its_box(root: Path) -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted((root / "docs").glob("**/*.md"))}
    long = [
        f"{name}: {line}"
        for name, page in pages.items()
        for block in FENCE.findall(page)
        for line in block.splitlines()
        if len(line) > LONGEST
    ]
    assert not long, f"of more than {LONGEST} characters, which the site cuts off: {long}"
    assert sum(len(FENCE.findall(page)) for page in pages.values()) > 100, "the blocks were not found"


def calls(gallery: dict[str, Any], page: str) -> list[str]:
    """The call that each picture is of."""
    return [ast.unparse(ast.parse(code).body[-1]) for code, picture in gallery["shown"](page) if picture]


def test_every_figure_stands_in_the_gallery_with_its_picture(root: Path, gallery: dict[str, Any]) -> None:
    """A new kind of figure, a new probe that draws, or a picture without a call makes this fail by its name."""
    page = (root / "docs" / "gallery.md").read_text(encoding="utf-8")
    drawn, code = calls(gallery, page), "".join(code for code, _ in gallery["shown"](page))
    for kinds in KINDS.values():
        for kind in kinds[1:]:
            assert any(f"kind={kind!r}" in call for call in drawn), f"the gallery lacks plot(kind={kind!r})"
    for name in ("rp.compare(", "rp.token_strip(", "run.readings().plot("):
        assert any(name in call for call in drawn), f"the gallery lacks {name}...)"
    made = {
        "assumption_audit": "audit_assumptions",
        "causal_trace": "probe_causal_trace",
        "denoising_trace": "trace_denoising",
        "head_ranking": "rank_heads",
        "lora_gradient_cosine": "probe_gradient_cosine",  # the same figure, of an adapter's gradient
        "objective_terms": "objective_terms",
        "stored_evidence_first_order": "probe_stored_evidence",  # the same figure, its title says to which order
    }
    for name in plot.RENDERERS:
        assert f"rp.{made.get(name, f'probe_{name}')}(" in code, f"the gallery draws no {name}"
    for name, alike in (
        ("lora_gradient_cosine", "gradient_cosine"),
        ("stored_evidence_first_order", "stored_evidence"),
    ):
        assert plot.RENDERERS[name] is plot.RENDERERS[alike]
    for kind in (rp.BlockSweep, rp.ModelComparison):
        maker = {"BlockSweep": "block_sweep", "ModelComparison": "compare_models"}[kind.__name__]
        assert f"rp.{maker}(" in code and "plot" in vars(kind)
    pictures = {picture for _, picture in gallery["shown"](page) if picture}
    there = {path.relative_to(root / "docs").as_posix() for path in (root / "docs" / "gallery").glob("*")}
    assert pictures == there, "a picture without a call, or a call without a picture"
    assert sum((root / "docs" / picture).stat().st_size for picture in pictures) < 1_500_000


def test_the_code_of_the_gallery_draws_figures(gallery: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """On a run of two steps, each block under a picture ends with a figure that has something in it."""
    run = gallery["small_run"](tmp_path, steps=2)
    page = (root / "docs" / "gallery.md").read_text(encoding="utf-8").replace("draws=256", "draws=16")
    found: Iterator[tuple[str, go.Figure]] = gallery["figures"](page, run)
    for picture, figure in found:
        assert isinstance(figure, go.Figure) and len(figure.data), picture
    shutil.rmtree(run)


def test_every_probe_answers_a_question(root: Path) -> None:
    table = (root / "docs" / "questions.md").read_text(encoding="utf-8")
    measures = [name for name in rp.__all__ if MEASURES.search(name) and inspect.isfunction(getattr(rp, name))]
    assert len(measures) > 18, measures
    missing = [name for name in measures if f"`{name}`" not in table]
    assert not missing, f"docs/questions.md has no question for {missing}"
    named = {name for name in re.findall(r"`(\w+)`", table)}
    assert named <= set(rp.__all__), f"docs/questions.md names {named - set(rp.__all__)}, which is not public"


def test_the_glossary_has_the_words_of_the_frames(root: Path) -> None:
    page = (root / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\*\*([^*]+)\*\*", page))
    asked = {
        "readout row",
        "deranged",
        "kind",
        "offset",
        "distance",
        "group",
        "role",
        "control",
        "excess",
        "fact",
        "pair",
    }
    assert asked <= words, asked - words
    row = next(line for line in page.splitlines() if line.startswith("| **role**"))
    listed = row.partition("order:")[2]
    places = [listed.index(f" {role}") for role in NETWORK if role != "qkv"]
    assert places == sorted(places), "roles in the network's order"
