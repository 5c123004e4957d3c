"""The private names that `_compat.py` leans on: this fails when transformers or TRL moves or changes one."""

from __future__ import annotations

import inspect

from xtuner_hf import _compat


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures():
    assert parameters(_compat.get_checkpoint_conversion_mapping) == ["model_type"]
    assert parameters(_compat.register_checkpoint_conversion_mapping) == [
        "model_type_or_class_name",
        "mapping",
        "overwrite",
    ]
    assert parameters(_compat.initialize_distributed_mesh) == ["distributed_config"]
    assert parameters(_compat.OutputRecorder)[:2] == ["target_class", "index"]
    assert parameters(_compat.ChunkedLogProbFunction.forward)[1:] == [
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ]
