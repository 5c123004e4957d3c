"""A dry run against the same code on real tensors: the same bytes, to the last one.

Both run the planner's step, the real one on gloo ranks, under the same tracker. With expert parallelism the dry run is
told how many rows the real routers sent.
"""

from __future__ import annotations

import pytest
import torch

from tests.plan.real import Measured, make_job
from tests.ranks import run_on_ranks
from xtuner_hf.plan.clock import Clock
from xtuner_hf.plan.dry_run import StepReport, dry_run
from xtuner_hf.plan.expert_loads import PlannedReads

EVERYTHING_KEPT = {"recompute": "none"}
SELECTIVE = {"recompute": "selective"}
IMAGES = {"tiles_per_row": 3}
OFFLOADED = {"activation_offload": True, "optimizer_offload": True, "optimizer_states": "bf16"}

CASES = {
    1: {
        "qwen3_moe, fp32": ("qwen3_moe", {"bf16": False}, {}),
        "deepseek_v3, nothing recomputed": ("deepseek_v3", EVERYTHING_KEPT, {}),
        "gpt_oss, lora": ("gpt_oss", {"lora_rank": 8}, {}),
        "interns1_mini, images": ("interns1_mini", IMAGES, {}),
        "qwen3_moe, fp8": ("qwen3_moe", {"fp8": True}, {}),
    },
    2: {
        "qwen3": ("qwen3", {}, {}),
        "qwen3_moe": ("qwen3_moe", {}, {}),
        "gpt_oss, nothing recomputed": ("gpt_oss", EVERYTHING_KEPT, {}),
        "glm4_moe, selective": ("glm4_moe", SELECTIVE, {}),
        "kimi_k2, offloaded": ("kimi_k2", OFFLOADED, {}),
        "qwen3_moe, steps in backward": ("qwen3_moe", {"optimizer_in_backward": True}, {}),
        "glm4_moe, mtp": ("glm4_moe", {"mtp_loss_coef": 0.3}, {}),
        "qwen3_moe, two micro-batches": ("qwen3_moe", {"accumulation": 2}, {}),
        "deepseek_v3, ep": ("deepseek_v3", {}, {"ep_size": 2}),
        "gpt_oss, ep, offloaded": ("gpt_oss", OFFLOADED, {"ep_size": 2}),
        "qwen3_moe, sp": ("qwen3_moe", {}, {"sp_size": 2}),
        "qwen3_moe, lora": ("qwen3_moe", {"lora_rank": 8, "accumulation": 2}, {}),
        "deepseek_v3, ep, lora of a base in bf16": (
            "deepseek_v3",
            {"lora_rank": 8, "recompute": "selective", "dtype": torch.bfloat16},
            {"ep_size": 2},
        ),
        "internvl_moe, images": ("internvl_moe", IMAGES, {}),
        "internvl_moe, sp, no images": ("internvl_moe", {}, {"sp_size": 2}),
        "interns1, sp, images, nothing recomputed": ("interns1", IMAGES | EVERYTHING_KEPT, {"sp_size": 2}),
        "internvl_gpt_oss, ep, tower frozen": (
            "internvl_gpt_oss",
            IMAGES | {"frozen": ("vision",), "activation_offload": True},
            {"ep_size": 2},
        ),
        "deepseek_v3, ep, fp8": ("deepseek_v3", {"fp8": True}, {"ep_size": 2}),
        "qwen3, fp8, offloaded": ("qwen3", {"fp8": True} | OFFLOADED, {}),
        "internvl_moe, lora, two rows": ("internvl_moe", IMAGES | {"lora_rank": 8, "micro_batch": 2}, {}),
    },
    4: {
        "kimi_k2, ep 4, nothing recomputed": ("kimi_k2", EVERYTHING_KEPT, {"ep_size": 4}),
        "glm4_moe, ep 2, sp 2": ("glm4_moe", {}, {"ep_size": 2, "sp_size": 2}),
        "qwen3_moe, two copies": ("qwen3_moe", {}, {"dp_replicate_size": 2}),
    },
}


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, Measured]]]:
    return {ranks: run_on_ranks("tests.plan.real:run", ranks, cases=cases) for ranks, cases in CASES.items()}


class ReplayedReads(PlannedReads):
    """Answers with what real ranks counted."""

    def __init__(self, job, measured: Measured):
        super().__init__(Clock(), job.documents, None)
        self._counts, self._labels = iter(measured.counts), iter(measured.labels)
        self._images = iter(measured.images)

    def true_rows(self, mask_N):
        return self._rows(self._labels)

    def image_tokens(self, mask_N):
        return self._rows(self._images)

    def _rows(self, numbers):
        rows_N = torch.arange(next(numbers))
        return rows_N.copy_(rows_N)

    def start_counts(self, counts, traffic):
        return _Ready(counts, next(self._counts))


class _Ready:
    """Holds the tensor, as a copy from a CPU to the host does."""

    def __init__(self, tensor: torch.Tensor, counts: list):
        self._tensor, self._counts = tensor, counts

    def wait(self) -> list:
        return self._counts


def predict(ranks: int, name: str, measured: Measured, rank: int) -> StepReport:
    family, changes, sizes = CASES[ranks][name]
    job = make_job(family, ranks, changes, **sizes)
    return dry_run(job, rank=rank, acts_as="cpu", reads=ReplayedReads(job, measured))


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_predicted_bytes_are_the_tracked_ones(ranks, name, measured):
    rank = ranks - 1
    real = measured[ranks][rank][name]
    predicted = predict(ranks, name, real, rank)
    assert predicted.peak.by_category == real.report.peak.by_category
    assert predicted.peak.total == real.report.peak.total > 0
    assert predicted.resting == real.report.resting
    assert predicted.traffic == real.report.traffic
    for phase, work in real.report.work.items():
        if phase != "optimizer":  # a norm taken in backward waits for gloo with one operator more
            assert predicted.work[phase] == work
