.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Elsewhere than on Linux or macOS, or for a CUDA build, install torch into $(VENV) first.
$(READY): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $(READY)

.PHONY: help demo test test-all lint docs bench
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(READY)  ## compress the bundled reference model, reload it, print one table
	$(BIN)/python benchmarks/demo.py

test: $(READY) lint  ## lint, types and the tests of the model families
	$(BIN)/python -m pytest -q -n 2 -m "not full"

test-all: $(READY) lint  ## every architecture and every way of saving and loading
	$(BIN)/python -m pytest -q -n 2

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/architectures.py --check

docs: $(READY)  ## the table of architectures in docs/
	$(BIN)/python benchmarks/architectures.py

bench: $(READY)  ## the tables of docs/source/benchmarks.md
	$(BIN)/pip install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/compress_speed.py
	$(BIN)/python benchmarks/layer_speed.py
	$(BIN)/python benchmarks/switch_size.py
	$(BIN)/python benchmarks/byte_budget.py --output benchmarks/results/byte_budget
	$(BIN)/python benchmarks/smollm2.py
	$(BIN)/python benchmarks/byte_budget.py --on smollm2 --output benchmarks/results/byte_budget_smollm2
