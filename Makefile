# make demo       train and sample real handwritten digits on the CPU, from nothing (a few minutes, most of it the install)
# make test       the whole default test suite;  make test-slow  the rest
# make coverage   the default test suite, and which lines of the package it runs
# make lint       ruff, version and rules pinned
# make clean      remove the virtual environment, runs, samples and what was measured

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

# Two processes, a test file in one of them; then, alone, the tests that start processes, send signals or measure memory.
# The second runs although the first failed. OMP_NUM_THREADS: the processes share the cores.
PARALLEL := -n 2 --dist loadfile
SERIAL = $(shell grep -rl "mark.serial" tests --include='test_*.py')
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10

.PHONY: demo test test-slow coverage lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/adagn train --config configs/digits.yaml --output_dir runs/digits --resume auto
	$(BIN)/adagn sample runs/digits --classes all --guidance 1,2,4 --count 8 --out samples/digits --overwrite
	@echo "Pictures: samples/digits/grid.png (sampled), runs/digits/previews (as training went)"
	@echo "What the condition does:"
	@echo "  $(BIN)/adagn trace runs/digits"

test: $(VENV)/.installed
	status=0; \
	$(PYTEST) $(PARALLEL) -m "not slow and not serial" || status=1; \
	$(PYTEST) -m "not slow and serial" $(SERIAL) || status=1; \
	exit $$status

test-slow: $(VENV)/.installed
	status=0; \
	$(PYTEST) $(PARALLEL) -m "slow and not serial" || status=1; \
	$(PYTEST) -m "slow and serial" $(SERIAL) || status=1; \
	exit $$status

coverage: $(VENV)/.installed
	$(PYTEST) $(PARALLEL) -m "not slow and not serial" --cov=diffusion_adagn --cov-report=
	$(PYTEST) -m "not slow and serial" --cov=diffusion_adagn --cov-append --cov-report=term --cov-report=html:coverage

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .coverage coverage runs samples sweeps evaluations traces
