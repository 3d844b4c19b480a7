# Every target sets itself up: .venv (or the active environment) is filled once, and again when pyproject.toml or csrc changes.
# `make test PYTHON=/path/to/python` uses that interpreter as it stands and installs nothing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TORCH ?= 2.13.0
JOBS ?= 2
PYTEST := -n $(JOBS) --dist loadfile

ifeq ($(origin PYTHON),command line)
READY :=
else
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
override PYTHON := $(VENV)/bin/python
READY := $(VENV)/.stamina-fast-ready
endif

.PHONY: help setup demo test test-long lint bench gpu wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## only the environment

demo: $(READY) ## teach the small model six identities one after another; leaves runs/demo
	$(PYTHON) -m stamina_fast.cli demo --output runs/demo

test: $(READY) ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PYTEST) $(ARGS)

test-long: $(READY) ## the same tests with many more cases
	OMP_NUM_THREADS=1 STAMINA_CASES=20000 $(PYTHON) -m pytest $(PYTEST) -m "long or not long" --hypothesis-profile=long --timeout=3600 $(ARGS)

lint: $(READY) ## ruff
	$(PYTHON) -m ruff check .

bench: $(READY) ## what the operators cost on this CPU, in about four minutes; leaves bench/results/cpu
	$(PYTHON) -m stamina_fast.bench.suite cpu --device cpu --minutes 8 --output bench/results/cpu $(ARGS)

# PYTHON on the command line needs no more than torch, triton, numpy, pytest, transformers, peft and safetensors
gpu: $(READY) ## every GPU test, compute-sanitizer and the whole bench, in 20 minutes; leaves one folder to commit
	$(PYTHON) -m bench.gpu $(ARGS)

wheel: $(READY) ## a wheel in dist/
	$(PYTHON) -m build --wheel --no-isolation --outdir dist .

clean: ## removes what the other targets built, and no RUN
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis

# the pinned torch comes first: it is a CPU or a CUDA build according to where pip finds it
$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/*/*)
	@if [ ! -x "$(PYTHON)" ]; then \
	  for python in python3.13 python3.12 python3.11 python3 python; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	      echo "creating $(VENV) with $$python"; $$python -m venv "$(VENV)"; break; \
	    fi; \
	  done; \
	fi
	@if [ ! -x "$(PYTHON)" ]; then \
	  echo "Python 3.11, 3.12 or 3.13 with venv is needed and none was found; install one (Debian: python3-venv)" >&2; exit 2; \
	fi
	@$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install --quiet torch==$(TORCH)
	@$(PYTHON) -m pip install --quiet "scikit-build-core>=0.11" cmake ninja
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PYTHON) -m pip install --quiet --no-build-isolation -e ".[test]"
	@$(PYTHON) -c 'from stamina_fast.ops import cpu; print(cpu.load() or "compiled for " + ", ".join(cpu.instruction_sets()))'
	@touch "$@"
