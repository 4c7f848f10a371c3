# Set-up and checks. `make help` lists the targets; all of them can be run again at any time.
# Another interpreter: `make setup PYTHON=python3.12`. An index with CPU-only builds of torch: PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
VENV := .venv
# -P keeps the checkout off sys.path: with it `import models` would find ours beside revprobe.models.
PY := $(VENV)/bin/python -P
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

# The stamps carry the checkout's path: an environment copied or moved along with its folder still runs the old code.
PLACE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1)
SETUP := $(VENV)/.setup-$(PLACE)
TEST_SETUP := $(VENV)/.test-$(PLACE)
DOCS_SETUP := $(VENV)/.docs-$(PLACE)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint format docs build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(SETUP)  ## make .venv and install revprobe (editable) with the tested versions
	@echo "==> $(VENV) is ready: $$($(PY) --version), torch $$($(PY) -c 'from importlib.metadata import version; print(version("torch"))')"

demo: setup  ## train the quick sweep, probe every checkpoint, write the report
	@echo "==> demo: the sweep of examples/one_layer_quick.yaml, into runs/one-layer-quick"
	$(VENV)/bin/revprobe sweep one-layer-quick --jobs 2

test: lint  ## ruff, mypy and the whole test suite
	@echo "==> pytest"
	$(PY) -m pytest -n auto --dist loadfile

test-long: $(TEST_SETUP)  ## the tests that `make test` leaves out; their table goes into tests/LONG.md
	@echo "==> pytest, long tests"
	$(PY) -m pytest -m long -n auto --dist worksteal --junit-xml .pytest_long.xml; status=$$?; \
	    $(PY) tests/long_table.py .pytest_long.xml tests/LONG.md && exit $$status

lint: $(TEST_SETUP)  ## ruff (lint, format check), mypy, and the report's script where node is there
	@echo "==> ruff"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@echo "==> mypy"
	$(PY) -m mypy
	@echo "==> node"
	@if command -v node > /dev/null; then for script in report/html/*.js; do echo "node --check $$script"; node --check $$script || exit 1; done; \
	    else echo "skipped: no node on this machine, so the report's scripts are not checked"; fi

format: $(TEST_SETUP)  ## rewrite the code as ruff wants it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(DOCS_SETUP)  ## the guide and the reference, into site/
	@echo "==> mkdocs, warnings are errors"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "==> site/index.html; with search: $(VENV)/bin/python -m http.server -d site"

build: $(TEST_SETUP)  ## sdist and wheel, into dist/, as an index would take them
	rm -rf build dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

clean:  ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(SETUP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON) found; revprobe needs Python 3.11 or later: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), revprobe needs Python 3.11 or later: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) -V) ($$(command -v $(PYTHON)))"
	$(PYTHON) -m venv $(VENV)
	@echo "==> installing torch and setuptools at the tested versions, before anything can ask for others"
	$(PIP_INSTALL) torch setuptools
	@echo "==> installing revprobe (editable) and what it needs"
	$(PIP_INSTALL) --no-build-isolation -e .
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/revprobe  # for mypy, see pyproject.toml
	@rm -f $(VENV)/.setup-* $(VENV)/.test-* $(VENV)/.docs-* && touch $@

$(TEST_SETUP): $(SETUP)
	@echo "==> installing the test tools"
	$(PIP_INSTALL) --quiet --no-build-isolation -e '.[test]'
	@touch $@

$(DOCS_SETUP): $(SETUP)
	@echo "==> installing what builds the site"
	$(PIP_INSTALL) --quiet --no-build-isolation -e '.[docs]'
	@touch $@
