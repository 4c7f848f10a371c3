"""How large is the report of a large run, and how soon does a browser show it?

    python examples/benchmarks/report_size.py
    python examples/benchmarks/report_size.py --checkpoints 50 --layers 32 --heads 32 --pairs 500

Makes up the readings of such a run (scores and gradients from random numbers), writes its report, opens it in a
headless Chromium and prints the file's size, the seconds until its first tab is drawn, and the seconds of one move of
the checkpoint slider on the routing tab. Needs Chromium with its driver and the package's [test] extra (selenium).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from revprobe import Reading, Readings
from revprobe.finetune.runs.record import RunRecord
from revprobe.report.html.report import write_report

PLACEMENTS = 10  # pairs of offsets: 500 pairs are 50 facts at ten of them
ROLES = ("q", "k", "v", "o", "mlp", "mlp", "norm", "norm")  # of a layer's parameters


def main() -> None:
    """Make the run, write its report, open it."""
    parser = argparse.ArgumentParser(description="Size and loading time of the report of a large run.")
    for name, number in (("checkpoints", 50), ("layers", 32), ("heads", 32), ("pairs", 500), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    asked = parser.parse_args()
    readings = made_up(asked.checkpoints, asked.layers, asked.heads, asked.pairs)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = RunRecord("large", {"objective": "masked", "position_encoding": "rope"}, {"name": "large"}, readings)
        page = write_report([run], Path(folder) / "report.html", title="a large run")
        written = time.perf_counter() - began
        rounds = [opened(page, Path(folder) / f"profile-{turn}") for turn in range(asked.rounds)]
        numbers = {"megabytes": page.stat().st_size / 1e6, "seconds_to_write": written}
    for name in ("seconds_to_load", "seconds_in_page", "cpu_seconds_to_load", "seconds_to_move"):
        numbers[name] = statistics.median(one[name] for one in rounds)
    shape = {name: getattr(asked, name) for name in ("checkpoints", "layers", "heads", "pairs")}
    load = os.getloadavg()[0] / (os.cpu_count() or 1)  # above 1 the machine is busy with something else
    print(json.dumps(shape | {name: round(number, 2) for name, number in numbers.items()} | {"load": round(load, 1)}))


def made_up(checkpoints: int, layers: int, heads: int, pairs: int) -> Readings:
    """Readings of a run that learns: correlations rise from step to step, each head's in its own measure."""
    return Readings(
        reading for place in range(checkpoints) for reading in _checkpoint(place, checkpoints, layers, heads, pairs)
    )


def _checkpoint(place: int, checkpoints: int, layers: int, heads: int, pairs: int) -> list[Reading]:
    rng = np.random.default_rng(place)
    about = {"model": "large", "objective": "masked", "kind": "same_target", "step": 100 * place, "weights": "raw"}
    pair = np.arange(pairs)
    fact, group = pair // PLACEMENTS, pair % PLACEMENTS
    facts = np.array([f"fact {one}" for one in range(fact.max() + 1)], dtype=object)
    shared, own = rng.normal(size=(2, layers, heads, pairs)).astype(np.float32)
    grown = (place + 1) / checkpoints * rng.uniform(size=(layers, heads, 1)).astype(np.float32)
    whole = layers * heads
    columns: dict[str, Any] = {name: np.tile(one, whole) for name, one in (("pair", pair), ("fact", facts[fact]))}
    columns |= {"group": np.tile(group, whole), "layer": np.repeat(np.arange(layers), heads * pairs)}
    columns |= {"head": np.tile(np.repeat(np.arange(heads), pairs), layers)}
    for side, sign in (("forward", 1), ("reverse", -1)):
        distance = np.tile(1 + (group if side == "forward" else (3 * group) % PLACEMENTS), whole)
        columns |= {f"offset_{side}": sign * distance, f"distance_{side}": distance}
    columns |= {"score_forward": shared.ravel(), "score_reverse": (grown * shared + (1 - grown) * own).ravel()}
    attention = pd.DataFrame(columns).assign(reason="")
    made = [
        Reading("attention_correlation", attention, about),
        Reading("gradient_cosine", _gradients(rng, layers, pair, facts[fact]), about),
        Reading("reverse_probability", _probabilities(rng, pair, facts[fact]), about),
    ]
    # A saved reading carries its number; working out that of half a million rows is not what is measured here.
    few = attention[(attention["layer"] < 2) & (attention["head"] < 2)].reset_index(drop=True)
    made[0].__dict__["measured"] = Reading("attention_correlation", few, about).measured
    return made


