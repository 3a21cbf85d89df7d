# spidr_hf: `make demo` and `make test` work from a fresh clone; Python >= 3.11 and make are all they need.
#
#   make demo         pretrains a small SpidR on examples/data and draws runs/demo/demo.png (ARGS=--fresh: from anew)
#   make test         the tests (ARGS="-k padding" goes to pytest)
#   make test-all     the long ones too
#   make lint         ruff and mypy; changes nothing
#   make docs         the API's pages from the docstrings, docs/index.html
#   make benchmark    speed and memory beside the peers that are installed (ARGS="--targets": what is promised)
#   make setup        the virtual environment .venv alone; all of the above make it first (tests add their tools to it)
#
# PYTHON=python3.12   the interpreter of a new .venv; else the newest of python3.14 ... python3.11, python3
# TORCH="..."         what to tell pip about torch, when its default is not the build for this machine: for example
#                     TORCH="torch==2.13.0 --index-url URL" with the URL from pytorch.org. It is remembered in .venv.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools
TESTED_TORCH := $(shell grep '^torch==' constraints.txt)
CURRENT_TORCH := $(or $(shell cat $(VENV)/.torch 2>/dev/null),$(TESTED_TORCH))
TORCH ?= $(CURRENT_TORCH)
ARGS ?=

# One thread per process: on two cores, two such processes finish before one process of two threads.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4

.PHONY: help demo test test-all lint docs benchmark setup force
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	$(PY) examples/demo.py $(ARGS)

test: $(TOOLS)
	@$(PY) tests/fetch_transformers_tests.py
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(TOOLS)
	@$(PY) tests/fetch_transformers_tests.py
	$(PYTEST) $(ARGS)

lint: $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Every module; of a folder its name is enough.
MODULES := $(filter-out %/__init__ %/__main__,$(basename $(wildcard spidr_hf/*.py))) \
           $(patsubst %/__init__.py,%,$(wildcard spidr_hf/*/__init__.py))

docs: $(TOOLS)
	$(PY) -m pdoc --docformat google --output-directory docs spidr_hf $(subst /,.,$(MODULES))

benchmark: $(STAMP)
	$(PY) examples/benchmark.py $(ARGS)

setup: $(STAMP)

ifneq ($(TORCH),$(CURRENT_TORCH))
$(STAMP): force
endif

# torch comes first and is then pinned as installed, so that no later line trades it for another build.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if ! $(PY) -c "" 2>/dev/null; then \
	  for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3 python; do \
	    if $$python -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then break; fi; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python >= 3.11 with its venv module found. Install one (Debian and Ubuntu: apt-get install python3-venv)" >&2; \
	    echo "or say where it is: make PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up $(VENV) with $$($$python --version), once. Most of the time goes into downloading torch."; \
	  rm -rf $(VENV); \
	  $$python -m venv $(VENV); \
	fi
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PY) -m pip install -c $(VENV)/constraints.txt $(TORCH)
	@$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> $(VENV)/constraints.txt
	$(PY) -m pip install -c $(VENV)/constraints.txt -e ".[train,eval]"
	@if [ '$(TORCH)' = '$(TESTED_TORCH)' ]; then rm -f $(VENV)/.torch; else echo '$(TORCH)' > $(VENV)/.torch; fi
	@touch $@

$(TOOLS): $(STAMP)
	$(PY) -m pip install -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@
