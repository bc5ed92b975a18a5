# make test | test-processors | demo | lint | bench; TORCH=2.10.0 runs with another torch, in a virtual environment of its own.

TORCH ?=
VENV := .venv$(if $(TORCH),-$(TORCH))
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: test test-slow test-processors demo lint bench clean

test: $(VENV)/.installed
	$(BIN)/python -c "import torch; print('torch', torch.__version__)"
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow --timeout 7200

# Other processors that one machine can play: torch without AVX512, and without vector instructions at all.
test-processors: $(VENV)/.installed
	for capability in avx2 default; do \
		ATEN_CPU_CAPABILITY=$$capability ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest \
			tests/laws tests/numerics tests/integration/test_same_program.py || exit 1; \
	done

# What an earlier demo wrote is replaced.
demo: $(VENV)/.installed
	$(BIN)/vitquant demo --force

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Minutes each, on a quiet machine; every table in docs/ names the one it came from.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/recipes.py observers --simulated
	$(BIN)/python benchmarks/calibration_cost.py
	$(BIN)/python benchmarks/calibration_memory.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch$(if $(TORCH),==$(TORCH))" torchvision timm
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
