# One command trains, one tests; both set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ENGINE := .venv-engine
ENGINE_STAMP := $(ENGINE)/.installed
NPU := .venv-npu
NPU_STAMP := $(NPU)/.installed
NPU_WHEEL := $(NPU)/.torch-npu
NPU_TORCH := 2.13.0
DEMO_OUT ?= demo_output
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-npu lint engine clean

# Trains a small Qwen3-MoE on real conversations: two CPU processes with FSDP2 and expert parallelism, or the GPUs.
demo: $(STAMP)
	$(BIN)/python examples/demo.py --output_dir $(DEMO_OUT)

test: $(STAMP) $(ENGINE_STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The Ascend path, executed by the real torch_npu on a stand-in for an NPU (docs/npu.md), in an environment of its own:
# where torch_npu is installed, torch cannot be imported without an NPU or this stand-in.
test-npu:
	@if ! command -v g++ >/dev/null || ! command -v nm >/dev/null; then \
		echo "test-npu skipped: it compiles its stand-in, and g++ or nm (binutils) is missing"; \
	elif ! $(MAKE) --no-print-directory $(NPU_WHEEL); then \
		echo "test-npu skipped: torch-npu $(NPU_TORCH) cannot be installed on this platform and Python (see above)"; \
	else \
		$(MAKE) --no-print-directory $(NPU_STAMP) && OMP_NUM_THREADS=1 $(NPU)/bin/python -m pytest tests/npu; \
	fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# vLLM for CPUs in an environment of its own: checkpoints are tried in a real engine.
engine: $(ENGINE_STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python $(PIP) --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/python $(PIP) --no-deps "textarena==0.7.4"  # statements of examples/dpo.py; its games need much more
	touch $@

# The requirements are complete: their own are not looked at, see the comment on top of that file.
$(ENGINE_STAMP): tests/engines/requirements-vllm.txt
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python $(PIP) "torch==2.13.0"
	$(ENGINE)/bin/python $(PIP) --no-deps --requirement $<
	$(ENGINE)/bin/python $(PIP) --no-deps --target $(ENGINE)/images "torchvision==0.28.0"  # apart: see vllm_images.py
	$(ENGINE)/bin/python -c "import vllm"
	touch $@

$(NPU_WHEEL): constraints.txt
	$(PYTHON) -m venv $(NPU)
	$(NPU)/bin/python $(PIP) --constraint constraints.txt "torch==$(NPU_TORCH)" "torch-npu==$(NPU_TORCH)"
	touch $@

$(NPU_STAMP): $(NPU_WHEEL) pyproject.toml
	$(NPU)/bin/python $(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(ENGINE) $(NPU) $(DEMO_OUT)
