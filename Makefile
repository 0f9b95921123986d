# make demo       train and sample real handwritten digits on the CPU, from nothing (a few minutes, most of it the install)
# make test       the whole default test suite;  make test-slow  the rest
# make lint       ruff, version and rules pinned
# make clean      remove the virtual environment, runs, samples and what was measured

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow lint clean

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
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs samples sweeps evaluations traces
