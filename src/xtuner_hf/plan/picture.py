"""Pictures of a plan: memory by category and the timeline, as a PNG and as a trace for chrome://tracing or Perfetto."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from .clock import Span
from .devices import GIB
from .dry_run import dry_run
from .extrapolate import shallow_depths
from .ledger import CATEGORIES, Sample
from .planning import Plan

MICROSECONDS = 1e6


def _drawn(plan: Plan) -> tuple[list[Sample], list[Span], str]:
    """Memory and timeline of the plan; of its deeper shallow model, where the plan was extrapolated."""
    depths = shallow_depths(plan.job.config)
    if plan.layers_run is None or depths is None:
        return plan.report.samples, plan.report.spans, "all layers"
    report = plan.report if plan.report.samples else dry_run(plan.job.with_layers(depths[1]))
    return report.samples, report.spans, f"a model of {depths[1]} layers"


def draw(plan: Plan, file: Path) -> None:
    """Memory by category over the step, and below it what computes and what travels when."""
    from matplotlib.figure import Figure

    samples, spans, of_what = _drawn(plan)
    # A stream that runs behind allocates when it is asked to: never before what was drawn already.
    times = list(itertools.accumulate((sample.time for sample in samples), max))
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    memory, timeline = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    used = [name for name in CATEGORIES if any(sample.bytes.get(name, 0) for sample in samples)]
    stacks = [[sample.bytes.get(name, 0) / GIB for sample in samples] for name in used]
    memory.stackplot(times, stacks, labels=used, step="post")
    memory.set_ylabel("GiB of a rank")
    memory.legend(loc="upper left", fontsize="small", ncols=2)
    memory.set_title(f"{plan.job.config.model_type} on {plan.job.layout.world_size} x {plan.job.device.key}, {of_what}")
    tracks = sorted({span.track for span in spans}, key=lambda track: (track != "compute", track))
    for place, track in enumerate(tracks):
        bars = [(span.start, span.end - span.start) for span in _merged(spans, track)]
        timeline.broken_barh(bars, (place - 0.4, 0.8))
    timeline.set_yticks(range(len(tracks)), tracks)
    timeline.invert_yaxis()
    timeline.set_xlabel("seconds of a step")
    figure.savefig(file, dpi=120)


def _merged(spans: Sequence[Span], track: str, gap: float = 1e-4) -> list[Span]:
    """Neighbours joined, so that a picture has thousands of bars and not a million."""
    merged: list[Span] = []
    for span in sorted((span for span in spans if span.track == track), key=lambda span: span.start):
        if merged and span.start - merged[-1].end < gap:
            merged[-1] = merged[-1]._replace(end=max(span.end, merged[-1].end))
        else:
            merged.append(span)
    return merged


def write_trace(plan: Plan, file: Path) -> None:
    """The timeline with a counter of memory, in Chrome's trace format."""
    samples, spans, _ = _drawn(plan)
    tracks = {track: number for number, track in enumerate(dict.fromkeys(span.track for span in spans))}
    events: list[dict] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}}
        for track, number in tracks.items()
    ]
    for span in spans:
        start, length = span.start * MICROSECONDS, (span.end - span.start) * MICROSECONDS
        event = {"ph": "X", "name": span.name, "pid": 0, "tid": tracks[span.track], "ts": start, "dur": length}
        events.append(event)
    for sample in samples:
        in_gib = {name: size / GIB for name, size in sample.bytes.items()}
        events.append({"ph": "C", "name": "GiB", "pid": 0, "ts": sample.time * MICROSECONDS, "args": in_gib})
    file.write_text(json.dumps({"traceEvents": events}))
