# One place for every command; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check format bench figures clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvasir needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt 'torch==2.13.0'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/python -m kvasir.native.cpp kvasir.engine.torch.kernels kvasir.store kvasir.native # what cannot be built runs slower
	-$(BIN)/python -m kvasir.native.build
	touch $@

setup: $(VENV)/.done ## create .venv with everything in it, build the machine code

demo: setup ## cluster up, a chat, a second turn from cache, a slice of traffic, the table
	$(BIN)/kvasir demo

serve: setup ## serve the built-in model on http://127.0.0.1:8000
	$(BIN)/kvasir serve

test: setup ## run the tests
	$(BIN)/pytest -n 2 --dist loadfile

check: setup ## format, lint, types, layers, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile

format: setup ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## measure this machine; results in benchmarks/results
	$(BIN)/python -m benchmarks.run

TRACE ?= synthetic:conversation
figures: setup ## redraw the papers' figures in docs/results; TRACE=FILE for the conversation trace
	$(BIN)/kvasir bench paper --trace $(TRACE) --out docs/results

clean: ## remove what the targets above made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
