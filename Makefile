# Everything starts from a machine that has only Python 3.11+, make and a package index. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# Test processes; auto is one for each core.
WORKERS ?= auto
BIN := $(VENV)/bin
CODE := hf_transcoders tests examples benchmarks model_cards docs/hooks.py

.PHONY: help install demo test test-slow test-matrix style quality docs clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed  ## Create the virtual environment and install the package with everything for development

# The stamp makes the set-up run once, and again whenever the requirements change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install  ## Train, evaluate and explain a transcoder of a real model in a few minutes
	$(BIN)/hf-transcoders demo

# Tests of one file stay in one process: what they set up is set up once.
test: install  ## Run the tests, on all cores
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

test-slow: install  ## Run the tests that take minutes, notebooks included
	$(BIN)/python -m pytest -m slow

# Some rows only: `make test-matrix ROWS="avx2 lowest"`; `python -m tests.matrix --list` lists them.
test-matrix: install  ## Run the tests with other threads, instruction sets and versions
	$(BIN)/python -m tests.matrix $(if $(ROWS),--rows $(ROWS))

quality: install  ## Check format, lint, spelling and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/codespell $(CODE) docs *.md
	$(BIN)/pyright --pythonpath $(BIN)/python

style: install  ## Format the code
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: install  ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --quiet

clean:  ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
