# make demo       install, then train and sample handwritten digits on the CPU (a few minutes)
#                 TORCH=cpu selects the CPU build of torch, TORCH=auto the build for this machine's GPU (both need uv)
# make test       the default test suite
# make test-slow  the slow tests
# make coverage   the default test suite, with line coverage of the package
# make lint       ruff, with pinned version and rules
# make clean      remove the virtual environment, runs, samples, sweeps, evaluations and traces

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

# Two processes run the test files in parallel. Then the serial tests run alone: they start processes, send signals or
# measure memory. They also run if the first part failed. OMP_NUM_THREADS=1, because the processes share the cores.
PARALLEL := -n 2 --dist loadfile
SERIAL = $(shell grep -rl "mark.serial" tests --include='test_*.py')
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10

# uv can select the build of torch (TORCH: cpu, auto, or a CUDA version such as cu130). pip installs the build
# of its index. If TORCH is given and uv is missing, uv is installed first.
UV := $(shell command -v uv)
ifeq ($(UV)$(TORCH),)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DOWNLOAD := pip downloads about 3 GB if torch is the CUDA build (usual on Linux). \
            For the CPU build, about 0.4 GB: make demo TORCH=cpu
else
INSTALL := $(or $(UV),$(BIN)/uv) pip install --quiet --python $(BIN)/python --torch-backend=$(or $(TORCH),cpu)
DOWNLOAD := uv downloads the "$(or $(TORCH),cpu)" build of torch and all requirements \
            (cpu: about 0.4 GB; CUDA: about 3 GB)
endif

.PHONY: demo test test-slow coverage lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# requirements of the package; below, the additional ones of its tests
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): $(DOWNLOAD)'
	$(if $(UV),,$(if $(TORCH),$(BIN)/python -m pip install --quiet --disable-pip-version-check uv))
	$(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(INSTALL) -c constraints.txt -e '.[test,serve]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/adagn train --config configs/digits.yaml --output_dir runs/digits --resume auto
	$(BIN)/adagn sample runs/digits --classes all --guidance 1,2,4 --count 8 --out samples/digits --overwrite
	@echo "Images: samples/digits/grid.png (samples), runs/digits/previews (during training)"
	@echo "To inspect the conditioning:"
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
