# make demo       train and sample real handwritten digits on the CPU, from nothing (a few minutes, most of it the install)
#                 TORCH=cpu takes the CPU build of torch, TORCH=auto the build for this machine's GPU (uv installs it)
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

# uv can choose the build of torch (TORCH: cpu, auto, or a CUDA version such as cu130); pip takes what its index has.
# If TORCH is given and uv is not there, uv is installed first.
UV := $(shell command -v uv)
ifeq ($(UV)$(TORCH),)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DOWNLOAD := pip downloads about 3 GB if its torch is the CUDA build (usual on Linux). CPU build, about 0.4 GB: make demo TORCH=cpu
else
INSTALL := $(or $(UV),$(BIN)/uv) pip install --quiet --python $(BIN)/python --torch-backend=$(or $(TORCH),cpu)
DOWNLOAD := uv downloads the build "$(or $(TORCH),cpu)" of torch and the rest (cpu: about 0.4 GB; with CUDA about 3 GB)
endif

.PHONY: demo test test-slow coverage lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# what the package needs; and what its tests need besides
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): $(DOWNLOAD)'
	$(if $(UV),,$(if $(TORCH),$(BIN)/python -m pip install --quiet --disable-pip-version-check uv))
	$(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(INSTALL) -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/adagn train --config configs/digits.yaml --output_dir runs/digits --resume auto
	$(BIN)/adagn sample runs/digits --classes all --guidance 1,2,4 --count 8 --out samples/digits --overwrite
	@echo "Pictures: samples/digits/grid.png (sampled), runs/digits/previews (as training went)"
	@echo "What the condition does:"
	@echo "  $(BIN)/adagn trace runs/digits"

test: $(VENV)/.test-installed
	status=0; \
	$(PYTEST) $(PARALLEL) -m "not slow and not serial" || status=1; \
	$(PYTEST) -m "not slow and serial" $(SERIAL) || status=1; \
	exit $$status

test-slow: $(VENV)/.test-installed
	status=0; \
	$(PYTEST) $(PARALLEL) -m "slow and not serial" || status=1; \
	$(PYTEST) -m "slow and serial" $(SERIAL) || status=1; \
	exit $$status

coverage: $(VENV)/.test-installed
	$(PYTEST) $(PARALLEL) -m "not slow and not serial" --cov=diffusion_adagn --cov-report=
	$(PYTEST) -m "not slow and serial" --cov=diffusion_adagn --cov-append --cov-report=term --cov-report=html:coverage

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .coverage coverage runs samples sweeps evaluations traces
