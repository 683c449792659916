# Each command makes the environment it needs in .venv by itself; `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Else pyright asks the network whether there is a newer pyright.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint check format bench bench-federated clean
# Two installers in one environment get in each other's way.
.NOTPARALLEL:

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.for-demo ## train on the bundled corpus, centrally and federated, and search
	$(BIN)/caravan demo

test: $(VENV)/.for-development ## run the quick tests
	$(BIN)/pytest -m "not slow and not gpu and not network"

test-all: $(VENV)/.for-development ## run the slow tests too, and report coverage
	$(BIN)/pytest -m "not gpu and not network" --cov

lint: $(VENV)/.for-development ## check style, formatting, types, and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

check: lint test ## all that a change must pass

format: $(VENV)/.for-development ## put imports and layout in order
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

bench: $(VENV)/.for-development ## run every benchmark: benchmarks/NAME.py writes benchmarks/results/NAME.json
	@mkdir -p benchmarks/results
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do \
		echo "$$script"; $(BIN)/python $$script benchmarks/results/$$(basename $$script .py).json; \
	done

bench-federated: $(VENV)/.for-development ## measure the speed-up of a federation (best on an idle machine)
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/speedup.py benchmarks/results/speedup.json

clean: ## remove caches and build outputs, but not .venv
	rm -rf build dist src/*.egg-info .coverage .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests $(wildcard benchmarks examples) -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.for-demo: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV); the first time this takes some minutes."
	@$(INSTALL) -e '.[federated]'
	@touch $@

# Holds all that the demo needs, so the demo need not install again.
$(VENV)/.for-development: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV); the first time this takes some minutes."
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.for-demo $@

# pip is the last thing that venv puts there, so a half-made environment is made anew.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("caravan needs Python 3.11 or newer; name one: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv --clear $(VENV)
