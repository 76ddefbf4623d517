# From a bare clone: `make demo` or `make test`. Both set everything up first, once.
#
#   make demo           finetune a real model in 4 bits and compare it with before
#   make guanaco        a recipe, rivals, a judge, a ladder, probes, a blind test, one report
#   make test           lint, types, the sanitizer's share and the quick tests (what CI runs)
#   make test-full      the full test matrix
#   make test-sanitize  the CPU kernels' tests under ASan and UBSan
#   make test-gpu       the CUDA kernels' tests on the GPU that is here (`make test` emulates one),
#                       and the tests of ops and modules on it
#   make bench-gpu      the CUDA kernels on it, measured
#   make bench          the benchmarks, beside bitsandbytes, dense bf16 and the machine's limits
#   make docs           the site: build/site/index.html
#   make wheel          dist/: a release wheel, manylinux, with the CUDA half for every architecture
#   make build          the native libraries, in place
#   make format         rewrites sources as `make lint` wants them
#   make clean          removes what was built; `make distclean` the environment too
#
# PYTHON=python3.12 picks the interpreter of a new environment. Where PyPI's torch is a CUDA build,
# PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU wheels saves gigabytes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
REQUIREMENTS := $(wildcard requirements/*.txt)
CXX_SOURCES = $(shell git ls-files -co --exclude-standard 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp')
PYTHON_SOURCES := setup.py qlora_kernels tests $(wildcard benchmarks) $(wildcard scripts)
# Warnings end CI, not the build of someone whose compiler knows a new one.
export QLORA_KERNELS_WERROR ?= $(if $(CI),1,0)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
TEST_JOBS ?= 2
# One script a question; the other files there are what they share.
BENCHMARKS ?= $(shell grep -l '__name__ == "__main__"' benchmarks/*.py)

.PHONY: help
help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# --- the environment: stamps say which requirements it has ---------------------------------------

$(VENV)/demo.stamp: $(REQUIREMENTS) scripts/setup_venv.sh
	@PYTHON="$(PYTHON)" scripts/setup_venv.sh $(VENV) demo
	@touch $@

$(VENV)/dev.stamp: $(REQUIREMENTS) scripts/setup_venv.sh $(VENV)/demo.stamp
	@PYTHON="$(PYTHON)" scripts/setup_venv.sh $(VENV) dev
	@touch $@

# The package itself, as a link to this folder. pip builds it on the way and shows nothing of that.
$(VENV)/package.stamp: pyproject.toml setup.py $(VENV)/demo.stamp
	@echo "compiling the kernels (minutes the first time, seconds after a change) ..."
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: setup build
setup: $(VENV)/dev.stamp

build: $(VENV)/package.stamp
	@$(PY) setup.py --quiet build_ext --inplace

# --- what there is to run ------------------------------------------------------------------------

.PHONY: demo bench
demo: build
	@$(VENV)/bin/qlora demo $(DEMO_ARGS)

# In the development environment: it judges, serves and plots.
.PHONY: guanaco
guanaco: setup build
	@$(VENV)/bin/qlora guanaco $(GUANACO_ARGS)

bench: setup build
	@failed=; for script in $(BENCHMARKS); do \
	  echo "== $$script"; $(PY) $$script || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# --- checks --------------------------------------------------------------------------------------

.PHONY: lint format types test test-full test-sanitize
lint: setup
	@$(VENV)/bin/ruff check $(PYTHON_SOURCES)
	@$(VENV)/bin/ruff format --check $(PYTHON_SOURCES)
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	@$(VENV)/bin/ruff check --fix $(PYTHON_SOURCES)
	@$(VENV)/bin/ruff format $(PYTHON_SOURCES)
	@$(VENV)/bin/clang-format -i $(CXX_SOURCES)

types: setup
	@$(VENV)/bin/mypy

test: lint types build
	@$(PY) -m pytest -q -n $(TEST_JOBS) --dist worksteal -m "not full" $(PYTEST_ARGS)

test-full: lint types build
	@$(PY) -m pytest -q -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

# The kernels' own tests and the seeded walk of tests/native/sweep.py, on a build with ASan and UBSan.
# `make test` has a short walk of it. Leaks are not looked for: Python frees little when it ends.
# Left out: the peer at volume, whose billion comparisons say nothing about memory, and the compiler.
SANITIZE_TESTS ?= tests/test_quantize.py tests/test_linear.py tests/test_activations.py \
	-k "not test_peer_at_volume and not test_peer_small_and_hard and not compile and not export"
compiler_file = $(shell $${CXX:-c++} -print-file-name=$(1))
test-sanitize: setup build
	@$(PY) setup.py --quiet build_variant --kind=sanitize
	@LD_PRELOAD="$(call compiler_file,libasan.so) $(call compiler_file,libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	QLORA_KERNELS_OPS="$$(echo $(CURDIR)/build/sanitize-*/_ops.abi3.so)" \
	$(PY) -m pytest -q -p no:cacheprovider -m "not full" $(SANITIZE_TESTS) $(PYTEST_ARGS)
	@$(PY) -m pytest -q -k sanitize tests/test_native_variants.py

# A real GPU, or a plain word that there is none.
.PHONY: test-gpu bench-gpu need-gpu
need-gpu: build
	@$(PY) -c 'import sys, torch; from qlora_kernels import ops; \
	  torch.cuda.is_available() or sys.exit("there is no GPU here (torch sees none); make test runs " \
	    "the same kernels in the emulator"); \
	  ops.CUDA_LIBRARY_ERROR and sys.exit("the CUDA kernels are not there: " + ops.CUDA_LIBRARY_ERROR)'

# The CUDA kernels' own tests, and of what is tested on every device the GPU's share.
test-gpu: setup need-gpu
	@$(PY) -m pytest -q -n 0 tests/cuda $(PYTEST_ARGS)
	@QLORA_KERNELS_TEST_DEVICES=cuda $(PY) -m pytest -q -n 0 -m "not full" -k "cuda or gpu" \
	  tests/test_quantize.py tests/test_linear.py tests/test_nn.py tests/test_activations.py \
	  tests/loss $(PYTEST_ARGS)

bench-gpu: need-gpu
	@$(VENV)/bin/qlora tune $(TUNE_ARGS)

# --- the site -------------------------------------------------------------------------------------

.PHONY: docs docs-serve
docs: setup build
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

docs-serve: setup build
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

# --- releases -----------------------------------------------------------------------------------

# Compiled by the toolkit in CUDA_HOME where that is set (a binary needs a driver as new as its
# toolkit: 12.8 is what a release is built with), else by PyPI's. Nothing of torch comes along.
.PHONY: wheel
wheel: export QLORA_KERNELS_CUDA ?= 1
wheel: export QLORA_KERNELS_CUDA_ARCHITECTURES ?= all
wheel: setup
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir dist build/wheel/*.whl

# --- cleaning ------------------------------------------------------------------------------------

.PHONY: clean distclean
clean:
	rm -rf build dist *.egg-info qlora_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/package.stamp

distclean: clean
	rm -rf $(VENV)
