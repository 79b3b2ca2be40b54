# `make demo` and `make test` do everything on a fresh machine: environment, installation, run.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
# Two workers on two cores; torch keeps to one thread in each.
PYTEST := -m pytest -q -n 2 --dist loadgroup
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all test-oldest lint format docs bench-overhead bench-distributed clean

demo: $(VENV)/.demo
	$(RUN) examples/demo/demo.py

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST) -m "not slow"

test-all: $(VENV)/.dev lint test-oldest
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

# The same tests on the oldest supported stack.
test-oldest: $(OLDEST)/.dev
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not slow"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The pages that are made from the code.
docs: $(VENV)/.dev
	$(RUN) docs/refusals.py
	$(RUN) docs/draw_map.py

bench-overhead: $(VENV)/.dev
	$(RUN) benchmarks/overhead.py --quick
	$(RUN) benchmarks/overhead.py --map

bench-distributed: $(VENV)/.dev
	$(RUN) benchmarks/distributed.py

$(VENV)/.demo: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[demo,dev]"
	touch $@

$(OLDEST)/.dev: pyproject.toml requirements-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[demo,dev]" --constraint requirements-oldest.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo-output build dist *.egg-info
