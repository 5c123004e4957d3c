"""The one room that knows the kinds of device apart: cuda, npu and cpu."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Dense bf16 matrix rate in FLOP/s, from the makers' data sheets (no sparsity). The longest name that a device's own
# name contains counts.
DATA_SHEET_BF16_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H20": 148e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "Ascend910B1": 400e12,
    "Ascend910B2": 376e12,
    "Ascend910B3": 313e12,
    "Ascend910B4": 280e12,
    "Ascend910_93": 376e12,  # one of the two dies of an Atlas A3's 910C, which is what torch calls a device
}


# torch.distributed's backend for tensors of the host.
HOST_COLLECTIVES = "gloo"


@dataclass(frozen=True)
class DeviceKind:
    """What sets one kind of device apart from plain torch.

    Args:
        type: of torch.device.
        collectives: torch.distributed's backend for it; None if not known.
        logits_at_a_time: how many a chunked loss holds where Triton does not run.
        flash_attention: whether flash-attn's packages and torch's own flash attention of packed documents run on it.
        fused: the module with its fused operators (kernels/device_operators.py); None computes with plain torch.
        float64: whether it computes in float64; otherwise the values are float32 whatever the dtype says.
        unsorted_topk: whether it has top-k in any order.
        triton: whether our kernels in Triton (kernels/triton_*.py) are for it.
        fused_rms_norm: whether torch's own RMSNorm is one fused kernel on it.
        launched_as: what a launch config of Accelerate calls several of them.
        signs: files that tell that such a device is in this machine, whatever torch can do with it.
        plugin: the package that torch needs for it, of torch's own version; None where torch itself knows it.
        runtime: what else must be installed, and the environment variable that says where.
        set_up: what makes torch see it.
    """

    type: str
    collectives: str | None = None
    logits_at_a_time: int = 1 << 25
    flash_attention: bool = False
    fused: str | None = None
    float64: bool = True
    unsorted_topk: bool = True
    triton: bool = False
    fused_rms_norm: bool = False
    launched_as: str = ""
    signs: tuple[str, ...] = ()
    plugin: str | None = None
    runtime: tuple[str, str] | None = None
    set_up: str = ""


# On a CPU 32 MB of logits take less time than half and than twice as many (vocabulary 152k, fp32 and bf16); an
# accelerator wants matrix products that fill it.
KINDS = (
    DeviceKind("cpu", HOST_COLLECTIVES, logits_at_a_time=1 << 23),
    DeviceKind(
        *("cuda", "nccl"),
        flash_attention=True,
        triton=True,
        fused_rms_norm=True,
        launched_as="MULTI_GPU",
        signs=("/dev/nvidiactl", "/dev/kfd"),
        set_up="install a torch that is built for it, with the command that https://pytorch.org/get-started shows",
    ),
    DeviceKind(
        *("npu", "hccl"),
        fused="xtuner_hf.kernels.npu",
        float64=False,
        unsorted_topk=False,
        launched_as="MULTI_NPU",
        signs=("/dev/davinci_manager",),
        plugin="torch-npu",
        runtime=("CANN", "ASCEND_HOME_PATH"),
        set_up="install driver and CANN, then `source /usr/local/Ascend/ascend-toolkit/set_env.sh` (docs/npu.md)",
    ),
)


def kind_of(device: torch.device | str) -> DeviceKind:
    """What is known of the kind of a device (or of that name); of one that is unknown here, what plain torch can."""
    device_type = device if isinstance(device, str) else device.type
    return next((kind for kind in KINDS if kind.type == device_type), DeviceKind(device_type))


def is_host(device: torch.device) -> bool:
    """Whether tensors on it are in the memory of this process: nothing runs behind it, and nothing needs a copy."""
    return device.type == "cpu"


# What a dry run takes the way of, unless it is told otherwise.
PLANNED_KIND = "cuda"

_acting_kind: str | None = None


def kind(device: torch.device) -> str:
    """The name of a kind of device: which way code takes where ways differ."""
    return _acting_kind or device.type


def is_simulated(device: torch.device) -> bool:
    """Whether code takes the way of another kind of device than this one, in a dry run."""
    return kind(device) != device.type


@contextlib.contextmanager
def acting_as(device_kind: str) -> Iterator[None]:
    """Inside, tensors of any device take the way of this kind: a dry run on a CPU takes that of an accelerator."""
    global _acting_kind
    before, _acting_kind = _acting_kind, device_kind
    try:
        yield
    finally:
        _acting_kind = before


def best_device() -> torch.device:
    """The accelerator that torch sees, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def device_name(device: torch.device) -> str:
    """What the maker calls it, "NVIDIA H200" say; "cpu" for a CPU."""
    if is_host(device):
        return "cpu"
    return torch.get_device_module(device).get_device_name(device)


def data_sheet_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device of that name, None where no data sheet is known here."""
    known = [key for key in DATA_SHEET_BF16_FLOPS if key in name]
    return DATA_SHEET_BF16_FLOPS[max(known, key=len)] if known else None


def with_index(device: torch.device) -> torch.device:
    """The device by its number: `cuda` is the present one, and not equal to the `cuda:0` that its tensors are on."""
    if device.index is not None or is_host(device):
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on the device; a CPU has none queued."""
    if not is_host(device):
        torch.get_device_module(device).synchronize(device)


class CopyStream:
    """Copies between a device and the host that run beside the computation.

    On a CPU there is one memory and one queue: a copy is a plain one, and done when it returns.
    """

    def __init__(self, device: torch.device):
        self.device = with_index(device)
        self._module: Any = torch.get_device_module(device)
        self._stream: Any = None if kind(device) == "cpu" else self._module.Stream(device=device)

    def host_like(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor like it in host memory that the device reads by itself; of a DTensor, a DTensor."""
        # Allocated by torch's caching allocator of pinned memory: a freed one is used again.
        return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=self._stream is not None)

    def copy_(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy once all that is queued for computing now is done; returns what `wait` takes.

        Neither tensor's memory may be given back before `wait` was called.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, done: Any) -> None:
        """Let what is queued for computing from now on come after that copy."""
        if done is not None:
            self._module.current_stream(self.device).wait_event(done)

    def synchronize(self) -> None:
        """Let the host wait until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


def cuda_ipc_device() -> torch.device | None:
    """The device of this process if others can open its memory by CUDA IPC, else None."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def measured_matmul_flops(device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product on this device, the best of some: bf16, and fp32 on a CPU.

    Takes a tenth of a second or so. Of random numbers: with equal ones a GPU draws less power and is faster (an H200:
    894 instead of 788 TFLOP/s).
    """
    size, dtype = (1024, torch.float32) if is_host(device) else (8192, torch.bfloat16)
    # Of a generator of its own: looking at the speed must not change what a run draws.
    a = torch.randn(size, size, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0))
    best = float("inf")
    for _ in range(repeats + 1):  # the first one also warms up
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
