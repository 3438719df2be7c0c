# One virtual environment, pinned; every target works from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
TRITON_TESTS := tests/test_ops.py tests/test_jagged_attention.py tests/test_triton_rows.py \
  tests/test_default_dtype.py tests/test_linear_cross_entropy_group.py tests/test_in_batch_cross_entropy_group.py \
  tests/test_sampled_linear_cross_entropy.py tests/test_in_batch_hardest.py tests/test_multilabel_bce.py \
  tests/test_jagged_max_pool.py tests/test_linear_cross_entropy_plan.py tests/test_float32_products.py
VECTOR_TESTS := tests/test_ops.py tests/test_jagged_attention.py \
  -k "cpp and ((within_budget and float32) or masks_are or generator_has)"
INTEGRATIONS := transformers recbole rectools replay
ASAN := $(abspath build/asan)
# A worker process per core; tests of threads and of several processes bring their own.
WORKERS := -n auto --dist worksteal

# A library's environment is kept.
.PRECIOUS: build/integrations/%/installed

.PHONY: help demo test test-all test-integrations smoke fuzz lint bench kernel-tables install docs wheel clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: .venv/installed  ## create .venv with pinned dependencies and the built extension

.venv/dependencies: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The extension is rebuilt when a source changes, and only then.
.venv/installed: .venv/dependencies setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/common/*)
	rm -f fastrec/_C.cpython-*.so  # of before the stable interface of Python, and found first
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: .venv/installed  ## generate data, pre-train, fine-tune, evaluate, plot (about 4 minutes)
	$(BIN)/fastrec demo

test: .venv/installed  ## the suite; the Triton kernels in the interpreter; cpp with narrower vectors
	$(BIN)/python -m pytest $(WORKERS) -m "not exhaustive"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(WORKERS) $(TRITON_TESTS) -m "triton and not exhaustive"
	FASTREC_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest $(WORKERS) $(VECTOR_TESTS)
	FASTREC_CPU_CAPABILITY=default $(BIN)/python -m pytest $(WORKERS) $(VECTOR_TESTS)
	FASTREC_CPU_CAPABILITY=avx512_bf16 $(BIN)/python -m pytest $(WORKERS) tests/test_ops.py \
	  -k "linear_cross_entropy and cpp and bfloat16 and within_budget and not sampled"

test-all: test  ## the same and what is slow and says little, before a release
	$(BIN)/python -m pytest $(WORKERS) -m exhaustive
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(WORKERS) $(TRITON_TESTS) -m "triton and exhaustive"

smoke: .venv/installed  ## the suite without the slow tests
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not exhaustive"

# Each library in an environment of its own, because their pins collide.
test-integrations: .venv/installed $(INTEGRATIONS:%=build/integrations/%/installed)  ## the patches of real libraries
	for library in $(INTEGRATIONS); do \
	  FASTREC_LIBRARY=$$library PYTHONPATH=. build/integrations/$$library/bin/python -m pytest tests/integrations \
	    || exit 1; \
	done

build/integrations/%/installed: tests/integrations/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

fuzz: .venv/installed  ## 20,000 damaged files, 4,000 damaged data sets, 50,000 calls of ops under ASan
	FASTREC_FUZZ=20000 $(BIN)/python -m pytest $(WORKERS) tests/test_fuzz_data.py
	CFLAGS="-fsanitize=address -g1" LDFLAGS="-fsanitize=address" $(BIN)/python setup.py -q \
	  build_ext --build-lib $(ASAN) --build-temp $(ASAN)/objects
	FASTREC_FUZZ=50000 FASTREC_FUZZ_EXTENSION=$$(ls $(ASAN)/fastrec/_C*.so) \
	  $(BIN)/python -m pytest $(WORKERS) tests/test_fuzz_ops.py

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## measure the ops against their peers; updates results and tables
	$(BIN)/python -m benchmarks.run --output benchmarks/results/cpu.json --table
	$(BIN)/python -m benchmarks.roofline

docs: build/site-tools/installed  ## the documentation site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 build/site-tools/bin/mkdocs build --strict --site-dir build/site

build/site-tools/installed: docs/site/requirements.txt
	$(PYTHON) -m venv build/site-tools
	build/site-tools/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# The oldest Triton that is supported beside the installed one.
build/triton-3.6.0: | .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0
	@touch $@

kernel-tables: .venv/installed build/triton-3.6.0  ## what the Triton kernels compile to, into docs/kernels
	$(BIN)/python tests/aot_tables.py
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python tests/aot_tables.py

wheel: .venv/installed  ## one wheel for Python 3.11 and later and torch 2.11 and later, into dist/
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info fastrec/*.so
