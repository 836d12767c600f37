# `make demo` and `make test` do all their own set-up in .venv; PYTHON picks another interpreter (3.10 or later).
TORCH  := 2.13.0
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TOKENS ?= 32768
# A checkout also tests the bfloat16 dot-product kernels on machines that lack the instruction.
export LCORE_EMULATED_ISA ?= ON
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'bench/cpp/*.h' 'bench/cpp/*.cpp')
COMMIT    = $(shell git describe --always --abbrev=12 --exclude='*' --dirty=+ 2>/dev/null || echo unknown)

.PHONY: demo test test-slow test-abi build lint format bench bench-cpp clean

demo: build
	$(BIN)/lcore demo --tokens $(TOKENS)

test: build
	$(BIN)/python -m pytest

test-slow: build
	$(BIN)/python -m pytest -m slow

# Builds against one torch, loads and runs in another.
test-abi: build
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

$(VENV)/.ready: pyproject.toml Makefile
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.25" ninja
	touch $@

build: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[test]'

lint: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[test,lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: build
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.decode

# The kernels without torch and Python, on Google Benchmark; BENCH_FLAGS=--full-set for all sizes.
bench-cpp:
	cmake -S bench/cpp -B build/bench-cpp
	cmake --build build/bench-cpp
	build/bench-cpp/attention --json build/bench-cpp/attention.json --commit $(COMMIT) $(BENCH_FLAGS)
	build/bench-cpp/decode --json build/bench-cpp/decode.json --commit $(COMMIT) $(BENCH_FLAGS)

clean:
	rm -rf build $(VENV)
