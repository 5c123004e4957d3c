"""`--search`: which layout is the fastest that fits.

    1. every layout (EP, SP, copies) whose resting states fit, with rows of some 16K tokens a rank; fewer where that
       does not fit
    2. neighbours of the fastest two, three times over: twice the rows, less recomputed, more on the host
    3. the winner once more, with one rank's experts chosen twice as often

A layout is fast if it computes long behind each transfer, so rows decide more than anything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from ..device import kind_of
from ..models.manifest import meta_model
from ..parallel.layout import ParallelLayout
from .devices import GIB, PlanError
from .job import Job
from .planning import UNBALANCED_LOAD, Plan, plan_job, quieten

# Tokens of a rank at a time: what is tried first, and where more rows gain little.
FIRST_TOKENS, MOST_TOKENS = 16384, 65536
ROUNDS = 3

Plans = Callable[[Sequence[Job]], Iterable[Plan]]


@dataclass(frozen=True)
class Candidate:
    """A plan and what is to be said about it."""

    plan: Plan
    why: str

    def as_dict(self) -> dict[str, Any]:
        return {"why": self.why, **self.plan.as_dict()}


def search(
    job: Job,
    *,
    tokens_per_step: int | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Candidate]:
    """Candidates that fit, fastest first, then those that do not.

    Args:
        job: its model, device, ranks, row and document length stay; layout, rows at a time, recompute and offload are
            tried.
        tokens_per_step: of the whole job; rows at a time and micro-batches multiply to it. None: one micro-batch.
        workers: processes; as many as there are CPUs (four at most) by default.
        progress: told of each plan in one line.

    Raises:
        PlanError: if no layout can be, or `tokens_per_step` cannot be divided.
    """
    if tokens_per_step is not None and tokens_per_step < job.seq_len:
        raise PlanError(f"tokens_per_step {tokens_per_step} is less than one row of {job.seq_len}.")
    with _planner(workers or min(os.cpu_count() or 1, 4)) as plans:
        return _Search(job, tokens_per_step, plans, progress).run()


@contextmanager
def _planner(workers: int) -> Iterator[Plans]:
    """Plans jobs at once. Processes of their own: each joins a simulated cluster."""
    if workers == 1:
        yield lambda jobs: map(plan_briefly, jobs)
        return
    # One process imports, which takes as long as a plan, and splits into the workers.
    context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quieten) as pool:
        yield lambda jobs: pool.map(plan_briefly, jobs)


def plan_briefly(job: Job) -> Plan:
    """A plan at even loads without its course over time: little to send between processes."""
    plan = plan_job(job, unbalanced=False)
    return replace(plan, report=replace(plan.report, samples=[], spans=[]))


def _why(plan: Plan) -> str:
    if plan.fits:
        link, busy = max(plan.report.link_seconds.items(), key=lambda item: item[1], default=("no link", 0.0))
        share = plan.report.compute_seconds / plan.report.seconds
        return f"computes {share:.0%} of the time; busiest link: {link}, {busy / plan.report.seconds:.0%}"
    largest = max(plan.report.peak.by_category, key=lambda name: plan.report.peak.by_category[name])
    size = plan.report.peak.by_category[largest] / GIB
    return f"lacks {plan.needed_gib - plan.job.device.memory_gib:.0f} GiB; largest: {largest}, {size:.0f} GiB"


class _Search:
    def __init__(self, job: Job, tokens_per_step: int | None, plans: Plans, progress: Callable[[str], None]):
        self.job, self.tokens_per_step, self.plans, self.progress = job, tokens_per_step, plans, progress
        self.seen: dict[tuple, Candidate] = {}

    def run(self) -> list[Candidate]:
        starts = [start for layout in self._layouts() if (start := self._start(layout)) is not None]
        if not starts:
            raise PlanError(self._nothing_fits())
        while starts:
            lacking = [plan.job for plan in self._try(starts) if not plan.fits]
            starts = [fewer for job in lacking if (fewer := self._with_rows(job, job.micro_batch // 2)) is not None]
        for round_number in range(ROUNDS):
            best = self._ranked()[: 1 if round_number else 2] or self._nearest()
            if not self._try([job for candidate in best for job in self._neighbours(candidate.plan.job)]):
                break
        ranked = self._ranked()
        if ranked:
            ranked[0] = self._with_more_load(ranked[0])
        return ranked + self._nearest(len(self.seen))

    def _try(self, jobs: Sequence[Job]) -> list[Plan]:
        """Plan those that were not planned yet."""
        new = {self._key(job): job for job in jobs if self._key(job) not in self.seen}
        plans = []
        for plan in self.plans(list(new.values())):
            plans.append(plan)
            self.seen[self._key(plan.job)] = Candidate(plan, _why(plan))
            self.progress(f"{len(self.seen):>3} planned, {len(new) - len(plans)} to come in this round: {_line(plan)}")
        return plans

    def _start(self, layout: ParallelLayout) -> Job | None:
        job = replace(self.job, layout=layout, activation_offload=False)
        number = 1
        while number * 2 * job.seq_len / layout.sp_size <= FIRST_TOKENS and self._with_rows(job, number * 2):
            number *= 2
        return self._with_rows(job, number)

    def _neighbours(self, job: Job) -> list[Job]:
        offloaded: dict[str, Any] = {"recompute": "full", "activation_offload": True}
        tried = []
        if not job.activation_offload:
            tried.append(replace(job, **offloaded))
            if job.recompute == "full":
                tried.append(replace(job, recompute="selective"))
        fits = self.seen[self._key(job)].plan.fits
        more_rows = self._with_rows(job, job.micro_batch * 2) if fits else None
        if more_rows is not None:
            tried.append(more_rows)
            if not job.activation_offload:
                tried.append(replace(more_rows, **offloaded))
        if not fits and not job.optimizer_offload:
            tried.append(replace(job, **offloaded, optimizer_offload=True))
        return tried

    def _layouts(self) -> list[ParallelLayout]:
        base, num_experts = self.job.layout, self.job.num_experts
        most_ep = max((size for size in (2, 4, 8, 16) if num_experts and size <= base.ranks_per_node), default=1)
        num_parameters = sum(parameter.numel() for parameter in meta_model(self.job.config).parameters())
        layouts = []
        for copies in (1, 2, base.num_nodes):
            for ep_size in {1, most_ep}:
                for sp_size in self._sp_sizes():
                    try:
                        layout = replace(base, ep_size=ep_size, sp_size=sp_size, dp_replicate_size=copies)
                        replace(self.job, layout=layout)
                    except ValueError:
                        continue
                    resting = self._resting_bytes * num_parameters / layout.fsdp_size / GIB
                    if resting < self.job.device.memory_gib and layout not in layouts:
                        layouts.append(layout)
        return layouts

    @property
    def _resting_bytes(self) -> int:
        """Of a parameter: weight, gradient and two moments, or a frozen weight alone."""
        return self.job.dtype.itemsize * (4 if self.job.adapter is None else 1)

    def _sp_sizes(self) -> list[int]:
        """Shared rows are for rows that are too long, or for steps with fewer rows than ranks."""
        base, job = self.job.layout, self.job
        too_few_rows = self.tokens_per_step is not None and self.tokens_per_step < job.seq_len * base.world_size
        return [1, base.ranks_per_node] if job.seq_len > 16384 or too_few_rows else [1]

    def _with_rows(self, job: Job, number: int) -> Job | None:
        """The job with so many rows at a time; None where that cannot be."""
        if number < 1 or (number > 1 and number * job.seq_len / job.layout.sp_size > MOST_TOKENS):
            return None
        accumulation = 1
        if self.tokens_per_step is not None:
            at_a_time = number * job.seq_len * job.layout.data_size
            if self.tokens_per_step % at_a_time:
                return None
            accumulation = self.tokens_per_step // at_a_time
        return replace(job, micro_batch=number, accumulation=accumulation)

    @staticmethod
    def _key(job: Job) -> tuple:
        return (job.layout, job.micro_batch, job.recompute, job.activation_offload, job.optimizer_offload)

    def _ranked(self) -> list[Candidate]:
        fitting = [candidate for candidate in self.seen.values() if candidate.plan.fits]
        return sorted(fitting, key=lambda candidate: -candidate.plan.tokens_per_second)

    def _nearest(self, number: int = 1) -> list[Candidate]:
        """Those that lack the least."""
        others = [candidate for candidate in self.seen.values() if not candidate.plan.fits]
        return sorted(others, key=lambda candidate: candidate.plan.needed_gib)[:number]

    def _with_more_load(self, candidate: Candidate) -> Candidate:
        job = candidate.plan.job
        if job.layout.ep_size == 1:
            return candidate
        (busier,) = self.plans([replace(job, load=UNBALANCED_LOAD)])
        plan = replace(candidate.plan, unbalanced=busier.report)
        note = "fits too" if busier.fits else f"needs {busier.needed_gib:.0f} GiB, which it has not"
        return Candidate(plan, f"{candidate.why}; a rank with twice the load {note}")

    def _nothing_fits(self) -> str:
        if self.tokens_per_step is not None:
            return f"no layout of {self.job.layout.world_size} ranks divides a step of {self.tokens_per_step} tokens."
        return (
            f"no layout: what rests between steps alone, {self._resting_bytes} bytes a parameter over "
            f"{self.job.layout.world_size} ranks, are more than {self.job.device.memory_gib:.0f} GiB; take more ranks."
        )


def table(candidates: Sequence[Candidate], most: int = 20) -> str:
    """Those that fit, and the best of the others."""
    head = f"{'ep':>3}{'sp':>4}{'copies':>7}{'rows':>5}  {'recompute':<22}{'GiB':>7}{'tokens/s':>10}{'MFU':>7}  why"
    return "\n".join([head, *(f"{_line(candidate.plan)}  {candidate.why}" for candidate in candidates[:most])])


def _line(plan: Plan) -> str:
    job, layout = plan.job, plan.job.layout
    recompute = job.recompute + ", host" * job.activation_offload + ", states host" * job.optimizer_offload
    speed = f"{plan.tokens_per_second:10,.0f}{plan.mfu:7.3f}" if plan.fits else f"{'-':>10}{'-':>7}"
    return (
        f"{layout.ep_size:>3}{layout.sp_size:>4}{layout.dp_replicate_size:>7}{job.micro_batch:>5}  {recompute:<22}"
        f"{plan.needed_gib:7.1f}{speed}"
    )


def training_arguments(job: Job) -> dict[str, Any]:
    """What makes a trainer of this package run this job."""
    arguments = {
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "bf16": job.bf16,
        "fp8": job.fp8,
        "recompute": job.recompute,
        "activation_offload": job.activation_offload,
        "optimizer_states": job.optimizer_states,
        "optimizer_offload": job.optimizer_offload,
        "optimizer_in_backward": job.optimizer_in_backward,
        "ep_size": job.layout.ep_size,
        "sp_size": job.layout.sp_size,
        "dp_replicate_size": job.layout.dp_replicate_size,
    }
    if job.optimizer_in_backward:
        arguments["max_grad_norm"] = 0.0
    if job.mtp_loss_coef is not None:
        arguments["mtp_loss_coef"] = job.mtp_loss_coef
    return arguments


def accelerate_config(job: Job) -> dict[str, Any]:
    """The launch file: as accelerate_configs/, with this job's machines."""
    kind = kind_of(job.device.kind).launched_as
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind if job.layout.world_size > 1 else "NO",
        "use_cpu": False,
        "num_machines": job.layout.num_nodes,
        "machine_rank": 0,
        "main_process_port": 29500,
        "num_processes": job.layout.world_size,
        "mixed_precision": "no",  # the training arguments say bf16
        "rdzv_backend": "static",
        "same_network": True,
        "main_training_function": "main",
    }


def write_launch_files(candidates: Sequence[Candidate], folder: Path) -> None:
    """`accelerate.yaml` and `arguments.yaml` of the fastest that fits.

    Raises:
        PlanError: if none does.
    """
    best = next((candidate.plan for candidate in candidates if candidate.plan.fits), None)
    if best is None:
        raise PlanError("nothing fits, so there is nothing to write: take more ranks, larger devices or shorter rows.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("accelerate", accelerate_config(best.job)), ("arguments", training_arguments(best.job))):
        lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
        (folder / f"{name}.yaml").write_text(f"# xtuner-hf plan --search; {best.verdict}\n" + "\n".join(lines) + "\n")
