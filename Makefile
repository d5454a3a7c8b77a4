# `make demo` and `make test` install into .venv and run; both work in a fresh clone with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-lmms check install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kdcli needs Python >= 3.11: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## the main job on the demo world: data, cache, students, table, report
	$(BIN)/kdcli demo --out demo-run

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# lmms-eval brings a hundred packages: an environment of its own.
test-lmms: .venv-lmms/.installed  ## the plug-in inside lmms-eval, offline, on a local task
	PYTHONPATH=tests/lmms/shim .venv-lmms/bin/python -m pytest -q tests/lmms

.venv-lmms/.installed: pyproject.toml constraints-lmms.txt
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lmms.txt --editable . lmms-eval pytest pytest-timeout
	touch $@

check: install  ## linter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo-run .pytest_cache .ruff_cache .mypy_cache
