# Two commands matter: `make run` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= test
# Set EXTRAS=test,cuda on a machine with GPUs; the same torch pin then takes its CUDA build.
CHECKPOINT ?= /dev/shm/tandem-llama-3-8b
# 16 GB of random weights, made once; remove the directory to have the memory back.
FIGURES ?= build/figures
GPU_BENCHMARKS := $(filter-out gpu_serve gpu_step,$(basename $(notdir $(wildcard benchmarks/gpu_*.py))))

.PHONY: run setup check test test-unit test-rest test-long test-matrix gpu-test gpu-bench clean

run: setup
	$(BIN)/tandem chat --model smollm2-135m --tp 3 --temperature 0

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock requirements-cuda.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c requirements.lock -c requirements-cuda.lock -e ".[$(EXTRAS)]"
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest tests/unit
	$(BIN)/pytest tests/golden tests/integration tests/faults

test-long: setup test-matrix
	$(BIN)/pytest tests -m long --timeout 1200

# Every model over every layout, of which `make test` takes a third.
test-matrix: setup
	$(BIN)/pytest tests/golden/test_matrix.py --matrix all

gpu-test: setup
	$(BIN)/pytest tests/gpu -m gpu

# One after another, so that none disturbs another; all are run, and a demand that is missed fails at the end.
gpu-bench: setup $(CHECKPOINT)/model.safetensors.index.json
	mkdir -p $(FIGURES)
	$(BIN)/tandem warm --model $(CHECKPOINT)
	failed=; for name in $(GPU_BENCHMARKS); do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name --json $(FIGURES)/$$name.json || failed="$$failed $$name"; \
	done; \
	for name in gpu_step gpu_serve random_load; do \
		echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name --model $(CHECKPOINT) --json $(FIGURES)/$$name.json || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "missed or failed:$$failed"; exit 1; fi

$(CHECKPOINT)/model.safetensors.index.json: | setup
	$(BIN)/python -m benchmarks.make_checkpoint llama-3-8b $(CHECKPOINT) --tokenizer

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
