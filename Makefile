# Everything that this project does, by name. PYTHON=... chooses the interpreter that the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
ARGS ?=

# Tests run in two processes: more threads than cores only wait for each other. They never talk to a server.
TEST_ENV := OMP_NUM_THREADS=1 WANDB_MODE=offline

.DEFAULT_GOAL := help
.PHONY: help run check test test-all notebooks bench

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

run: $(READY)  ## set up, then train and prune the default network (about a minute); ARGS="pruner=random seed=2"
	$(BIN)/python run.py pruner=entropy $(ARGS)

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(READY)  ## set up, then the tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(READY)  ## every test, also those that take minutes
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 $(ARGS)

notebooks: $(READY)  ## execute every notebook
	$(TEST_ENV) $(BIN)/python -m pytest -m notebook tests $(ARGS)

bench: $(READY)  ## the benchmarks
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script $(ARGS); done
