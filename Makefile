# `make train` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
CONFIG ?= configs/larger.py:digits
VENV   ?= .venv
# Further flags of the training command: make train ARGS="--config.epochs=5 --workdir=runs/five"
ARGS   ?=

.PHONY: train test lint

train: $(VENV)/installed
	$(VENV)/bin/python -m mnist_flax.main --config=$(CONFIG) $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -rs

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mnist_flax needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another with PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@
