"""The table of devices (devices.json) and measured efficiencies in its place."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

GIB = 2**30


class PlanError(ValueError):
    """What cannot be planned, and why, in one sentence."""


@dataclass(frozen=True)
class Device:
    """One rank's device and what connects it; rates in bytes/s and FLOP/s, one way.

    Args:
        kind: "cuda" or "npu".
        memory_gib: what a process can allocate.
        outside_gib: of it, what no tensor has: the driver's context, buffers of collectives, workspaces of kernels.
        fp8_flops: None where there are no products of e4m3.
        fp32_flops: of matrix products of fp32 tensors (torch uses TF32 only where it is told to).
        host_link: to and from host memory.
        efficiencies: by kind of work, the part of the rate that is reached.
        reported_as: parts of the names that drivers report such devices by.
        sources: where each figure is from.
    """

    key: str
    name: str
    kind: str
    memory_gib: float
    outside_gib: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    ranks_per_node: int
    link_inside: float
    link_between: float
    latency_inside: float
    latency_between: float
    host_link: float
    shortest_kernel: float
    launch_seconds: float
    efficiencies: dict[str, float]
    reported_as: list[str]
    sources: dict[str, str]
    fp8_flops: float | None = None


@cache
def _table() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "devices.json").read_text())


def device_names() -> list[str]:
    return list(_table()["devices"])


def device_key(reported: str) -> str | None:
    """The table's name of the device that a driver reports by this name; None for one that it has not."""
    parts = {part: key for key, row in _table()["devices"].items() for part in row["reported_as"] if part in reported}
    return parts[max(parts, key=len)] if parts else None


def find_device(name: str, calibration: str | Path | None = None) -> Device:
    """The device of that name.

    Args:
        calibration: a JSON file with measured efficiencies, as `xtuner-hf bench` writes it: `efficiencies` by their
            names, of which those that it lacks stay as they are; perhaps `device`, by its name here or by the
            driver's, and `flops_per_second` that the others are parts of, if not of the table's.

    Raises:
        PlanError: for a name that the table has not, or a file that is none.
    """
    table = _table()
    if name not in table["devices"]:
        raise PlanError(f"no device {name!r} in the table; it has: {', '.join(device_names())}.")
    row = table["defaults"] | table["devices"][name]
    for field in ("efficiencies", "sources"):
        row[field] = table["defaults"][field] | row[field]
    device = Device(key=name, **row)
    return device if calibration is None else _calibrated(device, Path(calibration))


def _calibrated(device: Device, file: Path) -> Device:
    try:
        content = json.loads(file.read_text())
        measured, found = dict(content["efficiencies"]), content.get("device", device.key)
        part = content.get("flops_per_second", device.bf16_flops) / device.bf16_flops
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{file} is no calibration ({error}): expected JSON with 'efficiencies' in it.") from None
    if device.key not in (found, device_key(found)):
        raise PlanError(f"{file} was measured on {found!r}, which is not what {device.key!r} means: {device.name}.")
    for name, value in measured.items():
        if name not in device.efficiencies:
            known = ", ".join(device.efficiencies)
            raise PlanError(f"{file} has an efficiency {name!r}, which no cost uses; known are: {known}.")
        if not isinstance(value, int | float) or not 0 < value * part <= 1:
            raise PlanError(f"{file} says {name} {value!r}; an efficiency is a number above 0 and at most 1.")
    return replace(device, efficiencies=device.efficiencies | {name: value * part for name, value in measured.items()})
