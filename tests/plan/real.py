"""The planner's step on real tensors and real ranks: what a dry run has to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from tests import vision
from tests.families import ALL_FAMILIES
from xtuner_hf.host_reads import ExpertTraffic, HostCopy, HostReads, answered_by
from xtuner_hf.models.auto import model_class
from xtuner_hf.models.fp8 import use_fp8
from xtuner_hf.moe.ep_dispatcher import IMPLEMENTATION_NAME
from xtuner_hf.parallel.adapters import base_model, place_adapters, without_adapters
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.parallel.sequence import sequence_ranks
from xtuner_hf.parallel.shard import shard_model, sum_gradients
from xtuner_hf.plan.adapters import lora_of_rank, with_adapters
from xtuner_hf.plan.clock import Clock
from xtuner_hf.plan.cluster import axis_of
from xtuner_hf.plan.costs import Costs
from xtuner_hf.plan.devices import find_device
from xtuner_hf.plan.dry_run import StepReport, observe
from xtuner_hf.plan.job import Job
from xtuner_hf.plan.ledger import Ledger
from xtuner_hf.plan.torch_internals import without_modes
from xtuner_hf.plan.tracker import StepTracker


def make_job(family: str, world_size: int, changes: dict[str, Any] | None = None, **sizes: int) -> Job:
    """A tiny job; `sizes` go to the layout.

    Args:
        family: of language models, or one of `tests.vision.MODELS`.
        changes: to the job; `lora_rank` besides.
    """
    layout = ParallelLayout(world_size, world_size, **sizes)
    values = {"seq_len": 48, "document_len": 20} | (changes or {})
    further = {"num_nextn_predict_layers": 1} if "mtp_loss_coef" in (changes or {}) else {}
    is_vision = family in vision.MODELS
    config = vision.config(family) if is_vision else ALL_FAMILIES[family].make_config(**further)
    if "lora_rank" in values:
        values["adapter"] = lora_of_rank(values.pop("lora_rank"), config)
    return Job(config, layout, find_device("h100"), **values)


class RecordedReads(HostReads):
    """Reads for real, unobserved, and remembers what was read."""

    def __init__(self):
        self.counts: list[list] = []
        self.labels: list[int] = []
        self.images: list[int] = []

    def lengths(self, cu_seqlens):
        with without_modes():
            return super().lengths(cu_seqlens)

    def true_rows(self, mask_N):
        return self._rows(mask_N, self.labels)

    def image_tokens(self, mask_N):
        return self._rows(mask_N, self.images)

    def _rows(self, mask_N, record: list[int]):
        with without_modes():
            rows_N = super().true_rows(mask_N).clone()
        record.append(len(rows_N))
        return torch.arange(len(rows_N)).copy_(rows_N)

    def start_counts(self, counts, traffic: ExpertTraffic):
        return _RecordedCopy(counts, self.counts)


class _RecordedCopy(HostCopy):
    def __init__(self, tensor, record: list):
        super().__init__(tensor)
        self._record = record

    def wait(self) -> list:
        counts = super().wait()
        self._record.append(counts)
        return counts


class GlooTracker(StepTracker):
    """Overlooks how gloo scatters what it has reduced: a split and a copy behind every reduce-scatter."""

    _after = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "c10d::_reduce_scatter_base_":
            self._after = 2
        elif self._after and name == ("aten::split", "aten::copy_")[2 - self._after]:
            self._after -= 1
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass
class Measured:
    """What one rank saw."""

    report: StepReport
    counts: list[list]
    labels: list[int]
    images: list[int]


def measure(job: Job) -> Measured:
    """A step of this rank."""
    model: Any = model_class(job.config)._from_config(job.config, dtype=job.dtype, **options_of(job))
    if job.adapter is not None:
        model = with_adapters(model, job.adapter)
    if job.layout.world_size > 1:
        config = job.layout.distributed_config(bf16=job.bf16, ep_implementation=IMPLEMENTATION_NAME)
        with without_adapters(model):
            shard_model(base_model(model), config)
        sum_gradients(model)
    if job.fp8:
        use_fp8(base_model(model), torch.device("cpu"))
    place_adapters(model, job.layout.world_size)
    if job.frozen:
        base_model(model).freeze(job.frozen)
    ranks = sequence_ranks(job.layout, "cpu") if job.layout.sp_size > 1 else None
    clock = Clock()
    tracker = GlooTracker(Costs(job.device, job.documents), clock, Ledger(), lambda group: axis_of(job.layout, group))
    reads = RecordedReads()
    with answered_by(reads), tracker:
        report = observe(job, tracker, model, ranks)
    return Measured(replace(report, samples=[], spans=[]), reads.counts, reads.labels, reads.images)


def options_of(job: Job) -> dict[str, Any]:
    return {} if job.mtp_loss_coef is None else {"mtp_loss_coef": job.mtp_loss_coef}


def run(cases: dict[str, tuple]) -> dict[str, Measured]:
    """On each rank: name of the case -> (family, changes, sizes)."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    results = {}
    for name, (family, changes, sizes) in cases.items():
        results[name] = measure(make_job(family, world_size, changes, **sizes))
    return results
