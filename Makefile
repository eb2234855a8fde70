# Everything starts from a machine that has only Python 3.11+, make and a package index.
PYTHON ?= python3
VENV ?= .venv
# Test processes; auto is one for each core.
WORKERS ?= auto
BIN := $(VENV)/bin
CODE := hf_transcoders tests examples benchmarks model_cards

.PHONY: demo test test-slow test-matrix style quality install clean

install: $(VENV)/installed

# The stamp makes the set-up run once, and again whenever the requirements change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/hf-transcoders demo

# Tests of one file stay in one process: what they set up is set up once.
test: install
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# Rows of their own: `make test-matrix ROWS="avx2 lowest"`; `python -m tests.matrix --list` says which there are.
test-matrix: install
	$(BIN)/python -m tests.matrix $(if $(ROWS),--rows $(ROWS))

quality: install
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

style: install
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
