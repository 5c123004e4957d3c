"""Importing the package is cheap and pulls in nothing that only some machines have."""

from __future__ import annotations

import subprocess
import sys

import pytest

import xtuner_hf

OPTIONAL = ("triton", "deepspeed", "torch_npu", "liger_kernel", "matplotlib", "trl", "datasets")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_needs_no_optional_package():
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))"
    assert run(f"{blocked}; import xtuner_hf; print(len(xtuner_hf.__all__))").strip() == str(len(xtuner_hf.__all__))


def test_import_after_torch_and_transformers_loads_next_to_nothing():
    code = "import torch, transformers, sys; before = set(sys.modules); import xtuner_hf"
    code += "; print(len(set(sys.modules) - before))"
    assert int(run(code)) < 20


def test_every_public_name_can_be_imported():
    for name in xtuner_hf.__all__:
        assert getattr(xtuner_hf, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Qwen4'"):
        xtuner_hf.Qwen4  # noqa: B018
