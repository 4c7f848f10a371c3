"""Made runs for tests of a report's page, and what a reader does there."""

import json
import time
from typing import Any

import numpy as np
import pandas as pd

from revprobe import Reading, Readings
from revprobe.finetune.runs.record import RunRecord
from tiny import made_probabilities

EVIL = "</script><script>document.title='planted'</script><img src=x onerror=\"document.title='planted'\"><b>%{x}"
SIDES = ("forward", "reverse")
FACTS = [EVIL, *"bcdefghij"]
NUMBERS = ("value", "low", "high", "difference", "difference_low", "difference_high")
CONTROLS = [
    {"control": name, "model": EVIL, "n": 10, "facts": 10, "reason": EVIL} | dict.fromkeys(NUMBERS, value)
    for name, value in (("untrained", 0.25), ("sink", 0.5))
]


def attention(draw: int, about: dict[str, Any]) -> Reading:
    """Two layers of two heads; every head's correlation depends on the draw."""
    rng = np.random.default_rng(draw)
    parts = []
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for group, (forward, reverse) in enumerate([(1, 1), (1, 2), (2, 1)]):
            shared, own = rng.normal(size=(2, 10))
            columns = {"pair": 10 * group + np.arange(10), "fact": FACTS, "group": group, "layer": layer, "head": head}
            columns |= {"offset_forward": forward, "offset_reverse": -reverse, "distance_forward": forward}
            columns |= {"distance_reverse": reverse, "score_forward": shared + 5 * group, "reason": ""}
            parts.append(pd.DataFrame(columns | {"score_reverse": shared + (layer + 1) * own}))
    return Reading("attention_correlation", pd.concat(parts, ignore_index=True), about)


def gradient(draw: int, about: dict[str, Any]) -> Reading:
    rng = np.random.default_rng(draw)
    parts = []
    for role, layer in (("embed", pd.NA), ("q", 0), ("q", 1), ("v", 1)):
        columns = {"pair": np.arange(10), "fact": FACTS, "parameter": f"{role}.{layer}", "role": role}
        columns |= {"inner": rng.uniform(-0.2, 1, 10), "norm_forward": 1.0, "norm_reverse": 1.0, "norm_control": 1.0}
        columns |= {"floor_forward": 1e-6, "floor_reverse": 1e-6, "floor_control": 1e-6, "inner_control": 0.1}
        parts.append(pd.DataFrame(columns).assign(layer=pd.array([layer] * 10, dtype="Int64")))
    return Reading("gradient_cosine", pd.concat(parts, ignore_index=True), about)


def readings(*steps: int, weights: tuple[str, ...] = ("raw", "ema"), **more: Any) -> Readings:
    made: list[Reading] = []
    for step in steps:
        for place, which in enumerate(weights):
            about = {"kind": "same_target", "objective": "masked", "step": step, "weights": which, "model": "toy"}
            about |= more
            made += [make(2 * step + place, about) for make in (attention, gradient)]
            made.append(made_probabilities(2 * step + place, FACTS, about))
    return Readings(made)


def made_runs() -> list[RunRecord]:
    """Two runs that can be drawn, one of them with names that are markup, and one that is damaged."""
    return [
        RunRecord(EVIL, {"position_encoding": EVIL}, {EVIL: EVIL}, readings(0, 10, 500, model=EVIL), EVIL),
        RunRecord("b", {"position_encoding": "rope"}, {}, readings(0, 10, weights=("raw",), controls=CONTROLS), None),
        RunRecord("broken", {}, {}, Readings([]), "step-000010 is truncated: <cut>"),
    ]


def matches(datasets: int) -> pd.DataFrame:
    """Exact matches of three models, three seeds each, as a fine-tuning's `match_frame` has them: a row per dataset."""
    models = ("llada", "dream", "llama")
    asked = [(f"{EVIL} {n}", m, s, side) for n in range(datasets) for m in models for s in range(3) for side in SIDES]
    columns = ["dataset", "model", "seed", "asked"]
    numbers = {"value": 0.87, "low": 0.8, "high": 0.9, "n": 1000, "facts": 500, "control": 0.0}
    made = pd.DataFrame(asked, columns=columns).assign(direction="P2C", variant="one span", **numbers)
    made["value"] = np.random.default_rng(0).uniform(size=len(made))
    return pd.concat([made.assign(split=split) for split in ("train", "heldout")], ignore_index=True)


def drawn(browser: Any) -> None:
    """Wait until the page has drawn what it was asked for."""
    deadline = time.monotonic() + 60
    while browser.execute_script("return document.body.dataset.drawn") != "yes":
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)


def change(browser: Any, name: str, value: object) -> None:
    """Set a selector or the slider as a reader would, and wait for the drawing."""
    event = "input" if name == "explore-step" else "change"
    script = "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
    browser.execute_script(script + "one.dispatchEvent(new Event(arguments[2]));", name, str(value), event)
    drawn(browser)


def open_tab(browser: Any, name: str) -> None:
    browser.execute_script(f"document.querySelector('[data-tab={name}]').click()")
    drawn(browser)


def traces(browser: Any, panel: str) -> list[dict[str, Any]]:
    script = f"return JSON.stringify(document.getElementById('{panel}').data)"
    found: list[dict[str, Any]] = json.loads(browser.execute_script(script))
    return found


def said(browser: Any, name: str) -> str:
    return str(browser.execute_script(f"return document.getElementById('{name}').textContent"))


def awaited(browser: Any, script: str) -> None:
    """Wait until a script of the page is true: a window's new size is told to its page some frames later."""
    deadline = time.monotonic() + 60
    while not browser.execute_script(f"return {script}"):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)


def choose_theme(browser: Any, name: str) -> None:
    browser.find_element("css selector", f"[name=theme][value={name}]").click()
    drawn(browser)
