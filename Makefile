# `make help` lists the targets. TORCH=2.10.0 runs one with another torch, in a virtual environment of its own.

TORCH ?=
VENV := .venv$(if $(TORCH),-$(TORCH))
PYTHON ?= python3
BIN := $(VENV)/bin
SPHINX = $(BIN)/sphinx-build --conf-dir docs/site --doctree-dir build/doctrees --fresh-env --quiet

.PHONY: help test coverage test-slow test-processors demo lint lint-code lint-format lint-types lint-imports docs \
	linkcheck bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

test: $(VENV)/.installed  ## run the tests, but for slow ones
	$(BIN)/python -c "import torch; print('torch', torch.__version__)"
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Tracing takes up to two thirds more processor time with Python 3.11, so that `make test` is without it.
coverage: $(VENV)/.installed  ## run the tests, and show which lines and branches of each package they run
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov --cov-report=
	$(BIN)/coverage json --quiet -o - | $(BIN)/python .ci/coverage_by_package.py

test-slow: $(VENV)/.installed  ## run the slow tests
	$(BIN)/python -m pytest -m slow --timeout 7200

# Other processors that one machine can play: torch without AVX512, and without vector instructions at all.
test-processors: $(VENV)/.installed  ## run the tests of numerics as on other processors
	for capability in avx2 default; do \
		ATEN_CPU_CAPABILITY=$$capability ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest \
			tests/laws tests/numerics tests/integration/test_same_program.py || exit 1; \
	done

# What an earlier demo wrote is replaced.
demo: $(VENV)/.installed  ## quantize a small trained model by every recipe
	$(BIN)/vitquant demo --force

lint: lint-code lint-format lint-types lint-imports  ## check the code, its format, its types and who imports whom

lint-code: $(VENV)/.installed
	$(BIN)/ruff check .

lint-format: $(VENV)/.installed
	$(BIN)/ruff format --check .

lint-types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

lint-imports: $(VENV)/.installed
	$(BIN)/lint-imports

# From nothing every time: of what did not change since the last build, Sphinx does not repeat the warnings.
docs: $(VENV)/.docs  ## build the site in build/docs; a broken link, a page that no contents name: errors
	rm -rf build/docs
	$(SPHINX) --fail-on-warning --keep-going . build/docs

linkcheck: $(VENV)/.docs  ## ask the network whether the links that leave the site work
	$(SPHINX) --builder linkcheck . build/linkcheck

# Minutes each, on a quiet machine; every table in docs/ names the one it came from.
bench: $(VENV)/.installed  ## measure accuracy and cost
	$(BIN)/python benchmarks/recipes.py observers --simulated
	$(BIN)/python benchmarks/calibration_cost.py
	$(BIN)/python benchmarks/calibration_memory.py

$(VENV)/.installed: pyproject.toml src/vitquant/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch$(if $(TORCH),==$(TORCH))" torchvision timm
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:  ## remove the virtual environments and what was built
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
