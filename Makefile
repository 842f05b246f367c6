# Every command of the project. `make help` lists them; each sets up first.
.DEFAULT_GOAL := help
.PHONY: help setup train test test-all fuzz soak soak-save bench bench-save bench-compare transfer gpu gpu-save gpu-pack lint fmt type recipes clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# one worker more than cores: tests of ranks and signals wait for much of their time
PYTEST := $(BIN)/python -m pytest -n $(shell n=$$(nproc); echo $$((n < 4 ? n + 1 : 4))) --dist loadfile --no-loadscope-reorder
# make gpu must run where nothing can be set up: it takes .venv where it is there, else PYTHON as it is
GPU := $(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu
# set, it has each of the tests' hundred processes compile the sources again
export PYTHONDONTWRITEBYTECODE :=
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with the releases of constraints.txt; a few minutes and 7 GB, once

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo 'Set up in $(VENV)/. In each new shell: source $(VENV)/bin/activate'

train: setup  ## train the recipe demo on images that the project draws itself; CPU or GPU, minutes
	$(BIN)/python -m fasttricks.train demo --run-dir $(RUN_DIR) $(ARGS)

test: setup  ## the tests, without a GPU, in minutes
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: setup  ## the tests and the slow ones too: full runs, fresh installs; at most an hour
	$(PYTEST) $(ARGS)

fuzz: setup  ## feed damaged input to every reader of foreign bytes, SECONDS (60) a target
	for target in tests/fuzz_*.py; do $(BIN)/python $$target $(or $(SECONDS),60) || exit 1; done

soak: setup  ## kill, stop and damage runs; N of each (96 kill runs, 30 restarts, 40 signals), counted in bench/out/
	$(BIN)/python -m bench.soak $(if $(N),--n $(N)) $(ARGS)

soak-save: setup  ## make soak, added to the committed bench/results/soak.json and docs/reliability.md
	$(BIN)/python -m bench.soak --save $(if $(N),--n $(N)) $(ARGS)

bench: setup  ## imgs/sec of loader, step, both, the losses and transfer beside their alternatives; about 9 minutes, to bench/out/
	$(BIN)/python -m bench.report $(ARGS)

bench-save: setup  ## make bench, written to the committed bench/results/
	$(BIN)/python -m bench.report --save $(ARGS)

bench-compare: setup  ## OLD=a.json NEW=b.json of make bench: exit code 1 where NEW is slower beside its peers
	$(BIN)/python -m bench.compare $(OLD) $(NEW)

transfer: setup  ## base networks in segmentation and detection, small; needs DATA=DIR; 90 minutes at most, in the background
	$(BIN)/python -m bench.transfer $(if $(DATA),--data $(DATA)) --check $(ARGS)
	@mkdir -p runs/transfer
	nohup $(BIN)/python -m bench.transfer $(if $(DATA),--data $(DATA)) $(ARGS) >> runs/transfer/log 2>&1 &
	@echo 'In the background, 90 minutes at most. Its log: tail -f runs/transfer/log. The same command continues.'

gpu:  ## every CUDA line once, and a first table; no set-up; 9 minutes at most, to bench/out/; DEVICE=cpu walks it
	$(GPU) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

gpu-save:  ## make gpu, written to the committed bench/results/gpu-CARD.json and .md too
	$(GPU) --save $(ARGS)

gpu-pack: setup  ## DALI and the packages with it as tar.xz in pieces, to bench/out/pack, for a machine without network
	$(BIN)/python -m bench.gpu.pack $(ARGS)

lint: setup  ## ruff, import-linter and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=kernels $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

fmt: setup  ## format, and apply the fixes of ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup  ## the type checker alone
	$(BIN)/mypy

recipes: setup  ## write docs/recipes.md from the recipes
	$(BIN)/python docs/recipes_page.py

clean:  ## remove the set-up and the caches of tools; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
