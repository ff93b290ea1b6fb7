# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which the first command makes. PYTHON=python3.11 chooses the interpreter it is made with.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
MUTANTS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)

# Without isolation the extension is compiled against the torch that is in .venv, and nothing else is fetched for it.
INSTALL := $(PIP) --no-build-isolation -e

.PHONY: help demo test test-fast test-slow test-lm-eval mutants sanitize lint types format clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(VENV)/.demo ## prune a real model, save, reload, compare (first call: downloads about 0.5 GB)
	$(BIN)/python benchmarks/demo.py $(DEMO_ARGS)

test: lint types ## lint, types, then all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/.test ## tests that take less than about ten seconds each; stops at the first failure
	$(BIN)/python -m pytest -x -q -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.test ## the tests with random examples, with twenty times as many of them
	EIGENPRUNE_ROUNDS=20 $(BIN)/python -m pytest -q --timeout=1800 tests/reliability $(PYTEST_ARGS)

test-lm-eval: $(VENV)/.lm-eval ## the tests of lm-eval's tasks, which need 0.5 GB more of other people's code
	$(BIN)/python -m pytest -q tests/evaluate/test_harness.py $(PYTEST_ARGS)

mutants: $(VENV)/.test ## put faults into a copy of the package, and see the tests find them
	$(BIN)/python -m tests.mutation.run $(MUTANTS)

sanitize: $(VENV)/.test ## tests of the CPU operators, compiled with address and undefined-behaviour checks
	PYTHON=$(BIN)/python .ci/sanitize $(PYTEST_ARGS)

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy --strict over the package
	$(BIN)/mypy

format: $(VENV)/.test ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, build products and caches; models in .models stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find eigenprune -name '*.so' -delete
	find eigenprune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an empty file says that its step is done, and is older than what the step must be repeated for.

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON); install Python 3.10 or newer, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); eigenprune needs Python 3.10 or newer: say make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and alone, by its exact version: a looser request makes pip look at several builds of it.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) setuptools wheel ninja pybind11 packaging
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(INPUTS)
	$(INSTALL) '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(INPUTS)
	$(INSTALL) '.[test,dev,demo,peft,plots,quantize]'
	touch $@ $(VENV)/.demo

$(VENV)/.lm-eval: $(VENV)/.test
	$(INSTALL) '.[lm-eval]'
	touch $@
