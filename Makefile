# make setup   a virtual environment in .venv with everything in it
# make demo    watch a small swarm of real workers train on this machine
# make test    the whole default test suite
# make check   lint, format, types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=

.PHONY: setup demo test check clean
setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "dtrain needs Python 3.10 or newer; name one with: make setup PYTHON=python3.12" >&2; exit 2; }
	@echo "==> Making the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> Installing dtrain and its pinned dependencies (torch is the large one; this takes a few minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "==> Ready. Try: $(BIN)/dtrain --help"

demo: setup
	$(BIN)/dtrain demo $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/types.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
