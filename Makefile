# make demo    train, evaluate, report on the built-in LM     make test    the tests
# make lint    format, lint, types, as CI has it                make check   what this machine is fit for
# make bench   our losses beside the peers'                   make newest  the wheel with the newest versions
# make docs    the site of documentation, in build/site
# make setup   TORCH='torch --index-url https://download.pytorch.org/whl/cpu' takes torch without CUDA
# make setup   .venv with ksparse (demo, check, bench do it first)
#              and the tests' packages only for test and lint: $(VENV)/.done-test

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint check newest bench docs setup

demo: setup
	$(BIN)/ksparse demo

test: $(VENV)/.done-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/.done-test
	$(BIN)/ruff format --check src tests bench scripts
	$(BIN)/ruff check src tests bench scripts
	$(BIN)/python -m mypy

check: setup
	$(BIN)/ksparse doctor

docs: $(VENV)/.done-docs
	$(BIN)/python scripts/site/build.py

bench: setup
	$(BIN)/python bench/quality.py

setup: $(VENV)/.done
	@echo "ready: source $(BIN)/activate"

# torch comes first and by itself, so that nothing else chooses another build of it.
$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ksparse needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@echo "setup 1/3: environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup 2/3: torch, unless it is there (about 200 MB to load for a CPU, 3 GB with CUDA)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	@echo "setup 3/3: ksparse and its other packages (about 150 MB), with the viewer's server"
	@$(PIP) --editable '.[serve]'
	@touch $@

$(VENV)/.done-test: $(VENV)/.done
	@echo "setup: the packages of the tests and the linters"
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.done-docs: $(VENV)/.done
	@echo "setup: the packages of the site"
	@$(PIP) --editable '.[docs]'
	@touch $@

newest:
	$(PYTHON) scripts/newest.py
