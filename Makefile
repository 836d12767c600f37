# `make demo` and `make test` do all their own set-up in .venv; PYTHON picks another interpreter (3.10 or later).
TORCH  := 2.13.0
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TOKENS ?= 32768
# A checkout also tests the bfloat16 dot-product kernels on machines that lack the instruction.
export LCORE_EMULATED_ISA ?= ON
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'bench/cpp/*.h' 'bench/cpp/*.cpp' \
              'tests/emulator/*.h' 'tests/emulator/*.cpp' 'tests/emulator/*.cu')
COMMIT    = $(shell git describe --always --abbrev=12 --exclude='*' --dirty=+ 2>/dev/null || echo unknown)

# A second environment that sees the packages of the first, but has an lcore of its own, built with sanitizers.
SANITIZED       := build/sanitize
SANITIZED_TESTS := tests/test_sanitizers.py $(wildcard tests/test_attention_*.py tests/test_cache*.py) \
                   $(wildcard tests/test_key_mass*.py tests/test_page_*.py tests/test_policies*.py tests/test_trim.py) \
                   $(wildcard tests/test_select_pages.py tests/test_selection*.py tests/test_plain_pages.py) \
                   $(wildcard tests/test_placement*.py tests/test_prefix_*.py tests/test_*_index.py) tests/test_runtime.py \
                   $(wildcard tests/test_selective_*.py tests/test_causal_conv1d*.py tests/test_linear_attention_*.py) \
                   tests/test_gated_linear_attention.py tests/test_ssd.py \
                   tests/test_merge_states.py tests/test_rope.py tests/test_hadamard.py tests/test_isa.py

.PHONY: demo test test-slow test-abi check-isas sanitize build lint format bench bench-cpp bench-cpp-cuda cuda-report gpu \
        clean

demo: build
	$(BIN)/lcore demo --tokens $(TOKENS)

test: build
	$(BIN)/python -m pytest

test-slow: build
	$(BIN)/python -m pytest -m slow

# Builds against one torch, loads and runs in another.
test-abi: build
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

# Looks for accesses out of bounds and undefined behaviour in the extension while its tests run. New memory is filled
# with NaN. A finding ends the run with a report and the Python stack.
sanitize: build
	$(BIN)/python -m venv --without-pip $(SANITIZED)
	site=$$($(SANITIZED)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" >$$site/packages.pth && \
	  LCORE_CUDA=off $(BIN)/python -m pip install -q --no-build-isolation --no-deps --upgrade --target $$site \
	    -C build-dir=$(SANITIZED)/cmake -C install.strip=false -C cmake.define.LCORE_SANITIZE=on .
	LCORE_SANITIZE=on UBSAN_OPTIONS=halt_on_error=1:abort_on_error=1:print_stacktrace=1 \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:malloc_fill_byte=255:max_malloc_fill_size=67108864 \
	  LD_PRELOAD="$$(for so in libasan libubsan libstdc++; do $(CXX) -print-file-name=$$so.so; done | xargs)" \
	  $(SANITIZED)/bin/python -m pytest --capture=sys $(SANITIZED_TESTS)

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

# The kernels of the instruction sets that this machine lacks and so does not build: at least they compile.
check-isas: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/isas -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DSKBUILD_PROJECT_VERSION=0 -DLCORE_CUDA=off -DLCORE_CPU_ISAS=all -DKERNEL_OPTIMIZATION=-O0
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/isas --target lcore_cpu_avx512 lcore_cpu_avx512_bf16

bench: build
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.key_mass
	$(BIN)/python -m bench.page_bounds
	$(BIN)/python -m bench.placement
	$(BIN)/python -m bench.recurrent
	$(BIN)/python -m bench.linear_attention
	$(BIN)/python -m bench.recurrent_models
	$(BIN)/python -m bench.rwkv4_wkv

# The kernels without torch and Python, on Google Benchmark; BENCH_FLAGS=--full-set for all sizes.
bench-cpp:
	cmake -S bench/cpp -B build/bench-cpp
	cmake --build build/bench-cpp
	build/bench-cpp/attention --json build/bench-cpp/attention.json --commit $(COMMIT) $(BENCH_FLAGS)
	build/bench-cpp/decode --json build/bench-cpp/decode.json --commit $(COMMIT) $(BENCH_FLAGS)

# The CUDA kernels likewise; needs a GPU.
bench-cpp-cuda:
	cmake -S bench/cpp -B build/bench-cpp
	cmake --build build/bench-cpp --target cuda_benchmarks
	build/bench-cpp/merge_states_cuda --json build/bench-cpp/merge_states_cuda.json --commit $(COMMIT) $(BENCH_FLAGS)

# What the compiler made of the CUDA kernels, into docs/cuda_report.md. Needs nvcc, no GPU.
cuda-report: $(VENV)/.ready
	$(BIN)/python -m pip install -q nvidia-cuda-nvdisasm
	$(BIN)/python -m bench.cuda_report

# Tests, checkers and benchmarks on this machine's GPU; a part that is done is not run again. PARTS names some of them.
gpu: build
	$(BIN)/python -m bench.gpu $(PARTS)

clean:
	rm -rf build $(VENV)
