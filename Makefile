# make demo: the main job on the bundled data.  make test: the whole suite.  Both create .venv first.
PYTHON ?= python3
BIN := .venv/bin
# threads that sleep while they wait, so that a busy machine is no disaster
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clean

demo: .venv/all
	$(BIN)/qtx study --out runs/demo --resume

# one process a core, each with one thread
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/all .venv/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[$(notdir $@)]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
