"""A dry run against what torch's CPU allocator handed out for the same step: real tensors, no mode watching."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.plan.real import make_job
from xtuner_hf.device import acting_as
from xtuner_hf.host_reads import answered_by
from xtuner_hf.plan.clock import Clock
from xtuner_hf.plan.cluster import fake_cluster
from xtuner_hf.plan.dry_run import build_fake_model, dry_run
from xtuner_hf.plan.expert_loads import PlannedReads
from xtuner_hf.plan.step import TrainingStep

# Large enough that the scratch memory of kernels is small beside it.
LARGER = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
}


def job_of(family: str, ranks: int, **changes):
    changes = {"seq_len": 256, "document_len": None} | changes
    job = make_job(family, ranks, changes)
    for name, value in LARGER.items():
        setattr(job.config, name, value)
    return job


def allocated_peak(job) -> int:
    """Most bytes that the allocator had given out in the third step, above what it had given out before."""
    reads = PlannedReads(Clock(), job.documents, job.expert_choice, num_unlabelled=1)
    with fake_cluster(job.layout.world_size), acting_as("cpu"), answered_by(reads):
        model = build_fake_model(job)
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            local = tensor.to_local().data if hasattr(tensor, "to_local") else tensor.data
            if local.is_floating_point():
                local.normal_(0, 0.02)
        step = TrainingStep(job, model, torch.device("cpu"))
        batch = step.batch()
        for _ in range(2):
            step.run(batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step.run(batch)
    return peak_of(profiled)


def peak_of(profiled) -> int:
    changes = []
    waiting = list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    total = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        total += change
        most = max(most, total)
    return most


@pytest.mark.parametrize(
    ("family", "ranks", "changes"),
    [
        # Peaks where gradients are joined for their reduction: a kernel of the CPU's copies them first (1.7 %).
        ("deepseek_v3", 2, {}),
        ("qwen3_moe", 2, {"recompute": "none"}),
        ("qwen3_moe", 4, {"optimizer_offload": True}),
        ("glm4_moe", 2, {"activation_offload": True}),
    ],
)
def test_the_allocators_peak_is_the_predicted_one(family, ranks, changes):
    job = job_of(family, ranks, **changes)
    report = dry_run(job, acts_as="cpu")
    resting = report.resting
    assert allocated_peak(job) + resting == pytest.approx(report.peak.total, rel=0.001)
