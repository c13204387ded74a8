# `make demo` and `make test` do everything on a fresh machine: own virtual environment, installation, run.
# `make test` tries every behaviour on a case of each kind; `make test-all` runs the tests and cases that it leaves out.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint types docs wheel clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

# What takes minutes, builds the site and runs the notebooks, or needs tools of the system, which are skipped with the
# reason (-rs) where they are missing.
test-all: $(VENV)/docs
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow -rs

# The site, into build/docs; warnings are errors. Tables come from the code and from benchmarks/results.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

# Source archive and wheel, into dist/; the wheel is installed and used in an empty environment.
wheel: $(VENV)/installed
	$(BIN)/python .github/wheel.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/basedpyright

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "growfx needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs docs/_generated *.egg-info
