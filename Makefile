# Every target sets the environment up by itself; it needs python3 with pip, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TORCH := 2.13.0
PYTEST_WORKERS ?= 2

.PHONY: demo test check bench setup clean

demo: setup
	$(BIN)/varc demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# peak memory and time of loading a random model with the 2B's shapes
bench: setup
	$(BIN)/python benchmarks/load.py

setup: $(STAMP)

# Debian's python3 may lack ensurepip: then the pip outside puts one inside
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(BIN)/python install pip; }

# Without an NVIDIA GPU the CPU build is taken: from the index when it has one, otherwise by uv,
# which knows where PyTorch keeps it. An installed torch of the right version is left as it is.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@set -e; \
	if $(BIN)/python -m pip freeze | grep -q '^torch==$(TORCH)\(+\|$$\)'; then :; \
	elif command -v nvidia-smi >/dev/null 2>&1; then \
	    $(BIN)/python -m pip install -c constraints.txt "torch==$(TORCH)"; \
	elif ! $(BIN)/python -m pip install -q -c constraints.txt "torch==$(TORCH)+cpu"; then \
	    echo "the index has no CPU build of torch; asking uv for it"; \
	    $(BIN)/python -m pip install -q uv; \
	    $(BIN)/uv pip install --python $(BIN)/python --torch-backend=cpu "torch==$(TORCH)"; \
	fi
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
