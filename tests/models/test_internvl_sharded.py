"""Models that read images on two gloo processes against one process, in fp32: rows split between the processes, of
which one has no image; experts split; rows shared."""

from __future__ import annotations

import pytest
import torch

from tests import vision
from tests.models.sharded_images import step
from tests.ranks import run_on_ranks

# The second process has the row without an image.
SPLIT = {"rows": [[0, 2, 3], [1]]}
SHARED = {"rows": [[0, 1, 2, 3], [0, 1, 2, 3]]}
TEXT = {"rows": [[1], [1]]}
CASES = {
    "moe, one without images": {"name": "internvl_moe", "ep_size": 1, "sp_size": 1, **SPLIT},
    "moe, experts split, one without images": {"name": "internvl_moe", "ep_size": 2, "sp_size": 1, **SPLIT},
    "gpt-oss, experts split, one without images": {"name": "internvl_gpt_oss", "ep_size": 2, "sp_size": 1, **SPLIT},
    "moe, rows shared": {"name": "internvl_moe", "ep_size": 1, "sp_size": 2, **SHARED},
    "intern-s1, experts split and rows shared": {"name": "interns1", "ep_size": 2, "sp_size": 2, **SHARED},
    "dense, rows shared": {"name": "interns1_mini", "ep_size": 1, "sp_size": 2, **SHARED},
    "rows without images shared": {"name": "internvl_dense", "ep_size": 1, "sp_size": 2, **TEXT},
    "tied, one without images": {"name": "internvl_dense", "tied": True, "ep_size": 1, "sp_size": 1, **SPLIT},
    "frozen tower": {"name": "internvl_dense", "ep_size": 1, "sp_size": 1, "frozen": ["vision"], **SPLIT},
    "frozen language": {"name": "internvl_moe", "ep_size": 2, "sp_size": 1, "frozen": ["language"], **SPLIT},
}


@pytest.fixture(scope="module")
def on_2_ranks() -> dict[str, list[dict]]:
    """By case, then by rank."""
    ranks = run_on_ranks("tests.models.sharded_images:run", 2, cases=list(CASES.values()))
    return {case: [rank[index] for rank in ranks] for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, on_2_ranks):
    rows = CASES[case]["rows"]
    everything = rows[0] if CASES[case]["sp_size"] == 2 else sorted(rows[0] + rows[1])
    model = vision.ours(CASES[case]["name"], tied=CASES[case].get("tied", False))
    for part in CASES[case].get("frozen", ()):
        for module in model.parts[part]:
            module.requires_grad_(False)
    expected = step(model, everything)
    for found in on_2_ranks[case]:
        assert found["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=2e-6)
        assert found["grads"].keys() == expected["grads"].keys()
        for name, grad in expected["grads"].items():
            if "k_proj.bias" in name and "vision" in name:  # the softmax does not see it: rounding alone
                continue
            error = (found["grads"][name] - grad).abs().max() / grad.abs().max().clamp(min=1e-30)
            assert error < 2e-4 or torch.equal(found["grads"][name], grad), (name, error)


def test_the_case_without_images_has_zero_gradients_everywhere(on_2_ranks):
    for found in on_2_ranks["rows without images shared"]:
        vision_grads = [grad for name, grad in found["grads"].items() if "vision" in name or "projector" in name]
        assert vision_grads
        assert all(grad.abs().max() == 0 for grad in vision_grads)
