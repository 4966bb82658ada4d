# make run    fuse ShuffleNet V2 x1.0, check it on a photograph, print the comparison table
# make test   all tests
# Both set up their own environment in .venv first.
#
# On Linux, PyPI's torch brings CUDA libraries along. For the smaller CPU build, point pip at
# PyTorch's CPU index in TORCH:  make test TORCH="torch==2.13.0 --index-url ..."

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
INSTALLED := $(VENV)/.installed
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: run test test-python test-cpp test-sanitize test-aarch64 lint format bench clean

# Contestants take turns: threads that spin for long after one's call would slow the next.
BENCH := GOMP_SPINCOUNT=10000 $(BIN)/snv2 bench

run: $(INSTALLED)
	$(BENCH) --width x1.0 --image sample --peer eager --peer channels_last \
	  --peer compile --peer fused --peer engine

test: test-cpp test-python

test-python: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

test-cpp: $(INSTALLED)
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

test-sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DSNV2_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Debug
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# Needs Debian's g++-aarch64-linux-gnu and qemu-user.
test-aarch64: $(INSTALLED)
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake
	$(BIN)/cmake --build build/aarch64
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(INSTALLED)
	mkdir -p out
	$(BENCH) --width x0.5 --width x1.0 --width x1.5 --width x2.0 --batch 1 --batch 8 \
	  --json out/bench.json --plot out/bench.png

clean:
	rm -rf build out $(VENV) *.egg-info snv2_kernels/*.so snv2_kernels/*.dylib

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	touch $@

# torchvision is a test's reference; without its own choice of torch, and with the one package
# it imports.
$(INSTALLED): $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	$(BIN)/pip install --no-deps $(TORCHVISION)
	$(BIN)/pip install -e ".[dev]"
	touch $@
