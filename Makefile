# Everything a user or CI runs. `make help` lists it; no step needs a GPU.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A new key, and so a new installation, whenever what is installed changes.
KEY := $(shell cat setup.py pyproject.toml constraints.txt | sha256sum | cut -c1-16)
STAMP := $(VENV)/.installed-$(KEY)

SCRIPTS := $(wildcard examples/*.sh examples/*.sbatch) .ci/run

.PHONY: help setup quickstart test test-all test-gpu check format bench clean distclean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install the pinned requirements

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: PYTHON is '$(PYTHON)' ($$($(PYTHON) --version 2>&1 || true)), expected Python 3.10" \
	    "or newer; try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  rm -rf $(VENV); exit 2; }

$(STAMP): | $(BIN)/python
	@echo "Installing the pinned requirements into $(VENV) (about a minute) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[dev]"
	@rm -f $(VENV)/.installed-* && touch $@

quickstart: $(STAMP) ## Corpus, tokenizer, pretraining on 2 ranks, evaluation, sample: under 10 minutes
	@bash examples/quickstart.sh

test: $(STAMP) ## All tests but the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(STAMP) ## All tests that need no GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"

test-gpu: $(STAMP) ## The tests that need a CUDA device, and fail without one
	@MEGATRON_MOE_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

check: $(STAMP) ## Lint, format, types, architecture, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_architecture.py
	$(BIN)/shellcheck -x $(SCRIPTS)

format: $(STAMP) ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Every benchmark record, as a table and bench.json
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m bench.run

clean: ## Remove what runs and tools have written, but not .venv
	rm -rf quickstart bench.json build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)
