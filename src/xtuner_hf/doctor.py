"""`xtuner-hf doctor`: what this machine has for training, what is missing, and what to install.

Where a device's plugin is installed and its runtime is not, `import torch` itself fails. So this process switches
plugins off, and another one tries what a training script would do.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from packaging.requirements import Requirement

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_PROBE = """
import json, torch
found = {"type": "cpu", "count": 0}
if torch.accelerator.is_available():
    kind = torch.accelerator.current_accelerator().type
    module = torch.get_device_module(kind)
    found = {"type": kind, "count": torch.accelerator.device_count(), "name": module.get_device_name(0)}
    found["memory"] = module.mem_get_info(0)[1]
print("probed", json.dumps(found))
"""


class Line(NamedTuple):
    """One finding.

    Args:
        state: "ok", "missing" (something has to be done) or "note".
    """

    state: str
    text: str


class Machine(NamedTuple):
    """What the examination looks at.

    Args:
        version: of an installed package, None if it is not installed.
        probe: what a process that imports torch finds: {"type", "count", ...}, or {"error": its last words}.
        exists: whether a path is there.
        environment: variables.
    """

    version: Callable[[str], str | None]
    probe: Callable[[], dict[str, Any]]
    exists: Callable[[str], bool]
    environment: dict[str, str]


def examine() -> int:
    """Print the findings on this machine; 1 if something is missing, else 0."""
    print(f"xtuner_hf {_version('xtuner_hf')}, Python {platform.python_version()}, {platform.platform()}")
    environment = dict(os.environ)
    os.environ[_AUTOLOAD] = "0"
    lines = []
    for line in findings(Machine(_version, lambda: _probe(environment), os.path.exists, environment)):
        print(f"{line.state:8} {line.text}", flush=True)
        lines.append(line)
    missing = sum(line.state == "missing" for line in lines)
    print("Ready to train." if not missing else f"{missing} to mend before training.")
    return int(missing > 0)


def findings(machine: Machine) -> Iterator[Line]:
    """All there is to say of a machine, the packages first."""
    yield from _packages(machine)
    if machine.version("torch") is None:
        return
    from .device import KINDS, DeviceKind, data_sheet_flops, kind_of

    found = machine.probe()
    if "error" in found:
        yield Line("missing", f"`import torch` fails: {found['error']}")
    elif found["count"] == 0:
        yield Line("ok", "no accelerator: training runs on the CPU (--use_cpu)")
    else:
        kind = kind_of(found["type"])
        rate = data_sheet_flops(found["name"])
        speed = f", {rate / 1e12:.0f} TFLOP/s in bf16 by its data sheet" if rate else ""
        yield Line(
            "ok",
            f"{found['count']} x {found['name']} ({kind.type}), {found['memory'] / 2**30:.0f} GiB each{speed}; "
            f"collectives: {kind.collectives or 'not known here'}",
        )
        yield from _kernels(kind, machine)

    def is_here(kind: DeviceKind) -> bool:
        wants_plugin = kind.plugin is not None and machine.version(kind.plugin) is not None
        return wants_plugin or any(map(machine.exists, kind.signs))

    for kind in KINDS:
        if kind.type != found.get("type") and is_here(kind):
            yield from _unused(kind, machine)


def _packages(machine: Machine) -> Iterator[Line]:
    fitting = []
    for requirement in map(Requirement, importlib.metadata.requires("xtuner_hf") or []):
        if requirement.marker is not None:  # of an extra
            continue
        version = machine.version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = "not installed" if version is None else f"is {version}"
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Line("missing", f'{requirement.name} {found}: pip install "{wanted}"')
        else:
            fitting.append(f"{requirement.name} {version}")
    yield Line("ok", ", ".join(fitting))


def _kernels(kind: Any, machine: Machine) -> Iterator[Line]:
    if kind.fused is not None:
        yield Line("ok", f"experts, attention, norms and rotary embedding by the fused operators of {kind.plugin}")
    elif kind.flash_attention:
        package = next((name for name in ("flash-attn-4", "flash-attn-3", "flash-attn") if machine.version(name)), None)
        yield Line(
            "note", f"packed attention by {package or 'torch itself (flash-attn is not installed; it may be faster)'}"
        )
    if kind.plugin is not None:
        yield from _plugin(kind, machine)


def _unused(kind: Any, machine: Machine) -> Iterator[Line]:
    """Of a device that is in the machine, or whose plugin is, and that torch does not see."""
    yield Line("missing", f"torch does not see the {kind.type} devices of this machine: {kind.set_up}")
    if kind.plugin is None:
        return
    yield from _plugin(kind, machine)
    name, variable = kind.runtime
    home = machine.environment.get(variable)
    if home is None:
        yield Line("missing", f"{variable} is not set, which says where {name} is: {kind.set_up}")
    elif not machine.exists(home):
        yield Line("missing", f"{variable} is {home}, which is not there: {kind.set_up}")
    if not any(map(machine.exists, kind.signs)):
        yield Line(
            "note",
            f"{kind.plugin} is installed on a machine without such a device: `pip uninstall {kind.plugin}`, or set "
            f"{_AUTOLOAD}=0 to import torch without it",
        )


def _plugin(kind: Any, machine: Machine) -> Iterator[Line]:
    torch, plugin = machine.version("torch"), machine.version(kind.plugin)
    release = ".".join((torch or "").split("+")[0].split(".")[:2])
    if plugin is None:
        yield Line("missing", f'{kind.plugin} is not installed: pip install "{kind.plugin}=={release}.*"')
    elif not plugin.startswith(f"{release}."):
        yield Line("missing", f'{kind.plugin} {plugin} beside torch {torch}: pip install "{kind.plugin}=={release}.*"')
    else:
        yield Line("ok", f"{kind.plugin} {plugin} fits torch {torch}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", _PROBE]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"error": "no answer within 2 minutes"}
    answers = [line for line in run.stdout.splitlines() if line.startswith("probed ")]
    if answers:
        return json.loads(answers[-1].removeprefix("probed "))
    said = [line for line in run.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
    return {"error": " / ".join(said[-3:]) or f"the process ended with {run.returncode}"}
