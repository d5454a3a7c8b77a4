# `make demo` and `make test` install into .venv and run; both work in a fresh clone with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kdcli needs Python >= 3.11: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# A folder of its own: image processors choose their backend by whether torchvision is there. Only tests/families sees it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target .venv/torchvision torchvision
	touch $@

demo: install  ## the main job on the demo world: data, cache, students, table, report
	$(BIN)/kdcli demo --out demo-run

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	PYTHONPATH=.venv/torchvision $(BIN)/python -m pytest -q tests/families -n 2

check: install  ## linter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo-run .pytest_cache .ruff_cache .mypy_cache
