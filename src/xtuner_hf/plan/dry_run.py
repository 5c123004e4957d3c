"""A dry run: one rank's training step on fake tensors, in seconds and without memory.

The model is built on the meta device, sharded by parallel/shard.py, and stepped by step.py once the optimizer's states
exist: what is reported is any step but the first.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

from .._compat import keep_padding
from ..attention.ulysses import SequenceRanks
from ..device import PLANNED_KIND, acting_as, kind, kind_of
from ..host_reads import HostReads, answered_by
from ..kernels.select import choose_experts_kernel
from ..models.flops import TrainingFlops
from ..models.fp8 import use_fp8
from ..models.fused import fuse_norms
from ..models.manifest import meta_model
from ..moe.ep_dispatcher import IMPLEMENTATION_NAME
from ..moe.experts import implementation_name
from ..parallel.adapters import base_model, place_adapters, without_adapters
from ..parallel.sequence import sequence_ranks
from ..parallel.shard import distribute_model, local_part, sum_gradients
from . import ledger as memory
from .adapters import with_adapters
from .clock import Clock, Span
from .cluster import axis_of, fake_cluster, fake_mesh
from .costs import Costs
from .expert_loads import PlannedReads
from .job import Job
from .ledger import Ledger, Peak, Sample
from .step import Phase, TrainingStep
from .torch_internals import (
    PlannedTensorMode,
    fused_loss_tiles,
    fused_norms,
    grouped_products_of_any_dtype,
    simulated_streams,
)
from .tracker import StepTracker, Traffic, Work

# What the code takes the fake tensors' device for. torch_npu's own kernels need torch_npu: an NPU is planned with the
# memory that CUDA's take, and with the experts that `experts_kernel="auto"` chooses on an NPU.
ACTS_AS = PLANNED_KIND


@dataclass
class StepReport:
    """One rank's step; bytes, FLOPs and seconds."""

    peaks: dict[str, Peak]  # by region: "forward", "backward" (above all layers), "layer 0", ... and "optimizer"
    host_peak: int
    resting: int  # on the device between steps
    seconds: float
    compute_seconds: float  # that the computing stream was busy
    phase_seconds: dict[str, float]  # of the timeline; recompute is part of backward
    work: dict[str, Work]
    traffic: dict[tuple[str, str, str], Traffic]  # by mesh axis, kind, phase
    link_seconds: dict[str, float]
    streams: dict[str, str]  # what each is for
    host_bytes_moved: int
    host_waits: int
    model_flops: float  # of this rank's share of the step, by models/flops.py
    num_parameters: int
    samples: list[Sample] = field(repr=False, default_factory=list)
    spans: list[Span] = field(repr=False, default_factory=list)
    wall_seconds: float = 0.0

    @property
    def peak(self) -> Peak:
        """That of the whole step."""
        return max(self.peaks.values(), key=lambda peak: peak.total)

    @property
    def peak_region(self) -> str:
        return max(self.peaks, key=lambda region: self.peaks[region].total)

    @property
    def pools(self) -> dict[str, int]:
        """The most of each stream's pool."""
        pools: dict[str, int] = {}
        for peak in self.peaks.values():
            for name, size in peak.pools.items():
                pools[name] = max(pools.get(name, 0), size)
        return pools

    @property
    def reserved(self) -> int:
        """What a caching allocator holds in the end: it has a pool for each stream, and gives none back."""
        return sum(self.pools.values())


def dry_run(job: Job, *, rank: int = 0, acts_as: str = ACTS_AS, reads: HostReads | None = None) -> StepReport:
    """Observe one rank of a job.

    Args:
        rank: which.
        acts_as: "cuda", or "cpu" for what this code does on CPUs.
        reads: answers what depends on data; the planned loads by default.

    Raises:
        PlanError: if this process is part of a real job.
    """
    started = time.perf_counter()
    clock = Clock(job.device.launch_seconds)
    tracker = StepTracker(Costs(job.device, job.documents), clock, Ledger(), lambda ranks: axis_of(job.layout, ranks))
    is_last_share = rank % job.layout.sp_size == job.layout.sp_size - 1
    image_tokens = job.image_tokens * job.micro_batch
    reads = reads or PlannedReads(
        *(clock, job.documents, job.expert_choice, job.load),
        num_unlabelled=image_tokens // job.layout.sp_size or int(is_last_share),
        image_tokens=image_tokens,
        num_ranks=job.layout.sp_size,
    )
    with _simulated(job, rank, acts_as, clock, reads):
        model = build_fake_model(job)
        ranks = sequence_ranks(job.layout, "cpu") if job.layout.sp_size > 1 else None
        with PlannedTensorMode(allow_non_fake_inputs=True), tracker:
            model.to_empty(device="cpu")
            keep_padding(model)
            if job.fp8:
                use_fp8(base_model(model), torch.device("cpu"))
            report = observe(job, tracker, model, ranks)
        del model
    gc.collect()  # hooks and modules hold each other
    report.wall_seconds = time.perf_counter() - started
    return report


