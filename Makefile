# make demo: the main job on the bundled data.  make test: the whole suite.  make bench [DEVICE=cuda] [ARGS=--resume]:
# time and memory against others, into benchmarks/results.  All create .venv first.
PYTHON ?= python3
DEVICE ?= cpu
BIN := .venv/bin
# threads that sleep while they wait, so that a busy machine is no disaster
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test bench lint clean

demo: .venv/all
	$(BIN)/qtx study --out runs/demo --resume
	@echo "no outliers yet, in minutes; the effect, in hours: docs/studies/effect/README.md, and there"
	@echo "qtx study docs/studies/effect/sinks.toml --out runs/effect/sinks --resume --jobs 2"

# one process a core, each with one thread
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

bench: .venv/bench
	$(BIN)/python -m benchmarks --device $(DEVICE) $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/all .venv/bench .venv/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[$(notdir $@)]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
