# Every target sets up what it needs in a virtual environment here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GEN_VENV := .venv-gen
SBOM_VENV := .venv-sbom
LOCK_VENV := .venv-lock
# Tests of one file stay together, for they share servers.
PYTEST_FLAGS ?= --numprocesses 2 --dist loadfile

DISTRIBUTIONS := protos/python runtime clients/python services compression
INSTALL := -e protos/python -e 'runtime[cpu]' -e clients/python -e 'services[cpu]' -e 'compression[cpu]'
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test long check lint types contracts gen reference clients sbom lock format clean
.DEFAULT_GOAL := help

help: ## Say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.installed ## Train, compress, serve and swap under load, on real digits
	$(BIN)/pollard demo $(DEMO_FLAGS)

test: $(VENV)/.installed-dev ## Run the tests, but for those that take long
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not long"

long: $(VENV)/.installed-dev ## Run the long tests: kills, drills, examples from training to traffic, other languages
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m long

check: lint types contracts ## Lint, types, contracts and generated code

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy runtime/src services/src clients/python/src compression/src

contracts: $(VENV)/.installed-dev $(GEN_VENV)/.installed
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	@tag=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null); \
	if [ -n "$$tag" ]; then \
	  echo "buf breaking, against $$tag"; $(BIN)/buf breaking --against ".git#tag=$$tag"; \
	else \
	  echo "buf breaking: skipped, there is no release tag yet"; \
	fi
	$(PYTHON) protos/generate.py --python $(GEN_VENV)/bin/python --check
	$(PYTHON) clients/generate.py --check
	$(BIN)/python docs/generate.py --check

gen: $(GEN_VENV)/.installed ## Generate the code of the contracts, in every language
	$(PYTHON) protos/generate.py --python $(GEN_VENV)/bin/python
	$(PYTHON) clients/generate.py

reference: $(VENV)/.installed-dev ## Write docs/reference from the code and the contracts
	$(BIN)/python docs/generate.py

clients: ## Build the clients in other languages, as far as their toolchains are there
	$(PYTHON) clients/build.py

# An environment of its own, so that what writes the bill is not on it.
sbom: $(VENV)/.installed $(SBOM_VENV)/.installed ## Write and validate build/sbom.cdx.json, a bill of materials (CycloneDX)
	@mkdir -p build
	$(SBOM_VENV)/bin/cyclonedx-py environment --pyproject services/pyproject.toml --output-reproducible \
	  --sv 1.6 --of JSON --validate --output-file build/sbom.cdx.json $(BIN)/python

format: $(VENV)/.installed-dev ## Format the Python code and the contracts
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

# torch is named with its exact version: a range would bring another build of it.
# For every platform, by versions of constraints.txt; our own distributions are built from source.
lock: $(LOCK_VENV)/.installed ## Write deploy/locks: all that the services stand on, with hashes
	for kind in cpu gpu; do \
	  UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK_VENV)/bin/uv pip compile deploy/locks/$$kind.in \
	    --quiet --universal --python-version 3.11 --constraint constraints.txt --generate-hashes --no-strip-extras \
	    --no-annotate --no-emit-index-url --no-emit-find-links \
	    $(patsubst %,--no-emit-package pollard-%,protos runtime client services) \
	    --output-file deploy/locks/$$kind.txt || exit 1; \
	done

$(VENV)/.installed: constraints.txt $(DISTRIBUTIONS:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0 $(INSTALL)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	@touch $@

$(GEN_VENV)/.installed: requirements-gen.txt
	$(PYTHON) -m venv $(GEN_VENV)
	$(GEN_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement requirements-gen.txt
	@touch $@

$(LOCK_VENV)/.installed: requirements-lock.txt
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement requirements-lock.txt
	@touch $@

$(SBOM_VENV)/.installed: requirements-sbom.txt
	$(PYTHON) -m venv $(SBOM_VENV)
	$(SBOM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement requirements-sbom.txt
	@touch $@

clean: ## Remove environments, caches and what the demo left
	rm -rf $(VENV) $(GEN_VENV) $(SBOM_VENV) clients/typescript/node_modules clients/typescript/dist .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist var
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