@contextlib.contextmanager
def _simulated(job: Job, rank: int, acts_as: str, clock: Clock, reads: HostReads) -> Iterator[None]:
    with (
        fake_cluster(job.layout.world_size, rank),
        simulated_streams(clock),
        grouped_products_of_any_dtype(),
        acting_as(acts_as),
        answered_by(reads),
        contextlib.ExitStack() as of_an_accelerator,
    ):
        if acts_as == ACTS_AS:
            of_an_accelerator.enter_context(fused_norms())
            of_an_accelerator.enter_context(fused_loss_tiles())
        yield


def build_fake_model(job: Job):
    """The job's model on the meta device, sharded."""
    options = {"mtp_loss_coef": job.mtp_loss_coef} if job.mtp_loss_coef is not None else {}
    model = meta_model(job.config, dtype=job.dtype, **options)
    if kind_of(kind(torch.device("cpu"))).fused_rms_norm:  # as trainers/setup.py
        fuse_norms(model)
    if job.device.kind != ACTS_AS:
        name = choose_experts_kernel(job.device.kind, torch.bfloat16, (), None)
        model.set_experts_implementation(implementation_name(name))
    if job.adapter is not None:
        model = with_adapters(model, job.adapter)
    if job.layout.world_size > 1:
        config = job.layout.distributed_config(bf16=job.bf16, ep_implementation=IMPLEMENTATION_NAME)
        mesh = fake_mesh(job.layout)
        with without_adapters(model):
            distribute_model(base_model(model), config, mesh)
            base_model(model).tie_weights(recompute_mapping=False)
        sum_gradients(model)
    place_adapters(model, job.layout.world_size)
    if job.frozen:
        base_model(model).freeze(job.frozen)
    return model


def observe(job: Job, tracker: StepTracker, model, ranks: SequenceRanks | None = None) -> StepReport:
    """A step of a sharded model as it is once the first is behind it; on fake tensors or on real ones.

    Args:
        tracker: entered already.
        ranks: that share this rank's sequences, with `sp_size` above 1.
    """
    step = TrainingStep(job, model, torch.device("cpu"), ranks)
    tracker.watch_layers(model)
    batch = step.batch()
    begin_training(step, batch, tracker.phase)
    label_resting(tracker.ledger, step)
    tracker.begin_step()
    step.run(batch, tracker.phase)
    return make_report(job, tracker, model)


def begin_training(step: TrainingStep, batch: dict[str, torch.Tensor], phase: Phase) -> None:
    """Leave behind what a first step leaves: states of the optimizer, made by itself from gradients of zeros. A whole
    step takes as long as the one that is observed."""
    if step.job.optimizer_in_backward:  # it fetches the states in the order that its last backward took
        step.run(batch, phase)
        return
    for parameter in step.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad()


def label_resting(ledger: Ledger, step: TrainingStep) -> None:
    """Name what lives from step to step."""
    model, states = step.resting()
    for tensor in model:
        ledger.assign(_storage_of(tensor), memory.PARAMETERS)
    for tensor in states:
        if not ledger.is_on_host(_storage_of(tensor)):
            ledger.assign(_storage_of(tensor), memory.OPTIMIZER)


def _storage_of(tensor: torch.Tensor) -> torch.Tensor:
    return local_part(tensor.data if isinstance(tensor, DTensor) else tensor)


def make_report(job: Job, tracker: StepTracker, model) -> StepReport:
    clock, ledger = tracker.clock, tracker.ledger
    ledger.end_step()
    micro_batches = job.accumulation / job.layout.sp_size
    squared = sum(length * length for length in job.documents)
    num_tiles = job.micro_batch * job.tiles_per_row
    return StepReport(
        peaks=ledger.regions,
        host_peak=ledger.host_peak,
        resting=ledger.total,
        seconds=clock.now,
        compute_seconds=clock.compute.busy,
        phase_seconds=dict(tracker.phase_seconds),
        work=dict(tracker.work),
        traffic=dict(tracker.traffic),
        link_seconds=clock.busy_links(),
        streams=clock.titles(),
        host_bytes_moved=tracker.host_bytes_moved,
        host_waits=clock.host_waits,
        model_flops=TrainingFlops.of_model(model)(sum(job.documents), squared, num_tiles) * micro_batches,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        samples=ledger.samples,
        spans=list(clock.spans),
    )
