# `make train` and `make test` need Python 3.11 to 3.14 and nothing else.
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
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 15) else "mnist_flax needs Python 3.11 to 3.14, and $(PYTHON) is %d.%d: name another with PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@
