"""Full depth from two shallow models: every figure of a step is linear in the number of layers.

Memory is a maximum over the step and only piecewise linear, so each region's maximum is extrapolated by itself:
forward, the head's backward, the uppermost and the lowermost layers' backward, the optimizer. Between them memory rises
or falls evenly from layer to layer, so the largest of them is the largest of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from .dry_run import StepReport, dry_run
from .job import Job, num_dense_layers
from .ledger import Peak

# Layers with experts in the shallow models: enough that prefetching two layers ahead meets neither end.
SHALLOW, LESS_SHALLOW = 4, 6


def shallow_depths(config: PreTrainedConfig) -> tuple[int, int] | None:
    """How many layers the two models have; None where the model itself has as few."""
    period = _period(config)
    dense = num_dense_layers(config)
    depths = tuple(dense + math.ceil(number / period) * period for number in (SHALLOW, LESS_SHALLOW))
    return depths if depths[1] < config.get_text_config().num_hidden_layers else None  # type: ignore[return-value]


def _period(config: PreTrainedConfig) -> int:
    """Layers after which their kinds repeat."""
    config = config.get_text_config()
    period = getattr(config, "decoder_sparse_step", None) or 1
    types = getattr(config, "layer_types", None) or []
    if len(set(types)) > 1:
        period = math.lcm(
            period, next(n for n in range(1, len(types) + 1) if types[n:] == types[:-n] or n == len(types))
        )
    return period


def full_depth(job: Job, run: Callable[[Job], StepReport] = dry_run) -> StepReport:
    """The report of a job, from two dry runs of shallow models where it is deep enough for that."""
    depths = shallow_depths(job.config)
    if depths is None:
        return run(job)
    less, more = (run(job.with_layers(number)) for number in depths)
    factor = (job.text_config.num_hidden_layers - depths[1]) / (depths[1] - depths[0])
    first, second = (_with_named_ends(report) for report in (less, more))
    report = _along_line(first, second, factor)
    return replace(report, wall_seconds=less.wall_seconds + more.wall_seconds)


def _with_named_ends(report: StepReport) -> StepReport:
    """Layers named by their distance from the nearer end."""
    layers = sorted(int(name.split()[1]) for name in report.peaks if name.startswith("layer "))
    names = {}
    for place, layer in enumerate(layers):
        from_above = len(layers) - 1 - place
        names[f"layer {layer}"] = f"layer {place}" if place <= from_above else f"layer {-1 - from_above}"
    ends: dict[str, Peak] = {names.get(region, region): peak for region, peak in report.peaks.items()}
    return replace(report, peaks=ends)


def _along_line(first: Any, second: Any, factor: float) -> Any:
    """`second` and `factor` times its distance from `first`, for all numbers in there."""
    if is_dataclass(second) and not isinstance(second, type):
        values = {
            item.name: _along_line(getattr(first, item.name), getattr(second, item.name), factor)
            for item in fields(second)
        }
        return replace(second, **values)
    if isinstance(second, dict):
        changed = {key: _along_line(first[key], value, factor) for key, value in second.items() if key in first}
        return {**second, **changed}
    if isinstance(second, bool) or not isinstance(second, int | float):
        return second
    value = second + (second - first) * factor
    return round(value) if isinstance(second, int) else value
