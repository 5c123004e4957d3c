"""The Triton kernels without a GPU: computed by Triton's interpreter, and compiled for an H200.

Each in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(module: str, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_equal_plain_torch_in_fp64():
    errors = run("tests.kernels.triton_cases", TRITON_INTERPRET="1")
    assert len(errors) > 80

    def tolerance(name: str) -> float:
        if "bfloat16" in name:
            return 2**-7  # the interpreter cuts off where a GPU rounds: a whole unit in the last place
        # A value on the edge between two of e4m3 may fall to either side.
        return 5e-3 if "path, fp8" in name else 1e-6

    assert not {name: error for name, error in errors.items() if not error <= tolerance(name)}


def test_fp8_equals_the_recipe_in_plain_torch():
    errors = run("tests.kernels.triton_fp8_cases", TRITON_INTERPRET="1")
    assert len(errors) == 4 * 2 + 2 * 2 + 2 * 2
    assert not {name: error for name, error in errors.items() if not error <= 1e-6}


def test_compile_for_an_h200(tmp_path):
    kernels = run("tests.kernels.compile_for_sm90", TRITON_CACHE_DIR=str(tmp_path))
    assert len(kernels) == 10 + 4
    assert max(kernel["shared"] for kernel in kernels.values()) <= 227 * 1024, "what a block of an H200 can have"
    for name in (name for name in kernels if "by " in name):
        assert kernels[name]["multiplies"] >= 4, f"{name}: 128 products by FP8 instructions of the tensor cores"
        assert kernels[name]["copies"] > 0, f"{name}: tiles are loaded while others are multiplied"
        assert kernels[name]["spills"] == 0, name
