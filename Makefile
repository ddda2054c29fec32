# Two commands for everyone: `make quickstart` and `make test`. `make check` is what a change must pass.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := 5.17.0
NEWEST_TRITON := 3.9.0
TRITON_ONLY := $(VENV)/triton-$(NEWEST_TRITON)
THREADS := OMP_NUM_THREADS=2
# Two processes with a thread each: most tests are Python.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --timeout 600

.PHONY: quickstart test check lint types faults soak clean wheel
.PHONY: test-cpu test-oldest test-interpret test-compile test-ptx test-ptx-all test-newest-triton test-gpu-dry test-gpu

quickstart: $(VENV)/.ready
	$(BIN)/python examples/quickstart.py

test: test-cpu test-oldest test-interpret test-compile test-ptx test-newest-triton test-gpu-dry test-gpu

check: lint types test

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

test-cpu: $(VENV)/.ready
	$(PYTEST) -m "not interpret and not compile and not gpu and not ptx and not soak"

# The oldest supported transformers lies in a folder of its own, in front of the newest one. Here the CPU reads blocks
# by their table, as a GPU does, where it would view them otherwise.
test-oldest: $(VENV)/.ready $(VENV)/transformers-$(OLDEST)/.ready
	FASTATTN_TEST_BY_TABLE=1 PYTHONPATH=$(VENV)/transformers-$(OLDEST) $(PYTEST) -m "not interpret and not compile and not gpu and not ptx and not soak" tests/transformers

test-interpret: $(VENV)/.ready
	TRITON_INTERPRET=1 $(PYTEST) -m interpret tests/interpret

test-compile: $(VENV)/.ready
	$(PYTEST) -m compile tests/compile

# The kernels as compiled for an H100, run on a CPU: the machine that does it, the tests for a GPU in bfloat16, generate().
AS_COMPILED := $(addprefix tests/gpu/test_,store_kv.py prefill_attention.py packed_attention.py decode_attention.py generate.py)
test-ptx: $(VENV)/.ready
	$(PYTEST) -m ptx tests/ptx
	FASTATTN_TEST_DEVICE=cpu FASTATTN_TEST_PTX=90 $(PYTEST) $(AS_COMPILED) \
		-k "not float32 and not torch.float16 and not chunks_of_a_prompt and not many_prompts and not huge_logits and not 256 \
		and (not test_generate or (16_bits and bfloat16 and (llama or compiled)))"

# More than an hour: the same in all dtypes, generate() with all models and caches, and the small tests of the kernels.
PTX_ARCHS ?= 80 90
test-ptx-all: $(VENV)/.ready
	for arch in $(PTX_ARCHS); do \
		FASTATTN_TEST_PTX=$$arch $(PYTEST) -m interpret tests/interpret && \
		FASTATTN_TEST_DEVICE=cpu FASTATTN_TEST_PTX=$$arch $(PYTEST) tests/gpu || exit 1; \
	done

# The newest Triton, in front of the one that the launch configs were chosen with: what kernels compute, as compiled, and
# how they are launched. PYTHONPATH=.venv/triton-... make test-compile, or test-ptx-all, does all of it.
test-newest-triton: $(VENV)/.ready $(TRITON_ONLY)/.ready
	PYTHONPATH=$(TRITON_ONLY) $(PYTEST) -m "ptx or compile" tests/ptx/test_kernels.py $(addprefix tests/compile/test_,generate_launches.py hot_loop.py kept_launches.py)

# The tests for a GPU as far as a CPU goes, with the oldest transformers: what is wrong with them shows before they meet one.
test-gpu-dry: $(VENV)/.ready $(VENV)/transformers-$(OLDEST)/.ready
	FASTATTN_TEST_DEVICE=cpu PYTHONPATH=$(VENV)/transformers-$(OLDEST) $(PYTEST) -m gpu tests/gpu \
		-k "not (test_compiled_steps and (mistral or gemma2 or qwen3))"

# A machine with a GPU may have a torch of its own and no $(VENV): then PYTHON runs these, as it does when it is given on
# the command line. Most of their time is the compilation of kernels, so one process per core, up to 12, where
# pytest-xdist is installed. FASTATTN_TEST_LOG=FILE keeps each failure at once, should the machine's time end before.
test-gpu: GPU_PYTHON ?= $(if $(filter command,$(origin PYTHON)),$(PYTHON),$(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)))
test-gpu: GPU_WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 12 ? cores : 12)))
test-gpu:
	@$(GPU_PYTHON) -c "import torch; exit(torch.cuda.is_available())" && echo "tests/gpu is left out: there is no GPU" || \
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 $(GPU_PYTHON) -m pytest -q -m gpu --tb=short \
		$$($(GPU_PYTHON) -c "import xdist" 2>/dev/null && echo "-n $(GPU_WORKERS) --dist worksteal") \
		$$($(GPU_PYTHON) -c "import pytest_timeout" 2>/dev/null && echo "--timeout 180") tests/gpu

soak: $(VENV)/.ready
	$(THREADS) $(BIN)/python -m pytest -q -m soak

faults: $(VENV)/.ready
	$(THREADS) $(BIN)/python -m tests.faults

wheel: $(VENV)/.ready
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist .

clean:
	rm -rf $(VENV) dist build *.egg-info

# torch first and by version: an open range would fetch a CUDA build of several gigabytes on a machine without a GPU.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "triton==3.6.0; platform_system == 'Linux'" "huggingface_hub<2" -e ".[dev]"
	touch $@

$(VENV)/transformers-$(OLDEST)/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/transformers-$(OLDEST) transformers==$(OLDEST)
	touch $@

$(TRITON_ONLY)/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(TRITON_ONLY) triton==$(NEWEST_TRITON)
	touch $@
