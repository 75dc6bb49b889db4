# make demo: train the default model on real text and show it.  make test: everything that CI checks.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
# The versions that demo and test are run with. Empty: the newest that pyproject.toml admits.
LOCK ?= constraints.txt
OUT := $(or $(OUT),runs/demo-$(shell date +%Y%m%d-%H%M%S))
BIN := $(VENV)/bin

.PHONY: demo test test-oldest test-newest test-triton test-gpu soak golden check format lock performance pages docs gallery wheel wheels clean

# Torch first, by its own requirement, which the second line repeats: nothing that needs torch may pick another build.
$(VENV)/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(addprefix --constraint ,$(LOCK)) --upgrade pip
	$(BIN)/pip install --quiet --no-compile $(addprefix --constraint ,$(LOCK)) "$(TORCH)"
	$(BIN)/pip install --quiet --no-compile $(addprefix --constraint ,$(LOCK)) $(addprefix --build-constraint ,$(LOCK)) "$(TORCH)" --editable ".[dev]"
	@# pip would do this by one process. Some packages bring along files of other Pythons.
	-@$(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/sparsae train --preset demo --out "$(OUT)"
	@echo; echo "A sample of what it learned:"; echo
	$(BIN)/sparsae generate "$(OUT)" --prompt "def __init__(self, " --tokens 60
	@echo; echo "Look at $(OUT)/report.html"

# Files of tests go to as many processes; make test WORKERS=0: one after the other, in this process.
WORKERS ?= 2
test: check
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(MAKE) --silent test-gpu

# What only a GPU shows, on one that is simulated in host memory, or on that of a torch which was built with CUDA.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -p tests.gpu.simulated --numprocesses $(WORKERS) tests/gpu $(PYTEST)

# The tests alone, on the newest versions, in an environment of its own. PYTEST: arguments for pytest.
NEWEST := $(VENV)-newest
test-newest:
	rm -rf $(NEWEST)
	$(MAKE) VENV=$(NEWEST) LOCK= $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest $(PYTEST)

# The tests alone, with the oldest torch and transformers that pyproject.toml admits, in an environment of its own.
OLDEST := $(VENV)-oldest
OLDEST_TORCH := $(shell sed -n 's/^  "torch>=\(.*\)",$$/torch==\1.0/p' pyproject.toml)
OLDEST_TRANSFORMERS := $(shell sed -n 's/^  "transformers>=\(.*\),<6",$$/transformers==\1.0/p' pyproject.toml)
test-oldest: build/oldest.txt
	$(MAKE) VENV=$(OLDEST) TORCH=$(OLDEST_TORCH) LOCK=build/oldest.txt $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(PYTEST)

# constraints.txt, but for what that transformers wants older.
build/oldest.txt: pyproject.toml constraints.txt
	mkdir -p build
	sed '/^huggingface-hub==/d; s/^transformers==.*/$(OLDEST_TRANSFORMERS)/' constraints.txt > $@

# The kernels for GPUs, in Triton's interpreter on the CPU, and compiled for GPUs that need not be there. Linux only.
test-triton: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps "triton>=3.6,<4"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/test_cuda.py tests/kernels/test_kernels.py $(PYTEST)

# What takes minutes each: fuzzing, corruptions, kills.
soak: $(VENV)/.installed
	$(BIN)/python -m pytest tests/soak

# Short runs of every method, the code of a commit beside the working tree, bit for bit: make golden OLD=v0.1.0
golden: $(VENV)/.installed
	$(BIN)/python -m tests.golden $(OLD)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Write $(LOCK) anew: the newest versions that serve every Python of pyproject.toml, the same for all, without torch and
# what its CUDA builds bring. torch 2.11 and 2.12 want setuptools below 82; the last three install and build.
RESOLVED := $(VENV)-lock/resolved.txt
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --upgrade uv
	printf '%s\n' "$(TORCH)" "setuptools<82" pip cmake ninja | $(VENV)-lock/bin/uv pip compile pyproject.toml - --extra dev \
	  --universal --python-version 3.11 --fork-strategy fewest --upgrade --no-header --no-annotate --quiet -o $(RESOLVED)
	echo "# Written by make lock: the versions that Sparsae is tested with. torch is installed first, by itself." > $(LOCK)
	sed -E '/^(torch|triton)==|^(cuda|nvidia)-/d' $(RESOLVED) >> $(LOCK)

# An hour on a quiet machine; the other libraries that docs/performance.md names take part where they are installed.
RESULTS := docs/results/performance
performance: $(VENV)/.installed
	mkdir -p $(RESULTS)
	$(BIN)/sparsae bench roofline --json $(RESULTS)/roofline.json
	$(BIN)/sparsae bench kernels --json $(RESULTS)/kernels.json
	$(BIN)/sparsae bench kernels --backends cpu --sparsities 0.9 --threads 1,2 --json $(RESULTS)/kernels-threads.json
	$(BIN)/sparsae bench step --sparsity 0.9,0.95 --decode 64 --threads 1 --json $(RESULTS)/step.json
	$(BIN)/sparsae bench step --sparsity 0.9,0.95 --decode 64 --threads 2 --json $(RESULTS)/step-threads.json
	$(BIN)/sparsae bench step --sparsity 0.9,0.95 --threads 1 --no-stock --set training.mlp_keeps=bfloat16 --json $(RESULTS)/step-kept.json
	$(BIN)/sparsae bench topology --threads 1 --widths 512,1024,2048,4096,8192,16384 --json $(RESULTS)/topology.json
	$(BIN)/python benchmarks/attention.py $(RESULTS)/attention.json
	$(BIN)/python benchmarks/performance.py

# The pages of the results in docs/results, which keeps their numbers alone.
PAGES ?= build/pages
pages: $(VENV)/.installed
	$(BIN)/python benchmarks/pages.py $(PAGES)

# The documentation as a site, in build/site; a link that leads nowhere fails, and so does what another place would serve.
# npm brings MathJax, which the site carries along.
MATHJAX := build/mathjax-3.2.2
$(MATHJAX)/.fetched:
	mkdir -p $(MATHJAX)
	cd build && npm pack --silent $(subst -,@,$(notdir $(MATHJAX))) && tar -xzf $(notdir $(MATHJAX)).tgz -C $(notdir $(MATHJAX))
	touch $@

$(VENV)/.docs: $(VENV)/.installed Makefile
	$(BIN)/pip install --quiet $(addprefix --constraint ,$(LOCK)) "$(TORCH)" "zensical>=0.0.73,<0.1" "mkdocstrings-python>=2,<3" "griffe-pydantic>=1.3,<2" \
	  "jupytext>=1.17,<2" "nbconvert>=7.14,<8" "ipykernel>=6.29,<8"
	@touch $@

# The examples as executed notebooks: two minutes. `make docs` runs those that changed; make gallery, all.
GALLERY := build/gallery
PLAYED := $(patsubst examples/%.py,$(GALLERY)/%.md,$(wildcard examples/*.py))
$(GALLERY)/%.md: examples/%.py website/gallery.py | $(VENV)/.docs
	$(BIN)/python website/gallery.py $< $(GALLERY)
gallery:
	rm -rf $(GALLERY)
	$(MAKE) $(PLAYED)

STAGED := build/docs
docs: $(VENV)/.docs $(MATHJAX)/.fetched $(PLAYED)
	$(BIN)/python website/gallery.py $(GALLERY)
	rm -rf $(STAGED)
	cp -R docs $(STAGED)
	cp -R $(GALLERY) $(STAGED)/gallery
	find $(STAGED) -name "*.md" -exec sed -i "s/ ± /\xc2\xa0±\xc2\xa0/g" {} +  # a number and its interval stay on one line
	mkdir -p $(STAGED)/assets/mathjax/output/chtml/fonts
	cp $(MATHJAX)/package/LICENSE $(MATHJAX)/package/es5/tex-chtml.js $(STAGED)/assets/mathjax
	cp -R $(MATHJAX)/package/es5/output/chtml/fonts/woff-v2 $(STAGED)/assets/mathjax/output/chtml/fonts
	$(BIN)/zensical build --clean --strict
	rm build/site/404.html  # it would look for its styles at the root of a server
	$(BIN)/python website/check.py build/site

# A wheel for this machine, in dist/. It has the native kernels and knows neither Python's version nor torch's.
wheel:
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

# Wheels for the platforms of pyproject.toml, by cibuildwheel, which on Linux wants Docker.
WHEELS := $(VENV)-wheels
wheels:
	$(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/pip install --quiet --upgrade "cibuildwheel>=3,<5"
	$(WHEELS)/bin/cibuildwheel --output-dir dist

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(WHEELS) $(VENV)-lock .pytest_cache .mypy_cache .ruff_cache .hypothesis
