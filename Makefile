# Set-up happens by itself: `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(STAMP)  ## make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lora needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## train the quickstart: under a minute on two cores
	$(BIN)/lora train recipes/quickstart.yaml

test: $(STAMP)  ## run the tests
	$(BIN)/pytest -n 2

slow: $(STAMP)  ## run the tests that the default suite leaves out
	$(BIN)/pytest -m slow

gpu: $(STAMP)  ## run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

liger: $(STAMP)  ## install Liger's kernels, and test them on the CPU, interpreted
	$(BIN)/pip install --quiet -c constraints.txt -e '.[liger]'
	$(BIN)/pytest -m "slow or not slow" tests/ops/test_liger.py

check: format lint type test  ## format, lint, check types, test

format: $(STAMP)
	$(BIN)/ruff format lora_cli tests recipes

lint: $(STAMP)
	$(BIN)/ruff format --check lora_cli tests recipes
	$(BIN)/ruff check lora_cli tests recipes

type: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)  ## measure speed and memory; all figures go to bench.json
	$(BIN)/python -m tests.benchmarks --json bench.json

clean:  ## remove what make made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info

.PHONY: help setup demo test slow gpu liger check format lint type bench clean
