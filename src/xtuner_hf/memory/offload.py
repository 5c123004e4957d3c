"""Inputs of checkpointed layers kept in host memory from their forward to their backward pass.

    forward    layer 1 | layer 2 | layer 3        backward   layer 3 | layer 2 | layer 1
    copies        input 1 out | input 2 out       copies        input 2 in | input 1 in

While layer i computes, the input of layer i-1 leaves; while layer i is recomputed and its gradients are computed, the
input of layer i-1 comes back. The last layer's is still there when its backward begins. So the device holds two inputs
however many layers there are.

torch's `save_on_cpu` (transformers' `activation_checkpointing_kwargs={"offload": True}`) copies on the computing
stream; TRL's `OffloadActivations` has a stream for copies, but begins each only where its tensor is wanted, and needs
an accelerator.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..device import CopyStream


@dataclass(eq=False)
class _LayerInput:
    """One saved tensor; autograd holds it until the layer's backward is done."""

    host: torch.Tensor
    previous: _LayerInput | None  # of the layer before, which backward wants next
    on_device: torch.Tensor | None  # while it leaves, and from the moment that it is fetched
    arrived: Any = None  # what `CopyStream.wait` takes


class ActivationOffload:
    """Moves what `torch.utils.checkpoint` saves to the host, and back in time.

    Args:
        to_host: copies out. On a device it needs a stream of its own, so that inputs do not queue behind each other.
        to_device: copies in.
    """

    def __init__(self, to_host: CopyStream, to_device: CopyStream):
        self.to_host = to_host
        self.to_device = to_device
        self._last: weakref.ref[_LayerInput] | None = None
        # What is being copied stays alive until the computation has waited for it.
        self._leaving: tuple[_LayerInput, Any] | None = None
        self._arriving: _LayerInput | None = None

    @classmethod
    def of_device(cls, device: torch.device) -> ActivationOffload:
        return cls(CopyStream(device), CopyStream(device))

    def hooks(self) -> saved_tensors_hooks:
        """Tensors that autograd saves inside this context are offloaded."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> _LayerInput | torch.Tensor:
        if tensor.device != self.to_host.device:
            return tensor
        self._settle()
        previous = self._last() if self._last is not None else None
        saved = _LayerInput(self.to_host.host_like(tensor), previous, on_device=tensor.detach())
        self._leaving = (saved, self.to_host.copy_(saved.host, tensor.detach()))
        self._last = weakref.ref(saved)
        return saved

    def _unpack(self, saved: _LayerInput | torch.Tensor) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if saved.on_device is None:  # not foreseen: backward in another order
            self._fetch(saved)
        tensor = saved.on_device
        assert tensor is not None
        self._settle()
        saved.on_device = None
        if saved.previous is not None and saved.previous.on_device is None:
            self._fetch(saved.previous)
        return tensor

    def _fetch(self, saved: _LayerInput) -> None:
        self._settle()
        saved.on_device = torch.empty_like(saved.host, device=self.to_device.device)
        saved.arrived = self.to_device.copy_(saved.on_device, saved.host)
        self._arriving = saved

    def _settle(self) -> None:
        """Wait for what is under way, then let go of it."""
        if self._leaving is not None:
            saved, left = self._leaving
            self.to_host.wait(left)
            saved.on_device = None
            self._leaving = None
        if self._arriving is not None:
            self.to_device.wait(self._arriving.arrived)
            self._arriving = None
