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
        if current_platform.is_cpu():
            _pack_experts_again(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Files) -> None:
        for path in update_info.files:
            with safe_open(path, framework="pt", device="cpu") as file:
                # By name: an expert's tensors lie together, and so do a layer's.
                self.model.load_weights((name, file.get_tensor(name)) for name in sorted(file.keys()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def _pack_experts_again(model) -> None:
    """Let vLLM set up its experts' kernel anew when they are loaded.

    On a CPU it packs experts while it sets that kernel up, and on a reload it sets nothing up: they would stay as they
    are in the file, and every answer would be wrong without an error.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class SafetensorsWorker:
    """Adds nothing to vLLM's worker; its import registers the transfer engine in the worker's process."""


WeightTransferEngineFactory.register_engine(BACKEND, SafetensorsTransfer)
