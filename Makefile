# One command trains, one tests; both set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ENGINE := .venv-engine
ENGINE_STAMP := $(ENGINE)/.installed
DEMO_OUT ?= demo_output
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint engine clean

# Trains a small Qwen3-MoE on real conversations: two CPU processes with FSDP2 and expert parallelism, or the GPUs.
demo: $(STAMP)
	$(BIN)/python examples/demo.py --output_dir $(DEMO_OUT)

test: $(STAMP) $(ENGINE_STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

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

clean:
	rm -rf $(VENV) $(ENGINE) $(DEMO_OUT)
