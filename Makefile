# make demo: train the default model on real text and show it.  make test: everything that CI checks.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
OUT := $(or $(OUT),runs/demo-$(shell date +%Y%m%d-%H%M%S))
BIN := $(VENV)/bin

.PHONY: demo test check format performance clean

# Torch first, by its own requirement, so that nothing that needs it picks another build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/sparsae train --preset demo --out "$(OUT)"
	@echo; echo "A sample of what it learned:"; echo
	$(BIN)/sparsae generate "$(OUT)" --prompt "def __init__(self, " --tokens 60
	@echo; echo "Look at $(OUT)/report.html"

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An hour on a quiet machine; the other libraries that docs/performance.md names take part where they are installed.
RESULTS := docs/results/performance
performance: $(VENV)/.installed
	mkdir -p $(RESULTS)
	$(BIN)/sparsae bench roofline --json $(RESULTS)/roofline.json
	$(BIN)/sparsae bench kernels --json $(RESULTS)/kernels.json
	$(BIN)/sparsae bench kernels --backends cpu --sparsities 0.9 --threads 1,2 --json $(RESULTS)/kernels-threads.json
	$(BIN)/sparsae bench step --decode 64 --threads 1 --json $(RESULTS)/step.json
	$(BIN)/sparsae bench step --decode 64 --threads 2 --json $(RESULTS)/step-threads.json
	$(BIN)/sparsae bench topology --threads 1 --widths 512,1024,2048,4096,8192,16384 --json $(RESULTS)/topology.json
	$(BIN)/python benchmarks/performance.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
