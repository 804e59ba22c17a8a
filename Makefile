# Everything that users and CI run. `make help` lists the targets; none but test-gpu needs a GPU.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The key changes with the requirements, and a new key causes a new installation.
KEY := $(shell cat setup.py pyproject.toml constraints.txt | sha256sum | cut -c1-16)
STAMP := $(VENV)/.installed-$(KEY)
# Test files that run at once; each of these processes starts its own ranks, up to eight.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
FUZZ_STAMP := $(VENV)/.fuzz-$(KEY)
DOCS_STAMP := $(VENV)/.docs-$(KEY)

SCRIPTS := $(wildcard examples/*.sh examples/*.sbatch tests/examples/*.sh) .ci/run

.PHONY: help setup quickstart test test-all test-gpu check check-kernels format compare soak planted bench bench-gpu fuzz docs clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install the pinned requirements

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: PYTHON must be Python 3.10 or newer (got '$(PYTHON)':" \
	    "$$($(PYTHON) --version 2>&1 || true)); try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  rm -rf $(VENV); exit 2; }

$(STAMP): | $(BIN)/python
	@echo "Installing the pinned requirements into $(VENV) (about a minute) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[dev]"
	@# For tests, in a folder that is not on Python's path: Megatron-Core imports it where it finds it.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade \
	  --constraint constraints.txt --target $(VENV)/transformer-engine transformer-engine einops
	@rm -f $(VENV)/.installed-* && touch $@

quickstart: $(STAMP) ## Corpus, tokenizer, pretraining on 2 ranks, evaluation, sample, report: about 10 minutes
	@bash examples/quickstart.sh

test: $(STAMP) ## All tests except the slow ones: JOBS=<files at once>
	@$(PYTEST) -m "not slow and not gpu"

test-all: $(STAMP) ## All tests that need no GPU
	@$(PYTEST) -m "not gpu"

test-gpu: $(STAMP) ## Tests that need a CUDA device; an error without one
	@MEGATRON_MOE_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

check: $(STAMP) ## Lint, format, types, architecture, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_architecture.py
	$(BIN)/shellcheck -x $(SCRIPTS)

check-kernels: $(STAMP) ## Compile every Triton kernel for three generations of GPUs, without one
	@$(BIN)/python tools/check_kernels.py

format: $(STAMP) ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compare: $(STAMP) ## Compare with a revision, bit for bit: BASE=<revision> [ONLY=<cases>]
	@test -n "$(BASE)" || { \
	  echo "make: BASE must be a revision or the folder of a checkout (got ''); try: make compare BASE=HEAD~1" >&2; \
	  exit 2; }
	@$(BIN)/python tools/compare_revisions.py --base "$(BASE)" $(if $(ONLY),--only "$(ONLY)")

soak: $(STAMP) ## 2000 steps with random faults against an undisturbed run, and soak.json
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.soak

planted: $(STAMP) ## Plant faults and see their tests fail, a table and planted.json: [ONLY="case-3 feature-4"]
	@$(BIN)/python -m tests.planted $(if $(ONLY),--only $(ONLY))

bench: $(STAMP) ## Every benchmark, as a table and bench.json
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m bench.run

bench-gpu: $(STAMP) ## Kernels, MoE layer and a step on a GPU, as a table; an error without one
	@$(BIN)/python -m bench.gpu

$(FUZZ_STAMP): $(STAMP)
	@echo "Installing the fuzzer into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[fuzz]"
	@rm -f $(VENV)/.fuzz-* && touch $@

fuzz: $(FUZZ_STAMP) ## Fuzz every parser, a table and fuzz.json: [INPUTS=<a parser>] [ONLY=<parsers>]
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --inputs $(or $(INPUTS),100000) \
	  $(if $(ONLY),--only $(ONLY))

$(DOCS_STAMP): $(STAMP)
	@echo "Installing the documentation tools into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[docs]"
	@rm -f $(VENV)/.docs-* && touch $@

docs: $(DOCS_STAMP) ## Build the documentation site, with the API reference, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: site/index.html; with search: $(BIN)/python -m http.server --directory site"

clean: ## Remove what runs and tools have written, except .venv
	rm -rf quickstart bench.json fuzz.json fuzz-crashes planted.json site build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)
