# make demo | test | lint | format | tables | clean. PYTHON picks the interpreter the environment is made from.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CODE   := $(wildcard src papers benchmarks tests)
# -qq: errors only. The pip of older Pythons warns about things that are harmless.
PIP    := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test browser lint format tables clean

help:
	@echo "make demo     train a small network that clicks into 2 bits, and show both of its lives"
	@echo "make test     lint, types, doctests and tests"
	@echo "make lint     ruff and pyright alone"
	@echo "make format   rewrite the code the way lint wants it"
	@echo "make tables   rebuild the tables in the docs from benchmarks/records"
	@echo "make clean    remove the environment and the caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "detent needs Python 3.10 or newer; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that no other package can ask for another build of it.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Detent into $(VENV) (once, a few minutes) ..."
	@$(PIP) torch
	@$(PIP) -e '.[demo,data]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Detent and its test tools into $(VENV) (once, a few minutes) ..."
	@$(PIP) torch
	@$(PIP) -e '.[test,dev]'
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/detent demo --force

# The report is looked at in a real browser. Where none can be had its tests skip and say so.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing chromium (once) ..." && \
	    { apt-get install -y -qq --no-install-recommends chromium || \
	      { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }; } >/dev/null 2>&1; } || \
	  echo "No chromium here: the report's page will not be looked at."

# One test process a core, one torch thread a process (tests/conftest.py).
test: lint browser
	@$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

tables: $(VENV)/.test
	@$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
