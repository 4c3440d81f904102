# `make demo` and `make test` set up everything they need in .venv; only Python 3.11 or later, git and make are required.

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest lint types unit llama deepspeed format docs bench bench-peers gpu clean

help:
	@echo "make demo       install, then fine-tune the bundled model on the bundled help desk"
	@echo "make test       install, then lint, types and tests"
	@echo "make test-slow  the tests that take longer; builds llama.cpp for those of GGUF where it can"
	@echo "make test-lowest  the quick tests with the lowest versions that pyproject.toml allows, in an environment of its own"
	@echo "make format     let ruff rewrite the code"
	@echo "make bench      training speed beside TRL+PEFT; BENCH='--help' lists the options"
	@echo "make gpu        what a CUDA GPU has to show, in six minutes; GPU='--help' lists the options"
	@echo "make bench-peers  the same with torchtune and litgpt, each in an environment of its own"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "philora needs Python 3.11 or later; name one with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.runtime
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/philora demo

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(PYTEST) -m 'not slow and not gpu'

# Built from source with a C++ compiler, in minutes; where that fails, its tests are skipped and say so. A cached wheel
# may have been built for another processor, where it ends with SIGILL here.
llama: $(VENV)/.dev
	CMAKE_BUILD_PARALLEL_LEVEL=2 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  --no-cache-dir --no-binary llama-cpp-python llama-cpp-python

# In a folder that only its own tests put on the path: where it is installed, other libraries load it. Its kernels are
# compiled when they are first used, on a CPU one small file; where it fails, its tests are skipped and say so.
deepspeed: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check setuptools wheel
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation \
	  --no-deps --upgrade --target $(VENV)/deepspeed deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo

test-slow: $(VENV)/.dev
	-$(MAKE) llama
	-$(MAKE) deepspeed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'slow and not gpu'

# uv picks the lowest versions of what philora runs with; the tools of the tests are the newest. PyTorch's wheel for CUDA
# comes with gigabytes of libraries, also where there is no GPU.
RUNS_WITH := --extra evaluation --extra excel --extra gguf --extra gpu --extra quantization --extra serve \
  --extra tensorboard --extra wandb
$(LOWEST)/.dev: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile -q --resolution lowest-direct --python $(LOWEST)/bin/python pyproject.toml $(RUNS_WITH) \
	  -o $(LOWEST)/versions.txt
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python -c $(LOWEST)/versions.txt -e '.[dev]'
	@touch $@

test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest -q -n 2 --dist worksteal -m 'not slow and not gpu'

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.training $(BENCH)

# On a machine without network or git: make gpu BIN=/usr/bin, with the packages of tools/gpu_carry.txt on PYTHONPATH.
gpu:
	PYTHONPATH=src:.:$$PYTHONPATH $(BIN)/python3 -m benchmarks.gpu_check $(GPU)

$(VENV)/peers/%/.ready: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

# An environment that cannot be made costs its own row only: the benchmark names the contestant that failed.
bench-peers: $(VENV)/.bench
	-$(MAKE) -k $(VENV)/peers/torchtune/.ready $(VENV)/peers/litgpt/.ready
	$(BIN)/python -m benchmarks.training --peers $(BENCH)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
