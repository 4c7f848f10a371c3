"""The guide and the reference: every public name is in it, its code runs, its error texts are real, and it builds."""

import ast
import doctest
import inspect
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import revprobe
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.pretraining.layouts import train_tokenizer
from tiny import in_blocks

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
ENTRY = re.compile(r"^::: revprobe\.(\S+)$", re.M)
needs_mkdocs = pytest.mark.skipif(
    not all(find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the docs extra is not installed: pip install -e '.[docs]'",
)


@pytest.fixture(scope="module")
def pages(root) -> dict[str, str]:
    """Every page of the guide and the reference, by its path in docs/."""
    return {path.relative_to(root / "docs").as_posix(): path.read_text() for path in sorted(root.glob("docs/**/*.md"))}


def blocks(page: str) -> list[str]:
    return BLOCK.findall(page)


def entries(pages: dict[str, str]) -> Counter:
    """What the reference documents, each with how often."""
    return Counter(
        name for path, text in pages.items() if path.startswith("reference/") for name in ENTRY.findall(text)
    )


def test_the_reference_has_every_public_name_once(pages):
    """A new public name makes this fail by that name; so does one that is gone."""
    found = entries(pages)
    missing = [name for name in revprobe.__all__ if name not in found]
    assert not missing, f"docs/reference/ lacks {missing}: add `::: revprobe.{missing[0]}` to the page of its topic"
    assert max(found.values()) == 1, f"documented twice: {[name for name, count in found.items() if count > 1]}"
    gone = [name for name in found if "." not in name and name not in revprobe.__all__]
    assert not gone, f"docs/reference/ documents {gone}, which is not public"


def public_calls(code: str) -> list[tuple[str, ast.AST]]:
    """Every use of `rp.name` in a block, with the call it is part of, if any."""
    tree = ast.parse(code)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        (node.attr, calls.get(id(node), node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rp"
    ]


def test_the_code_of_the_guide_compiles_and_uses_public_names_and_their_arguments(pages):
    used = set()
    for path, text in pages.items():
        for code in blocks(text):
            compile(code, path, "exec")
            for name, call in public_calls(code):
                assert name in revprobe.__all__, f"{path} uses rp.{name}, which is not public"
                used.add(name)
                given = [k.arg for k in call.keywords if k.arg] if isinstance(call, ast.Call) else []
                known = inspect.signature(getattr(revprobe, name)).parameters
                free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
                wrong = [argument for argument in given if argument not in known]
                assert free or not wrong, f"{path}: rp.{name} has no argument {wrong}"
    assert len(used) > 20, f"the guide shows {sorted(used)} only: the blocks were not found"


def test_the_guide_runs(pages, tmp_path, monkeypatch):
    """Quick start, then the pages that go on from it, in one namespace, with a run of two steps for the demo's."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/one-layer-quick/rope-l10-s0")
    small = {"d_model": 8, "n_heads": 1}
    training = {"steps": 2, "batch_size": 8, "warmup_steps": 1, "threads": 1, "device": "cpu"}
    config = {"name": run.name, "relation": {"length": 10, "alphabet": 9}, "model": small, "training": training}
    revprobe.train(RunConfig(**config, snapshots={"steps": [1]}), run)
    names: dict[str, object] = {}
    guide = ("quick-start.md", "probes.md", "controls.md", "storage-and-routes.md", "logit-lens.md", "stored-once.md")
    guide += ("objective-terms.md", "theory.md", "runs.md")
    for page in ("index.md", *guide, "figures.md"):
        for place, code in enumerate(blocks(pages[page])):
            code = re.sub(r"length=\d+", "length=4, alphabet=9", code)
            exec(compile(code, f"{page}, block {place}", "exec"), names)
    assert (
        names["reading"].name == "attention_correlation" and names["reading"].n == 9 * 81
    )  # every distance x distance x letter
    assert {reading.name for reading in names["readings"]} > {"gradient_cosine", "reverse_probability"}
    assert names["model"].step == 2 and names["model"].weights == "ema", "the block did not load the run's last average"
    assert names["cut"].value < 0.01 and torch.isfinite(names["logits"]).any()
    assert Path("signatures.html").stat().st_size > 1000


@pytest.fixture
def small_bert(tmp_path) -> dict[str, object]:
    """What the pages about text take as given: a tokenizer, a masked module, and a Trainer of a few steps."""
    texts = [text for way in ("P2C", "C2P") for text in revprobe.invented_names(rows=(0, 40)).training_texts(way)]
    tokenizer = train_tokenizer([*texts, "Ann Hale Cy Dorn Bo Hale Di Dorn"], vocabulary=500)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    module = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size, **ids))
    trainer = Trainer(
        model=module,
        args=TrainingArguments("output", max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none"),
        train_dataset=[{"input_ids": row} for row in tokenizer(texts)["input_ids"]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
    )
    return {"rp": revprobe, "tokenizer": tokenizer, "module": module, "trainer": trainer}


def test_the_pages_about_text_run(pages, tmp_path, monkeypatch, request):
    """Pairs from a table, a relation, callbacks in a Trainer and decoding, as the guide shows them."""
    monkeypatch.chdir(tmp_path)
    names = request.getfixturevalue("small_bert")
    for page, wanted in (
        ("attach.md", ("rp.ProbedModel(", "rp.pairs_from_frame(", "rp.ReversalPairs.from_pairs(")),
        ("fine-tune.md", ("rp.invented_names(", "rp.ProbeCallback(", "rp.decoded_match(")),
    ):
        shown = [code for code in blocks(pages[page]) if any(name in code for name in wanted)]
        assert len(shown) == len(wanted), f"{page} no longer shows {wanted}"
        for code in shown:
            exec(compile(code, page, "exec"), names)
    assert len(names["of_ids"]) == 3
    assert len(names["pairs"]) == 2 and names["pairs"].kind == "same_target"
    assert names["readings"].steps == [0, 2] and len(names["readings"]) == 6
    assert 0 <= names["match"].value <= 1 and names["match"].n == len(names["questions"])


def test_the_page_about_twins_runs(pages, tmp_path, monkeypatch, small_bert):
    """A GPT-2 and a BERT with one tokenizer stand for parent and child."""
    monkeypatch.chdir(tmp_path)
    tokenizer, module = small_bert["tokenizer"], small_bert["module"]
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128, **ids)
    names = {
        "rp": revprobe,
        "relation": revprobe.invented_names(rows=(0, 12)),
        "parent": revprobe.ProbedModel(GPT2LMHeadModel(config), tokenizer, objective="causal"),
        "child": revprobe.ProbedModel(module, tokenizer, objective="masked"),
    }
    for place, code in enumerate(blocks(pages["twins.md"])):
        exec(compile(code, f"twins.md, block {place}", "exec"), names)
    assert names["compared"].frame["value"].notna().any() and names["as_parent"].block_size == 1
    assert revprobe.ModelComparison.load("compared").frame.equals(names["compared"].frame)


def test_the_page_about_blocks_runs(pages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = in_blocks(4)
    pairs = revprobe.letter_pairs(5, model=model, placements="mirror", alphabet=9)
    names = {"rp": revprobe, "model": model, "pairs": pairs}
    for place, code in enumerate(blocks(pages["blocks.md"])):
        exec(compile(code, f"blocks.md, block {place}", "exec"), names)
    assert "evidence in a later block" not in names["reading"].undefined, "in reverse the evidence stands before"
    assert revprobe.BlockSweep.load("swept").frame.equals(names["sweep"].frame)


@pytest.fixture(scope="module")
def literals(root, package_files) -> list[str]:
    """Every text in the package's code, f-strings included, with … for what is filled in."""
    found = []
    for path in package_files:
        for node in ast.walk(ast.parse((root / path).read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def raised(quoted: str, literals: list[str]) -> bool:
    """Whether one text of the code holds the fixed parts of a quoted message, in order."""
    parts = [re.escape(part.strip()) for part in quoted.split("…") if part.strip()]
    return any(re.search(".*".join(parts), text, re.S) for text in literals)


def test_every_error_of_the_faq_is_one_the_code_raises(pages, literals):
    quoted = re.findall(r"^### `(.+)`$", pages["errors.md"], re.M)
    assert len(quoted) > 25, "the headings of errors.md were not found"
    unknown = [text for text in quoted if not raised(text, literals)]
    assert not unknown, f"no message of the code reads like {unknown}"
    assert not raised("no message … reads like this one", literals), "the comparison takes anything"
    for entry in re.split(r"^### ", pages["errors.md"], flags=re.M)[1:]:
        assert "**Cause.**" in entry and "**Remedy.**" in entry, f"{entry.splitlines()[0]} lacks a cause or a remedy"


@needs_mkdocs
def test_labelled_parts_of_a_docstring_become_lists_and_paragraphs(root):
    """The house style has no blank line between parts, which plain Markdown would run together."""
    style = runpy.run_path(str(root / "docs" / "docstring_style.py"))
    example = doctest.DocTestFinder().find(style["as_markdown"], "as_markdown", globs=style)
    assert doctest.DocTestRunner().run(example[0]) == (0, 1)
    shown = style["as_markdown"](inspect.getdoc(revprobe.probe_gradient_cosine))
    for label in ("Frame", "Raises", "Source"):
        assert f"\n\n**{label}:** " in shown, f"{label} is no paragraph of its own"
    assert style["as_markdown"]("One line.\n\n>>> 1 < 2\nTrue") == "One line.\n\n```pycon\n>>> 1 < 2\nTrue\n```"


class Page(HTMLParser):
    """What a page asks a server for, where it links to, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given.get("id") or "", given.get("name") or ""}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        loads = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}
        if tag in loads and given.get(loads[tag]):
            self.loaded.append(str(given[loads[tag]]))


@pytest.fixture(scope="module")
def site(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--config-file", root / "mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "--site-dir", folder], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def built(site) -> dict[Path, Page]:
    found = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert len(found) > 18, f"pages are missing: {[path.name for path in found]}"
    return found


@needs_mkdocs
def test_the_strict_build_shows_every_public_name(site, built, pages):
    anchors = {anchor for path, page in built.items() if path.parent.name == "reference" for anchor in page.anchors}
    missing = [name for name in entries(pages) if f"revprobe.{name}" not in anchors]
    assert not missing, f"the built reference lacks {missing}"
    text = (site / "reference" / "theory.html").read_text()
    assert "The least mean, over queries" in text, "the docstring is not on its page"
    assert "<strong>Raises:</strong>" in text, "the parts of docstrings are not told apart"


@needs_mkdocs
def test_names_in_the_text_lead_to_the_reference_and_no_link_is_dead(site, built):
    """Links from names are made after mkdocs has checked its own, so they are checked here."""
    here = built[site / "probes.html"].links
    assert "reference/probes.html#revprobe.probe_gradient_cosine" in here, here
    for path, page in built.items():
        if path.name == "404.html":  # served from anywhere, so its links begin at the root
            continue
        for link in (link for link in page.links if not re.match(r"\w+:", link)):
            file, _, anchor = link.partition("#")
            target = built.get((path.parent / file).resolve() if file else path)
            assert target is not None, f"{path.name} links to {link}, and there is no such page"
            assert not anchor or anchor in target.anchors, f"{path.name} links to {link}, and there is no such anchor"


@needs_mkdocs
def test_the_site_asks_no_other_host_for_anything(site, built):
    """A reader may be offline; fonts, scripts and counters of other hosts would also tell who reads."""
    for path, page in built.items():
        away = [url for url in page.loaded if re.match(r"(https?:)?//", url)]
        assert page.loaded and not away, f"{path.name} loads {away}"
    styles = list(site.rglob("*.css"))
    assert styles, "the theme has no style sheet: the walk is blind"
    for path in styles:
        away = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*", path.read_text())
        assert not away, f"{path.name} loads {away}"
