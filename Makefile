# Each target works on a fresh machine: it makes .venv when that is missing or out of date.
# Needs: python3 >= 3.10 with venv. A C++ compiler is optional (without one, no cpp backend).
# Whether torch is a CPU or a CUDA build is decided by the package index that pip is set up with.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TRAIN_ARGS ?=
TEST_ARGS ?=
TRITON_VERSIONS ?= 3.6.0 3.9.0
GPU_PYTHON ?= python3
GPU_MINUTES ?= 9
GPU_ARGS ?=
TRITON_TESTS ?= tests/ops tests/test_equivalence.py
# what CI runs of them in one older version: every combination of flags, and the smaller ops in full
TRITON_SAMPLE := $(patsubst %,tests/ops/test_%.py,flags_triton triton_launch gelu_triton \
	linear_mlp_triton adamw_triton)
BENCH_ARGS ?=

BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.h %.hpp %.cpp %.cu %.cuh,$(NATIVE_SOURCES))
# Installed without a compiler, and there is one now: install again.
NATIVE_IS_DUE := $(if $(wildcard gptk/_C*.so)$(GPTK_NO_NATIVE),,$(shell command -v c++ g++ clang++))
BUILD_INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(NATIVE_SOURCES) \
	$(if $(NATIVE_IS_DUE),FORCE)
# The build environment that pip makes for itself gets the same pins (one name per pip version).
PIP_INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# pip hides what setup.py prints, so the sentence about a missing extension is said here.
SAY_WHAT_IS_MISSING = $(BIN)/python -c 'import gptk.native; \
	reason = gptk.native.available(); reason and print("Note:", reason)'

.DEFAULT_GOAL := help
.PHONY: help train test lint bench aot test-triton test-triton-sample gpu clean FORCE

help:
	@echo 'make train   train the default model on this machine, then print a sample; TRAIN_ARGS= adds flags'
	@echo 'make test    run the tests; TEST_ARGS= adds arguments for pytest'
	@echo 'make test-triton  the Triton tests in other versions of it: TRITON_VERSIONS="$(TRITON_VERSIONS)"'
	@echo 'make lint    ruff, mypy, import-linter, clang-format'
	@echo 'make bench   time ops and training steps against PyTorch; BENCH_ARGS= adds arguments'
	@echo 'make aot     compile every Triton kernel for sm_80, sm_90, sm_100; store what each needs, and the roofline'
	@echo 'make gpu     on a machine with a GPU: tests, benchmarks and training in $(GPU_MINUTES) minutes, with the packages'
	@echo '             that $(GPU_PYTHON) has; GPU_PYTHON= names another, GPU_ARGS= adds arguments (--dry-run: no GPU)'
	@echo 'make clean   remove .venv and what was built; runs/ stays'
	@echo 'PYTHON=$(PYTHON) and WORKERS=$(WORKERS) (test processes) can be changed in the same way'

train: $(VENV)/.installed-train
	@$(BIN)/gptk train $(TRAIN_ARGS)

# one thread per worker: two workers fill two cores
test: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS)

# The kernels in the interpreters of other versions, each in a folder of its own below build/. That of
# 3.6 makes numbers of arrays of one element, which numpy refuses from 2.4 on.
test-triton: $(VENV)/.installed-dev
	@for version in $(TRITON_VERSIONS); do \
	  test -d build/triton-$$version/triton || $(BIN)/python -m pip install -qq \
	    --disable-pip-version-check --no-deps --target build/triton-$$version triton==$$version 'numpy<2.4' || exit 1; \
	  echo "triton $$version"; \
	  GPTK_TEST_TRITON=$$version PYTHONPATH=$(CURDIR)/build/triton-$$version OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest \
	    -q -n $(WORKERS) -k 'triton and not compiles' $(TRITON_TESTS) $(TEST_ARGS) || exit 1; \
	done

test-triton-sample:
	@$(MAKE) --no-print-directory test-triton TRITON_VERSIONS=3.6.0 TRITON_TESTS='$(TRITON_SAMPLE)'

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

bench: $(VENV)/.installed-dev
	@$(BIN)/gptk bench $(BENCH_ARGS)

aot: $(VENV)/.installed-dev
	@$(BIN)/python -m gptk.aot --json benchmarks/results/aot.json

# Installs nothing and makes no .venv: torch, triton, numpy and pytest are the machine's own.
gpu:
	@PYTHONPATH=$(CURDIR):$$PYTHONPATH $(GPU_PYTHON) -m benchmarks.gpu --minutes $(GPU_MINUTES) $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find gptk -name '*.so' -delete

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'No $(PYTHON) here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "gptk needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv).'; exit 1; }
	@echo 'Making $(VENV)'
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed-train: $(BUILD_INPUTS) | $(VENV)/bin/python
	@echo 'Installing gptk with its pinned dependencies into $(VENV) (the first time this takes minutes)'
	@$(PIP_INSTALL) -e '.[train]'
	@$(SAY_WHAT_IS_MISSING)
	@touch $@

# dev holds all that train needs, so one install serves both
$(VENV)/.installed-dev: $(BUILD_INPUTS) | $(VENV)/bin/python
	@echo 'Installing gptk with its pinned development tools into $(VENV) (the first time this takes minutes)'
	@$(PIP_INSTALL) -e '.[dev]'
	@$(SAY_WHAT_IS_MISSING)
	@touch $@ $(VENV)/.installed-train
