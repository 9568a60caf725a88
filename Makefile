# Every target makes its own .venv from constraints.txt and needs python3 (3.11 or newer) alone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test explain bench lint clean

demo: .venv/installed  ## three heads side by side: a table, a report and a picture
	$(BIN)/python scripts/compare.py

explain: .venv/installed  ## the lesson: one image through the chain rule, factor by factor
	$(BIN)/python scripts/explain.py

bench: .venv/installed  ## what the ops cost beside torch's: every claim as a table, JSON and a picture
	$(BIN)/python scripts/benchmark.py

test: .venv/installed  ## everything
	$(BIN)/python -m pytest -n auto

lint: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[train,test,lint]"
	touch $@
