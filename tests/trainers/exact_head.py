"""TRL's kernel for log-probabilities in fp32, replaced by the same in fp64: what then differs is not rounding."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest
import torch

KERNEL_TOLERANCE = 4e-6  # the kernel returns fp32, and an answer's sum is down to -60; 2.7e-6 on an AMD EPYC
EXACT_TOLERANCE = 1e-9


class ExactLogProbs:
    """Stands for `ChunkedLogProbFunction`."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcapping, scale, outputs):
        assert softcapping is None
        assert scale == 1.0
        logps = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
        chosen = logps.gather(-1, targets[..., None])[..., 0]
        entropy = -(logps.exp() * logps).sum(-1) if "entropy" in outputs else None
        top1 = logps.argmax(-1) == targets if "is_top1" in outputs else None
        mean = None if "mean_logits" not in outputs else logps.mean(-1)  # only logged
        return chosen, entropy, None, mean, top1


def exact_log_probs() -> AbstractContextManager:
    return patch("trl.trainer.utils._ChunkedLogProbFunction", ExactLogProbs)


@pytest.fixture
def exact_head():
    with exact_log_probs():
        yield


@pytest.fixture(params=["TRL's kernel", "fp64"])
def tolerance(request) -> float:
    """How exact gradients are; with TRL's kernel, and with it in fp64."""
    if request.param == "fp64":
        request.getfixturevalue("exact_head")
        return EXACT_TOLERANCE
    return KERNEL_TOLERANCE
