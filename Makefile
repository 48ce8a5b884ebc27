# Every target sets up .venv by itself; `make help` lists them.
#   make test PYTHON=python3.12            another interpreter (at least 3.11)
#   make test PYTEST_ARGS="-k gba -x"      a part of the tests
#   make demo PIP_ARGS="--index-url URL"   further options for pip, e.g. a mirror or a CPU-only torch
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
EXTRAS ?= cpu,geo,report,plots,ray,rivals,dev
PIP_ARGS ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNDERWAY := $(VENV)/.installing

.PHONY: demo test lint type bench figures tables clean help install

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## train an SAE on a real model, write runs/demo/report.html
	$(BIN)/sae-apps demo --out runs/demo

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .

type: $(STAMP) ## pyright
	$(BIN)/pyright

bench: $(STAMP) ## the CPU benchmarks in their reduced size; rewrites benchmarks/results
	$(BIN)/python -m benchmarks.throughput --size reduced
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.sae_quality --size reduced
	$(BIN)/python -m benchmarks.sae_quality --size reduced --ablation
	for part in table curve ablation sensitivity heatmap; do \
		$(BIN)/python -m benchmarks.recovery --part $$part; done
	$(BIN)/python -m benchmarks.agreement
	$(BIN)/python -m benchmarks.reweighting --part planted
	$(BIN)/python -m benchmarks.verdict
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.selection --part fresh
	$(BIN)/python -m benchmarks.similarity_exact
	$(BIN)/python -m benchmarks.similarity
	$(BIN)/python -m benchmarks.moran
	$(BIN)/python -m benchmarks.geography --part findings --areas world GB
	$(BIN)/python -m benchmarks.suppression_cost
	$(BIN)/python -m benchmarks.alignment
	$(BIN)/python -m benchmarks.monet
	$(BIN)/python -m benchmarks.faults --kills 20 --flips 60
	$(BIN)/python -m benchmarks.fuzz --inputs 2000

figures: $(STAMP) ## draw results/figures from benchmarks/results
	$(BIN)/python -m benchmarks.figures

tables: $(STAMP) ## write the tables of README and docs, docs/api.md and docs/dependencies.md
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.api_reference
	$(BIN)/python -m benchmarks.dependencies

clean: ## remove caches and build products; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

install: $(STAMP) ## only the virtual environment

# One installation at a time: an exclusive lock on this folder, which ends with the process that holds
# it. (Python's flock, because the command of that name is missing on macOS.)
define LOCKED
import fcntl, os, subprocess, sys
fcntl.flock(os.open(".", os.O_RDONLY), fcntl.LOCK_EX)
sys.exit(subprocess.call(sys.argv[1:]))
endef
export LOCKED

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("sae-apps needs Python >= 3.11, got %d.%d: name another, e.g. make test PYTHON=python3.11" % sys.version_info[:2])
endef
export CHECK_PYTHON

# The mark $(UNDERWAY) exists while pip works and survives an interruption: the next run then starts
# from an empty environment. The stamp comes last. Whoever waited for the lock finds the stamp fresh.
define INSTALL
set -euo pipefail
if [ $(STAMP) -nt pyproject.toml ] && [ $(STAMP) -nt constraints.txt ]; then exit 0; fi
if [ -e $(UNDERWAY) ] || [ ! -x $(BIN)/python ]; then "$(PYTHON)" -m venv --clear $(VENV); fi
rm -f $(STAMP)
touch $(UNDERWAY)
$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
rm $(UNDERWAY)
touch $(STAMP)
endef
export INSTALL

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "sae-apps needs Python >= 3.11, and $(PYTHON) is not a command here." >&2; exit 1; }
	@"$(PYTHON)" -c "$$CHECK_PYTHON"
	@"$(PYTHON)" -c "$$LOCKED" bash -c "$$INSTALL"
