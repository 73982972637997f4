# Everything that this project does, by name. PYTHON=... chooses the interpreter that the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
ARGS ?=
PINS :=

# Tests run in two processes: more threads than cores only wait for each other. They never talk to a server.
TEST_ENV := OMP_NUM_THREADS=1 WANDB_MODE=offline

.DEFAULT_GOAL := help
.PHONY: help run check test test-all test-oldest notebooks bench

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

$(READY): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" $(addprefix -c ,$(PINS))
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

test-oldest:  ## the tests with the oldest versions that are supported, in .venv-oldest (Python 3.10 or 3.11)
	$(MAKE) test VENV=.venv-oldest PINS=.ci/oldest.txt

notebooks: $(READY)  ## execute every notebook
	$(TEST_ENV) $(BIN)/python -m pytest -m notebook tests $(ARGS)

bench: $(READY)  ## the benchmarks (hours); DATA=DIR WEIGHTS=DIR add those on CIFAR-10 with trained ResNets
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python benchmarks/graph_cost.py --peer
	$(BIN)/python benchmarks/prunability.py --peer
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/validation_epoch.py
	$(BIN)/python benchmarks/prox_step.py
	$(BIN)/python benchmarks/serene.py
	$(BIN)/python benchmarks/compensation_cost.py
	$(BIN)/python benchmarks/compensation_vit.py
	$(BIN)/python benchmarks/comparison.py digits
	$(BIN)/python benchmarks/lifecycle.py --strategies single ddp fork
ifdef DATA
	$(BIN)/python benchmarks/compensation.py --data $(DATA) --weights $(WEIGHTS) --depth 56 --keep 0.5
	$(BIN)/python benchmarks/compensation.py --data $(DATA) --weights $(WEIGHTS) --depth 20 --keep 0.6667 --epochs 1
	$(BIN)/python benchmarks/influence.py --data $(DATA) --weights $(WEIGHTS) --out runs/influence
	$(BIN)/python benchmarks/comparison.py resnet20 --data $(DATA) --weights $(WEIGHTS)/resnet20-jpeg.th
endif
