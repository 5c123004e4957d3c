"""Corrections of the train-inference mismatch against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from xtuner_hf.rl.mismatch import METHODS, MismatchCorrection, log_ratios, mismatch_metrics

# Ratios of three samples; the last token of the second is padding.
RATIO = torch.tensor([[0.4, 1.0, 6.0], [1.1, 0.9, 77.0], [2.5, 2.0, 1e-5]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
LOG_RATIO = RATIO.log() * MASK


def weights(method: str, **bounds) -> torch.Tensor:
    return MismatchCorrection.named(method, **bounds).weights(LOG_RATIO, MASK)


def assert_rows(found: torch.Tensor, expected: list[list[float]]) -> None:
    assert (found * MASK - torch.tensor(expected, dtype=torch.float64) * MASK).abs().max() < 1e-12


def test_token_level():
    assert_rows(weights("token_truncate"), [[0.4, 1, 2], [1.1, 0.9, 0], [2, 2, 1e-5]])
    assert_rows(weights("token_truncate", lower=0.5, upper=3.0), [[0.5, 1, 3], [1.1, 0.9, 0], [2.5, 2, 0.5]])
    for method in ("token_mask", "icepop"):
        assert_rows(weights(method), [[0, 1, 0], [1.1, 0.9, 0], [2.5, 2, 0]])
    assert_rows(weights("token_mask", upper=2.2), [[0.4, 1, 0], [1.1, 0.9, 0], [0, 2, 1e-5]])


def test_sequence_level():
    products = [0.4 * 6, 1.1 * 0.9, 2.5 * 2 * 1e-5]
    assert_rows(weights("sequence_truncate"), [[2.0] * 3, [products[1]] * 3, [products[2]] * 3])
    assert_rows(weights("sequence_mask"), [[products[0]] * 3, [products[1]] * 3, [products[2]] * 3])
    assert_rows(weights("sequence_mask", lower=0.5, upper=2.0), [[0] * 3, [products[1]] * 3, [0] * 3])


def test_geometric_level_does_not_depend_on_the_length():
    means = [2.4 ** (1 / 3), 0.99 ** (1 / 2), 5e-5 ** (1 / 3)]
    assert_rows(weights("geometric_truncate", upper=1.2), [[1.2] * 3, [means[1]] * 3, [means[2]] * 3])
    assert_rows(weights("geometric_mask", lower=0.9, upper=1.2), [[0] * 3, [means[1]] * 3, [0] * 3])
    correction = MismatchCorrection.named("geometric_mask", lower=0.9, upper=1.2)
    twice = correction.weights(LOG_RATIO.repeat(1, 2), MASK.repeat(1, 2))
    assert torch.allclose(twice[:, :3], correction.weights(LOG_RATIO, MASK))


def test_veto_drops_the_whole_sample():
    assert_rows(weights("token_truncate", veto=1e-4), [[0.4, 1, 2], [1.1, 0.9, 0], [0, 0, 0]])


@pytest.mark.parametrize("method", METHODS)
def test_equal_distributions_are_left_alone(method):
    correction = MismatchCorrection.named(method, lower=0.99, upper=1.01, veto=1e-4)
    assert torch.equal(correction.weights(torch.zeros(3, 3), MASK), torch.ones(3, 3))


def test_tokens_that_the_engine_did_not_score_count_as_equal():
    engine = torch.tensor([[-1.0, math.nan, -3.0]])
    assert log_ratios(torch.tensor([[-1.5, -2.0, -2.0]]), engine, torch.tensor([[1, 1, 0]])).tolist() == [[-0.5, 0, 0]]


def test_metrics():
    """k3 and effective sample size over the tokens of the mask, written out."""
    accelerator = Accelerator(cpu=True)
    ratios = [0.4, 1.0, 6.0, 1.1, 0.9, 2.5, 2.0, 1e-5]
    metrics = mismatch_metrics(LOG_RATIO, MASK, weights("icepop"), accelerator)
    assert metrics["mismatch/k3"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 8, rel=1e-6)
    assert metrics["mismatch/ess"] == pytest.approx(sum(ratios) ** 2 / (8 * sum(r * r for r in ratios)), rel=1e-6)
    assert metrics["mismatch/logp_difference_max"] == pytest.approx(math.log(1e5), rel=1e-6)
    assert metrics["mismatch/ratio_min"] == pytest.approx(1e-5, rel=1e-5)
    assert metrics["mismatch/ratio_max"] == pytest.approx(6.0)
    assert metrics["mismatch/ratio_mean"] == pytest.approx(sum(ratios) / 8, rel=1e-6)
    assert metrics["mismatch/kept"] == pytest.approx(5 / 8)
    equal = mismatch_metrics(torch.zeros(3, 3), MASK, None, accelerator)
    assert equal["mismatch/k3"] == 0
    assert equal["mismatch/ess"] == equal["mismatch/kept"] == 1
    assert mismatch_metrics(LOG_RATIO, torch.zeros_like(MASK), None, accelerator) == {}
