"""Runs inside vLLM (0.32): new weights from safetensors files on storage that trainer and server share.

`--worker-extension-cls` names `SafetensorsWorker`, whose import registers the transfer engine "safetensors" with vLLM;
/start_weight_update, /update_weights {"files": [...]} and /finish_weight_update then work as with vLLM's own NCCL.
Layers are loaded and processed one after the other, into the memory that the old ones had.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "safetensors"


@dataclass
class NothingToInit(WeightTransferInitInfo):
    pass


@dataclass
class Files(WeightTransferUpdateInfo):
    """Paths of whole safetensors files under Hub names."""

    files: list[str] = field(default_factory=list)


class SafetensorsTransfer(WeightTransferEngine[NothingToInit, Files]):
    """Loads files as if they were the checkpoint's."""

    init_info_cls = NothingToInit
    update_info_cls = Files

    def init_transfer_engine(self, init_info: NothingToInit) -> None:
        pass

    def start_weight_update(self) -> None:
        self._old_kernels = _take_expert_kernels(self.model) if current_platform.is_cpu() else []
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Files) -> None:
        for path in update_info.files:
            with safe_open(path, framework="pt", device="cpu") as file:
                # By name: an expert's tensors lie together, and so do a layer's.
                self.model.load_weights((name, file.get_tensor(name)) for name in sorted(file.keys()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._old_kernels:
            if method.moe_kernel is None:  # no new experts came for it
                method.moe_kernel = kernel

    def shutdown(self) -> None:
        pass


def _take_expert_kernels(model) -> list[tuple[Any, Any]]:
    """Let vLLM set up the kernels of experts anew when they are loaded; returns the old ones, by quantisation method.

    On a CPU it packs experts while it sets a kernel up, and on a reload it keeps the kernel: they would stay as they
    are in the file, and every answer would be wrong without an error.
    """
    taken = []
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            taken.append((method, method.moe_kernel))
            method.moe_kernel = None
    return taken


class SafetensorsWorker:
    """Adds nothing to vLLM's worker; its import registers the transfer engine in the worker's process."""


WeightTransferEngineFactory.register_engine(BACKEND, SafetensorsTransfer)
