"""Our expert-parallel dispatcher on four ranks: equal to one process and to transformers', with fewer token copies."""

from __future__ import annotations

import pytest
import torch

from benchmarks.dispatch_traffic import expected_ranks
from tests.moe.ep_cases import CASES, tokens_of
from tests.ranks import run_on_ranks
from xtuner_hf.moe.ep_dispatcher import IMPLEMENTATION_NAME, sum_rows, true_positions


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_on_ranks("tests.moe.ep_cases:all_cases", 4)


def worst(ranks: list[dict], *key) -> float:
    return max(error for rank in ranks for error in rank[key]["errors"].values())


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(ranks, case):
    # Routing weights, and their gradients, are fp32 whatever the dtype of the tokens.
    assert worst(ranks, case, IMPLEMENTATION_NAME) < 3e-7
    assert worst(ranks, case, "fp32") < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(ranks, case):
    assert worst(ranks, case, "all_to_all") < 3e-7
    for rank in ranks:
        ours, stock = rank[case, IMPLEMENTATION_NAME], rank[case, "all_to_all"]
        torch.testing.assert_close(ours["output"], stock["output"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours["hidden"], stock["hidden"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_sends_a_token_once_to_each_rank_that_needs_it(ranks, case):
    tokens = tokens_of(case, torch.float32)
    rank_sets = [{int(e) // 4 for e in ids} for _, ids_TK, _, _ in tokens for ids in ids_TK]
    pairs = sum(ids_TK.numel() for _, ids_TK, _, _ in tokens)
    # The way there and the way back.
    assert sum(rank[case, IMPLEMENTATION_NAME]["rows"] for rank in ranks) == 2 * sum(map(len, rank_sets))
    assert sum(rank[case, "all_to_all"]["rows"] for rank in ranks) == 2 * pairs


@pytest.mark.parametrize("mode", ["recompute", "reentrant recompute", "started early"])
@pytest.mark.parametrize("case", ["unequal", "a rank without tokens", "a rank whose experts are not chosen"])
def test_under_recompute_and_started_early(ranks, case, mode):
    assert worst(ranks, case, mode) < 3e-7


def test_bf16_is_as_close_as_transformers(ranks):
    # One rounding more (the partial sums on the wire), and fewer in the gradient of a token (summed in fp32).
    assert worst(ranks, "bf16", IMPLEMENTATION_NAME) < 1.5 * worst(ranks, "bf16", "all_to_all")
    assert worst(ranks, "bf16", IMPLEMENTATION_NAME) < 0.02


def test_the_host_waits_once(ranks):
    for rank in ranks:
        assert rank["waits"] == 1
        for case in CASES:
            assert rank[case, "fp32"]["waiting operators"] == []


def test_true_positions_is_nonzero():
    mask = torch.tensor([False, True, True, False, True])
    assert true_positions(mask, 3).tolist() == mask.nonzero()[:, 0].tolist()
    assert true_positions(mask[:0], 0).tolist() == []
    assert true_positions(mask[:1], 0).tolist() == []


def test_sum_rows_adds_slices_in_order():
    x = torch.tensor([[1e8], [1.0], [-1e8]])
    index = torch.zeros(3, dtype=torch.int64)
    assert sum_rows(x, index, [1, 1, 1], 2).tolist() == [[0.0], [0.0]]  # 1e8 swallows the 1
    assert sum_rows(x[[0, 2, 1]], index, [1, 1, 1], 1).tolist() == [[1.0]]


def test_expected_copies_of_a_token():
    assert expected_ranks(num_experts=128, ep_size=8, top_k=8) == pytest.approx(5.339, abs=1e-3)
    assert expected_ranks(num_experts=8, ep_size=8, top_k=3) == pytest.approx(3)
    assert expected_ranks(num_experts=8, ep_size=1, top_k=3) == pytest.approx(1)
