# Everything but bench-gpu and ncu runs in .venv, which `make setup` makes; PYTHON picks the interpreter it is made with.
# ARGS go to the benchmarks: `make bench ARGS="--part linear --again"`, `make bench-check ARGS="--op linear"`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo replicate test bench bench-gpu bench-check bench-ratios plots ncu lint format clean

setup: $(READY)

# --no-build-isolation lets setup.py see torch, which the native library is built against.
$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/csrc/*.cpp kernels/csrc/cpu/*)
	@echo "installing into $(VENV), native library included: some five minutes, pip is quiet meanwhile"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet numpy "setuptools>=77" wheel "cmake>=3.25" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

demo: $(READY)
	$(BIN)/bevt demo

# Two to three hours on two cores; what is finished is kept, so that it can be stopped.
replicate: $(READY)
	$(BIN)/bevt replicate

$(VENV)/.test: $(READY)
	$(BIN)/python -m pip install --quiet --group test
	$(BIN)/python -m pip install --quiet --no-deps torchvision==0.28.0
	touch $@

# Two processes of one thread: threads that wait for each other's turn on a core take ten times as long. By file, so that
# what a file's tests share is made once.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The suite's rivals are packages of the tests.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.suite cpu $(ARGS)

# From the source tree, with an interpreter that has torch and pytest already: a GPU machine may be one without a network.
bench-gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.suite cuda $(ARGS)

# Pictures and the README's table of the rows in benchmarks/results, after new ones.
plots: $(READY)
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.plots
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.readme

# Of one step's kernels what NVIDIA's profiler counts: make ncu OP=window_attention CASE="swin-b video stage 1"
ncu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.ncu "$(OP)" --case "$(CASE)" $(ARGS)

# Is the working tree slower than BASE, or than the commit of this machine's newest rows?
bench-check: $(READY)
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.check $(if $(BASE),--base "$(BASE)") $(ARGS)

bench-ratios: $(READY)
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.check --ratios $(ARGS)

$(VENV)/.lint: $(READY)
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

clean:
	rm -rf $(VENV) build runs *.egg-info kernels/bevt_kernels/*.so
