"""`plan`: does it fit, how fast is it, what does it consist of."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from ..parallel.layout import ParallelLayout
from .adapters import lora_of_rank
from .devices import GIB, Device, PlanError, find_device
from .dry_run import StepReport, dry_run
from .extrapolate import full_depth, shallow_depths
from .job import Job
from .models import find_config

# How far a step's time may be off: of the published runs of docs/planner.md, one of other software is further.
TIME_FACTOR = 1.5
UNBALANCED_LOAD = 2.0


@dataclass
class Plan:
    """What one rank of a job does in a step.

    Args:
        report: with experts chosen evenly.
        unbalanced: of a rank whose experts are chosen twice as often; None without expert parallelism.
        layers_run: what was simulated, if the model is deeper.
    """

    job: Job
    report: StepReport
    unbalanced: StepReport | None = None
    layers_run: tuple[int, int] | None = None

    @property
    def allocated_gib(self) -> float:
        """Tensors alive at once, at most."""
        return self.report.peak.total / GIB

    @property
    def needed_gib(self) -> float:
        """Of the device, with what the allocator's pools keep and what is outside of tensors; of the busier rank."""
        return max(self.gib_of(report) for report in (self.report, self.unbalanced) if report is not None)

    def gib_of(self, report: StepReport) -> float:
        """The same for one of the two."""
        return report.reserved / GIB + self.job.device.outside_gib

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.job.device.memory_gib

    @property
    def verdict(self) -> str:
        """One line."""
        word = "fits" if self.fits else "does not fit"
        return f"{word}: {self.needed_gib:.1f} of {self.job.device.memory_gib:.1f} GiB"

    @property
    def tokens_per_second(self) -> float:
        """Of each device."""
        return self.job.tokens_per_rank / self.report.seconds

    @property
    def mfu(self) -> float:
        return self.report.model_flops / self.report.seconds / self.job.device.bf16_flops

    @property
    def mfu_range(self) -> tuple[float, float]:
        return self.mfu / TIME_FACTOR, min(self.mfu * TIME_FACTOR, 1.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds, bytes (GiB where the name says so) and FLOPs of one rank and optimizer step."""
        job, layout = self.job, self.job.layout
        return {
            "job": {
                "model_type": job.config.model_type,
                "parameters": self.report.num_parameters,
                "device": job.device.key,
                "ranks": layout.world_size,
                "ranks_per_node": layout.ranks_per_node,
                "ep_size": layout.ep_size,
                "sp_size": layout.sp_size,
                "dp_replicate_size": layout.dp_replicate_size,
                **{name: getattr(job, name) for name in _JOB_FIELDS},
                "dtype": str(job.dtype)[6:],
                "lora_rank": None if job.adapter is None else job.adapter.r,
            },
            "fits": self.fits,
            "needed_gib": self.needed_gib,
            "memory_gib": job.device.memory_gib,
            "tokens_per_second_per_device": self.tokens_per_second,
            "mfu": self.mfu,
            "mfu_range": self.mfu_range,
            "balanced": _report_as_dict(self.report),
            "unbalanced": None if self.unbalanced is None else _report_as_dict(self.unbalanced),
            "layers_run": self.layers_run,
        }


_JOB_FIELDS = (
    "seq_len",
    "document_len",
    "micro_batch",
    "accumulation",
    "recompute",
    "activation_offload",
    "optimizer_states",
    "optimizer_offload",
    "optimizer_in_backward",
    "mtp_loss_coef",
    "tiles_per_row",
    "frozen",
    "fp8",
)


def _report_as_dict(report: StepReport) -> dict[str, Any]:
    peak = report.peak
    return {
        "allocated_gib": peak.total / GIB,
        "reserved_gib": report.reserved / GIB,
        "resting_gib": report.resting / GIB,
        "host_gib": report.host_peak / GIB,
        "peak_region": report.peak_region,
        "peak_gib_by_category": {name: size / GIB for name, size in peak.by_category.items() if size},
        "seconds": report.seconds,
        "compute_seconds": report.compute_seconds,
        "seconds_by_phase": report.phase_seconds,
        "compute_seconds_by_phase": {phase: dict(work.seconds) for phase, work in report.work.items()},
        "flops_by_phase": {phase: dict(work.flops) for phase, work in report.work.items()},
        "model_flops": report.model_flops,
        "traffic": [
            {"axis": axis, "kind": kind, "phase": phase, **vars(traffic)}
            for (axis, kind, phase), traffic in report.traffic.items()
        ],
        "link_seconds": report.link_seconds,
        "host_bytes_moved": report.host_bytes_moved,
        "host_waits": report.host_waits,
    }


def make_job(
    model: str | Path | PreTrainedConfig,
    *,
    gpus: int,
    device: str | Device = "h100",
    ranks_per_node: int | None = None,
    ep_size: int = 1,
    sp_size: int = 1,
    dp_replicate_size: int = 1,
    ep_across_nodes: bool = False,
    sp_across_nodes: bool = False,
    calibration: str | Path | None = None,
    lora_rank: int | None = None,
    **arguments: Any,
) -> Job:
    """A `Job` from names and numbers.

    Args:
        model: a folder, a config.json or a known name.
        gpus: ranks of the job.
        device: a name of the table.
        ranks_per_node: the device's usual number by default, or all ranks if they are fewer.
        calibration: a file with measured efficiencies.
        lora_rank: train adapters of this rank on attention, dense MLPs and experts (plan/adapters.py).
        arguments: the other fields of `Job`.

    Raises:
        PlanError: in one sentence, for a job that cannot be.
    """
    if isinstance(device, str):
        device = find_device(device, calibration)
    if gpus < 1:
        raise PlanError(f"a job of {gpus} ranks trains nothing; give 1 or more.")
    per_node = ranks_per_node or min(device.ranks_per_node, gpus)
    try:
        layout = ParallelLayout(gpus, per_node, ep_size, sp_size, dp_replicate_size, ep_across_nodes, sp_across_nodes)
    except ValueError as error:
        raise PlanError(str(error)) from None
    config = find_config(model)
    if lora_rank is not None:
        arguments["adapter"] = lora_of_rank(lora_rank, config)
    return Job(config, layout, replace(device, ranks_per_node=per_node), **arguments)


def plan_job(job: Job, *, unbalanced: bool = True, every_layer: bool = False) -> Plan:
    """Plan a job by dry runs.

    Args:
        unbalanced: with expert parallelism, plan a rank with twice the load too.
        every_layer: run the model at full depth, not two shallow ones: a minute instead of seconds.
    """
    run = dry_run if every_layer else full_depth
    report = run(job)
    busier = None
    if unbalanced and job.layout.ep_size > 1:
        busier = run(replace(job, load=min(UNBALANCED_LOAD, float(job.layout.ep_size))))
    return Plan(job, report, busier, None if every_layer else shallow_depths(job.config))


def plan(model: str | Path | PreTrainedConfig, **arguments: Any) -> Plan:
    """Plan a job: `plan("qwen3-235b-a22b", gpus=256, device="h800", seq_len=4096).verdict`.

    Args:
        arguments: of `make_job`.
    """
    return plan_job(make_job(model, **arguments))


def quieten() -> None:
    """For a process that does nothing but plan: no warnings about a model that is never trained."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`quieten` for as long as it lasts."""
    package = logging.getLogger(__package__.partition(".")[0])
    level, verbosity = package.level, transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        quieten()
        try:
            yield
        finally:
            package.setLevel(level)
            transformers_logging.set_verbosity(verbosity)


def seconds_by_kind(report: StepReport) -> Counter[str]:
    """Computing time by what is computed."""
    total: Counter[str] = Counter()
    for work in report.work.values():
        for kind, seconds in work.seconds.items():
            total[kind] += seconds  # type: ignore[assignment]
    return total


def traffic_by_axis(report: StepReport) -> dict[tuple[str, str], tuple[int, float, float, float]]:
    """(axis, kind) -> calls, bytes inside nodes, bytes between nodes, seconds of all phases."""
    rows: dict[tuple[str, str], tuple[int, float, float, float]] = {}
    for (axis, kind, _), traffic in report.traffic.items():
        before = rows.get((axis, kind), (0, 0.0, 0.0, 0.0))
        values = (traffic.calls, traffic.bytes_inside, traffic.bytes_between, traffic.seconds)
        rows[axis, kind] = tuple(a + b for a, b in zip(before, values, strict=True))  # type: ignore[assignment]
    return rows
