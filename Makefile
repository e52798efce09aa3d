# make pretrain [METHOD=... DATA=...], make test: each builds the virtual environment it needs first
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
METHOD ?= glmae_tiny
DATA ?= phantoms
OUTPUT ?= runs/$(METHOD)-$(DATA)
WORKERS ?= 2
ARGS ?=
INSTALLED := $(VENV)/.installed

.PHONY: help install pretrain test lint types tests format clean
.DEFAULT_GOAL := help

help:
	@echo "make pretrain [METHOD=glmae_tiny] [DATA=phantoms] [OUTPUT=runs/...] [ARGS='KEY=VALUE ...']"
	@echo "make test      lint, types and tests, on WORKERS=2 processes (20 to 30 minutes on two cores)"
	@echo "make lint | types | tests | format | install | clean"

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "medssl needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

pretrain: $(INSTALLED)
	@$(BIN)/python -m medssl.pretrain method=$(METHOD) data=$(DATA) output_dir=$(OUTPUT) $(ARGS) || \
		{ code=$$?; echo "settings follow in ARGS: make pretrain ARGS=overwrite=true, or ARGS=resume=$(OUTPUT)"; exit $$code; }

test: lint types tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m "not slow and not packaging and not gpu" $(ARGS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
