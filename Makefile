# make demo    train, evaluate, report on the built-in LM     make test    the tests
# make lint    format, lint, types, as CI has it                make check   what this machine is fit for
# make bench   our losses beside the peers'                   make newest  the wheel with the newest versions
# make setup   .venv with the pinned versions (the others do it first)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint check newest bench setup

demo: setup
	$(BIN)/ksparse demo

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: setup
	$(BIN)/ruff format --check src tests bench scripts
	$(BIN)/ruff check src tests bench scripts
	$(BIN)/python -m mypy

check: setup
	$(BIN)/ksparse doctor

bench: setup
	$(BIN)/python bench/quality.py

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ksparse needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch  # first: others would take another build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

newest:
	$(PYTHON) scripts/newest.py
