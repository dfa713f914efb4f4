# Every target bootstraps .venv first; a second run reuses what exists.
PYTHON ?= $(shell command -v python3.12 2>/dev/null >/dev/null && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/var/digits.yaml
SWEEP ?= recipes/ablations/strategies.yaml
DATA ?=
ARGS ?=
FRESH ?=
PORT ?= 6006
CONSTRAINTS ?= constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install train demo docs docs-serve sweep test test-fast test-gpu test-ship dist digits-model lint types format natten tensorboard bench figures evidence evidence-long evidence-page house clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## make the virtual environment and install the suite (CONSTRAINTS= for the newest versions)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 14); sys.exit(0 if ok else "Python 3.11 to 3.14 is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	@touch $@

train: install  ## run a recipe from data to report (RECIPE=, DATA=, ARGS="--model.depth=8", FRESH=1)
	$(BIN)/mvar train $(RECIPE) $(if $(DATA),--data $(DATA)) $(if $(FRESH),--fresh) $(ARGS)

sweep: install  ## train the variants of a recipe and tabulate them (SWEEP=, ARGS=, FRESH=1)
	$(BIN)/mvar sweep $(SWEEP) $(if $(FRESH),--fresh) $(ARGS)

demo: install  ## a page on this machine: sample, edit, compare, look inside (ARGS="CHECKPOINT ... --port 7860")
	$(BIN)/mvar demo $(ARGS)

docs: install  ## build the site into build/site/html; any warning is an error
	$(BIN)/python docs/site/build.py

docs-serve: docs  ## build the site and open it at 127.0.0.1 (PORT=6006)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site/html $(PORT)

# Tests are many and small: one thread in each of two processes beats two threads in one. Each process begins with its
# half in order, so that what a file prepares for its tests is prepared once; whoever is done first takes of the other's.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: lint types  ## lint, types and all tests that need no GPU
	$(PYTEST) -m "not gpu and not ship"

test-fast: install  ## the fast tests alone
	$(PYTEST) -m "not gpu and not slow and not ship"

test-ship: install  ## what is built and shipped: the wheel in an environment of its own, outside this folder (network)
	$(BIN)/python -m pytest -m ship

dist: install  ## build wheel and source distribution into dist/
	rm -rf build dist
	$(BIN)/python -m build --outdir dist

digits-model: install  ## train the model that ships, mvar_lightning/models/digits, anew
	$(BIN)/mvar train var/digits --fresh
	$(BIN)/mvar export runs/var/digits --folder mvar_lightning/models/digits --half

test-gpu: install  ## bf16 parity and everything else that needs a GPU
	$(BIN)/python -m pytest -m gpu

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy
	$(BIN)/mypy

format: install  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

natten: install  ## add natten, for its own kernels (on a GPU machine take a prebuilt wheel instead)
	$(BIN)/python -m pip install --quiet setuptools wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation 'natten>=0.21,<0.22'

tensorboard: install  ## open the runs (PORT=6006)
	$(BIN)/tensorboard --logdir runs --port $(PORT)

bench: install  ## time attention per scale against attention with a mask; another measurement with ARGS="tokens"
	$(BIN)/python -m benchmarks $(or $(ARGS),attention)

figures: install  ## draw the pictures of the docs
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/diagrams.py

# One sweep a table. What has been measured lies in docs/evidence/, committed: it is not trained again, and the page is
# drawn from it without runs/. A sweep is one process of one thread, two at a time; the first is done by two.
HALF_1 := full adjacent "MVAR 5x5" "MVAR 3x3"
HALF_2 := Markov-VAR "Markov-VAR, no history" "window 2" "window 3"
EVIDENCE_LONG := strategies blocks history kernels groups scaling tokenizer
FASHION := data/fashion_tokens/tokens.json

data/fashion/index.json: $(VENV)/.installed
	$(BIN)/mvar shards make fashion data/fashion

runs/tokenizer/fashion/metrics.json: data/fashion/index.json
	$(BIN)/mvar train recipes/tokenizer/fashion.yaml

$(FASHION): runs/tokenizer/fashion/metrics.json
	$(BIN)/mvar tokens make --checkpoint runs/tokenizer/fashion/model --data data/fashion --out data/fashion_tokens \
	  --resize-ratio 1.0 --crop center

sweep-of-%: $(FASHION)
	OMP_NUM_THREADS=1 $(BIN)/mvar sweep recipes/evidence/$*.yaml --keep docs/evidence/$*

half-%: $(FASHION)
	OMP_NUM_THREADS=1 $(BIN)/mvar sweep recipes/evidence/strategies.yaml --keep docs/evidence/strategies --only $(HALF_$*)

evidence: $(FASHION)  ## train what docs/evidence/ lacks of the most asked questions, and draw docs/evidence.md (90 minutes)
	$(MAKE) --jobs 2 half-1 half-2
	OMP_NUM_THREADS=1 $(BIN)/python docs/members.py
	OMP_NUM_THREADS=1 $(BIN)/python docs/analyses.py
	$(MAKE) evidence-page

evidence-long: $(FASHION)  ## the same for all questions (a night)
	$(MAKE) --jobs 2 $(EVIDENCE_LONG:%=sweep-of-%)
	$(MAKE) evidence-page

evidence-page: install  ## draw docs/evidence.md and its pictures anew from docs/evidence/, training nothing
	$(BIN)/python docs/evidence.py

house: install  ## count the house: files, lines, depths, what a reader must open
	$(BIN)/python tests/house.py

clean:  ## remove the environment and caches (not data, not runs)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
