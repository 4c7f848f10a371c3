"""The first hour of somebody new: what README tells them to type, as it stands there, and how long each step takes.

    python examples/benchmarks/first_time.py              # clone, make demo, report, snippet, command line, own GPT-2
    python examples/benchmarks/first_time.py --quick      # without the demo: its run is one of two steps

A new clone of this checkout's last commit, in a folder that is deleted at the end. "report.html drawn" is a headless
Chromium until all of its figures stand; "own GPT-2" saves one of random weights in transformers' layout and reads its
three probes on three facts by the calls of README's "Your own model"; the command line diagnoses it. Seconds are one
run's, by the clock: of `make demo` most are the index that packages come from, and training.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import show

ROOT = Path(__file__).resolve().parents[2]
RUN = "runs/one-layer-quick/rope-l10-s0"
# Stands for the demo's run: README's snippet reads any run of that name.
TWO_STEPS = f"""
import revprobe as rp
from revprobe.finetune.config.one_layer import RunConfig
training = {{"steps": 2, "batch_size": 8, "warmup_steps": 1, "threads": 1, "device": "cpu", "ema_decay": 0.5}}
config = {{"name": "rope-l10-s0", "relation": {{"length": 10}}, "model": {{"d_model": 8}}, "training": training}}
rp.train(RunConfig(**config, snapshots={{"steps": [1]}}), "{RUN}")
"""
OWN_GPT2 = """
import pandas as pd
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
import revprobe as rp

words = ["<unk>", "<pad>", "<s>", *"Fact : ' s child is parent Ann Bob Cem Dua Eve Fay".split()]
made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="<s>"
)
config = transformers.GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2)
module = transformers.GPT2LMHeadModel(config).eval()
module.save_pretrained("own")
tokenizer.save_pretrained("own")
model = rp.load_model("own")
frame = pd.DataFrame({"parent": ["Ann", "Cem", "Eve"], "child": ["Bob", "Dua", "Fay"]})
pairs = rp.pairs_from_frame(
    frame,
    forward="{target}'s child is {evidence}",
    reverse="{evidence}'s parent is {target}",
    target="parent",
    evidence="child",
    carrier="Fact: ",
    model=model,
)
print(rp.probe(model, pairs))
"""


def steps(clone: Path, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is done, in order, under README's words for it."""
    python, revprobe = (
        (sys.executable, str(Path(sys.executable).with_name("revprobe")))
        if quick
        else (".venv/bin/python", ".venv/bin/revprobe")
    )

    def run(*command: str) -> None:
        inside = {**os.environ, "PYTHONPATH": str(clone.parent)} if quick else dict(os.environ)
        done = subprocess.run(
            command, cwd=clone, env=inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            sys.exit(f"{shlex.join(command)[:100]}: exit status {done.returncode}\n{done.stdout[-3000:]}")

    yield "git clone", lambda: subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    if quick:
        yield "a run of two steps", lambda: run(python, "-P", "-c", TWO_STEPS)
        yield "revprobe report", lambda: run(revprobe, "report", RUN)
    else:
        yield "make demo", lambda: run("make", "demo")
    report = clone / RUN / "report.html" if quick else clone / "runs" / "one-layer-quick" / "report.html"
    yield "report.html drawn", lambda: run(python, "examples/screenshots.py", str(report), "report.png")
    readme = (clone / "README.md").read_text(encoding="utf-8")
    yield (
        "README's snippet",
        lambda: run(python, "-P", "-c", re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)[0]),
    )
    (line,) = re.findall(r"^(revprobe probe .*?) *#.*$", readme, re.M)
    yield line.replace(RUN, "RUN"), lambda: run(revprobe, *shlex.split(line)[1:])
    yield "own GPT-2: pairs, three probes", lambda: run(python, "-P", "-c", OWN_GPT2)
    yield "revprobe diagnose own", lambda: run(revprobe, "diagnose", "own")


def main() -> None:
    """Take the steps one after the other; the first that fails ends it, with what was printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="this environment, and a run of two steps for the demo")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="first-time-") as folder:
        begun = time.perf_counter()
        for name, step in steps(Path(folder) / "revprobe", asked.quick):
            start = time.perf_counter()
            step()
            rows.append({"step": name, "seconds": round(time.perf_counter() - start, 1)})
            print(f"{name}: {rows[-1]['seconds']} s", flush=True)
        rows.append({"step": "in all", "seconds": round(time.perf_counter() - begun, 1)})
    show("first_time", rows)


if __name__ == "__main__":
    main()
