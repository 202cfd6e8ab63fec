# Two commands matter: `make run` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= test
# Set EXTRAS=test,cuda on a machine with GPUs; the same torch pin then takes its CUDA build.

.PHONY: run setup check test test-unit test-rest test-long gpu-test gpu-bench clean

run: setup
	$(BIN)/tandem chat --model smollm2-135m --tp 3 --temperature 0

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c requirements.lock -e ".[$(EXTRAS)]"
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest tests/unit
	$(BIN)/pytest tests/golden tests/integration tests/faults

test-long: setup
	$(BIN)/pytest tests -m long --timeout 1200

gpu-test: setup
	$(BIN)/pytest tests/gpu -m gpu

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