def _gradients(rng: np.random.Generator, layers: int, pair: np.ndarray, fact: np.ndarray) -> pd.DataFrame:
    names: list[tuple[str, int | None]] = [("embed", None), ("unembed", None)]
    names += [(role, layer) for layer in range(layers) for role in ROLES]
    columns: dict[str, Any] = {"pair": np.tile(pair, len(names)), "fact": np.tile(fact, len(names))}
    columns["role"] = np.repeat([role for role, _ in names], len(pair))
    columns["layer"] = pd.array([layer for _, layer in names], dtype="Int64").repeat(len(pair))
    columns["parameter"] = np.repeat(
        [f"{role}.{layer}.{place}" for place, (role, layer) in enumerate(names)], len(pair)
    )
    size = len(names) * len(pair)
    columns |= {"inner": rng.uniform(-0.2, 1, size), "inner_control": rng.uniform(-0.2, 0.2, size)}
    columns |= {f"norm_{name}": 1.0 for name in ("forward", "reverse", "control")}
    columns |= {f"floor_{name}": 1e-6 for name in ("forward", "reverse", "control")}
    return pd.DataFrame(columns)


def _probabilities(rng: np.random.Generator, pair: np.ndarray, fact: np.ndarray) -> pd.DataFrame:
    probability = rng.uniform(size=2 * len(pair))
    columns = {"pair": np.tile(pair, 2), "fact": np.tile(fact, 2), "probability": probability, "rank": 1}
    columns |= {"direction": np.repeat(["forward", "reverse"], len(pair)), "log_probability": np.log(probability)}
    columns |= {"argmax_match": probability > 0.5, "probability_control": probability / 10}
    return pd.DataFrame(columns | {"argmax_match_control": False})


def opened(page: Path, profile: Path) -> dict[str, float]:
    """Seconds until the page is drawn, as seen from outside and by its own clock, and those of a slider move."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1600"):
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={profile}")
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )
    try:
        driver.set_page_load_timeout(300)
        driver.get("about:blank")
        # The thread's own processor time: what an idle machine would need, however busy this one is.
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        began = time.perf_counter()
        driver.get(page.as_uri())
        inside = _drawn(driver)
        outside = time.perf_counter() - began
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        busy = next(one["value"] for one in metrics if one["name"] == "TaskDuration")
        driver.execute_script("document.querySelector('[data-tab=routing]').click()")
        _drawn(driver)
        before = driver.execute_script("return performance.now()")
        move = (
            "const one = document.getElementById('explore-step'); one.value = 3; one.dispatchEvent(new Event('input'))"
        )
        driver.execute_script(move)
        moved = (_drawn(driver) - before) / 1000
    finally:
        driver.quit()
    seen = {"seconds_to_load": outside, "seconds_in_page": inside / 1000, "seconds_to_move": moved}
    return seen | {"cpu_seconds_to_load": busy}


def _drawn(driver: Any) -> float:
    """Wait until the page has drawn what it was asked for; its own clock then, in milliseconds."""
    while True:
        state, clock = driver.execute_script("return [document.body.dataset.drawn, performance.now()]")
        if state == "yes":
            return float(clock)
        if state == "failed":
            raise RuntimeError("the page could not draw; open it and look at its console")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
