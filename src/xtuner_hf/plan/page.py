"""A plan as a page that a person reads."""

from __future__ import annotations

from .devices import GIB
from .dry_run import StepReport
from .job import Job
from .ledger import CATEGORIES
from .planning import Plan, seconds_by_kind, traffic_by_axis

_KINDS = {
    "dense_matmul": "dense matrix products",
    "grouped_matmul": "experts' matrix products",
    "attention_forward": "attention forward",
    "attention_backward": "attention backward",
    "memory": "all else (memory-bound)",
}


def page(plan: Plan) -> str:
    """All of it."""
    job, report = plan.job, plan.report
    parts = [_heading(plan), _verdict(plan), _memory(plan), _time(plan), _links(job, report)]
    if plan.unbalanced is not None:
        parts.append(_unbalanced(plan))
    return "\n\n".join(parts) + "\n"


def _heading(plan: Plan) -> str:
    job = plan.job
    rows = f"{job.micro_batch} rows" if job.micro_batch > 1 else "1 row"
    documents = "one document each" if job.document_len is None else f"documents of {job.document_len:,}"
    sharing = f", shared by {job.layout.sp_size} ranks" if job.layout.sp_size > 1 else ""
    steps = f", {job.accumulation} micro-batches a step" if job.accumulation > 1 else ""
    options = [f"recompute {job.recompute}"]
    options += ["layer inputs on the host"] * job.activation_offload
    options += [f"optimizer states {job.optimizer_states}"] * (job.optimizer_states != "full")
    options += ["optimizer states on the host"] * job.optimizer_offload
    options += ["optimizer in backward"] * job.optimizer_in_backward
    options += ["products in FP8"] * job.fp8
    options += [f"LoRA of rank {job.adapter.r}"] if job.adapter is not None else []
    options += [f"{job.tiles_per_row} tiles a row"] * bool(job.tiles_per_row)
    options += [f"{' and '.join(job.frozen)} frozen"] * bool(job.frozen)
    how = "every layer simulated"
    if plan.layers_run is not None:
        how = f"from models of {plan.layers_run[0]} and {plan.layers_run[1]} layers"
    return "\n".join(
        [
            f"{job.config.model_type}, {plan.report.num_parameters / 1e9:,.1f}B parameters, on "
            f"{job.layout.world_size:,} x {job.device.name}",
            job.layout.describe(job.num_experts),
            f"{rows} of {job.seq_len:,} tokens ({documents}){sharing}{steps}; {', '.join(options)}",
            f"simulated in {plan.report.wall_seconds:.0f} s, {how}",
        ]
    )


def _verdict(plan: Plan) -> str:
    if plan.unbalanced is None:
        return plan.verdict
    even = plan.gib_of(plan.report)
    return f"{plan.verdict} where this rank's experts are chosen twice as often, {even:.1f} where evenly"


def _memory(plan: Plan) -> str:
    report, peak = plan.report, plan.report.peak
    lines = [f"Memory of a rank, GiB ({_place(report)})"]
    for name in CATEGORIES:
        if peak.by_category.get(name, 0) > GIB / 200:
            lines.append(_row(name, f"{peak.by_category[name] / GIB:8.2f}"))
    lines.append(_row("all tensors at their peak", f"{peak.total / GIB:8.2f}"))
    largest_first = sorted(report.pools.items(), key=lambda item: -item[1])
    pools = ", ".join(f"{report.streams[name]} {size / GIB:.1f}" for name, size in largest_first if size)
    lines.append(_row("kept by the allocator's pools", f"{report.reserved / GIB:8.2f}   {pools}"))
    lines.append(_row("outside of tensors", f"{plan.job.device.outside_gib:8.2f}   context, collectives, workspaces"))
    if report.host_peak:
        lines.append(_row("on the host, pinned", f"{report.host_peak / GIB:8.2f}"))
    lines.append("  largest at the peak:")
    for what, held in list(peak.holders.items())[:6]:
        shape = " x ".join(f"{size:,}" for size in what.shape)
        lines.append(f"    {held.bytes / GIB:6.2f}  {what.category}: {held.number} x [{shape}] {what.dtype}")
    return "\n".join(lines)


def _place(report: StepReport) -> str:
    region = report.peak_region
    if region.startswith("vision layer"):
        return f"at the peak, in the backward of {region}"
    if not region.startswith("layer"):
        return f"at the peak, in {'the head' if region == 'backward' else region}"
    number = int(region.split()[1])
    where = f"{number} from below" if number >= 0 else f"{-1 - number} from above"
    return f"at the peak, in the backward of layer {where}"


def _time(plan: Plan) -> str:
    report = plan.report
    low, high = plan.mfu_range
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.phase_seconds.items() if name != "setup")
    recompute = sum(report.work["recompute"].seconds.values()) if "recompute" in report.work else 0.0
    lines = [
        f"Time of a step: {report.seconds:.2f} s ({phases}; {recompute:.2f} of backward is recomputation)",
        _row("computing", f"{report.compute_seconds:8.2f}"),
    ]
    for kind, seconds in seconds_by_kind(report).most_common():
        lines.append(_row(f"  {_KINDS[kind]}", f"{seconds:8.2f}"))
    waiting = max(report.seconds - report.compute_seconds, 0.0)
    lines.append(_row("waiting for links and the host", f"{waiting:8.2f}"))
    lines.append(
        f"  {plan.tokens_per_second:,.0f} tokens/s a device, MFU {plan.mfu:.3f} ({low:.2f} to {high:.2f}: a roofline)"
    )
    return "\n".join(lines)


def _links(job: Job, report: StepReport) -> str:
    lines = ["Traffic of a rank          calls   GB inside nodes   GB between nodes   seconds"]
    for (axis, kind), row in sorted(traffic_by_axis(report).items(), key=lambda item: -item[1][3]):
        calls, inside, between, seconds = row
        if seconds > report.seconds / 1000:
            lines.append(
                f"  {axis + ' ' + kind:<22}{calls:8,}{inside / 1e9:18,.1f}{between / 1e9:19,.1f}{seconds:10.2f}"
            )
    if report.host_bytes_moved:
        moved = report.host_bytes_moved
        lines.append(
            f"  {'to and from the host':<22}{'':8}{moved / 1e9:18,.1f}{'':19}{moved / job.device.host_link:10.2f}"
        )
    return "\n".join(lines) if len(lines) > 1 else "No traffic to speak of."


def _unbalanced(plan: Plan) -> str:
    report = plan.unbalanced
    assert report is not None
    return (
        "If this rank's experts are chosen twice as often: "
        f"{plan.gib_of(report):.1f} GiB, {report.seconds:.2f} s a step, "
        f"{plan.job.tokens_per_rank / report.seconds:,.0f} tokens/s a device (all wait for the busiest rank)"
    )


def _row(name: str, value: str) -> str:
    return f"  {name:<32}{value}"
