"""One step under observation: every operator's memory, FLOPs, time and traffic.

Works on fake tensors (a dry run) and on real ones (the tests that hold the dry run to account).
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ..device import is_host, is_simulated
from ..kernels.fp8_weights import GatheredWeight
from . import ledger as memory
from . import links
from .clock import Clock
from .costs import Costs, bytes_moved, chunk_cat_scratch, is_free, num_bytes
from .ledger import Ledger
from .torch_internals import (
    FakeTensor,
    TorchDispatchMode,
    hidden_propagation,
    resolve_process_group,
    tensors_in,
    watched_storages,
)

FORWARD, RECOMPUTE, BACKWARD, OPTIMIZER_STEP = "forward", "recompute", "backward", "optimizer"
SETUP = "setup"
PHASES = (FORWARD, RECOMPUTE, BACKWARD, OPTIMIZER_STEP)
_CATEGORY_OF_PHASE = {
    SETUP: memory.INPUTS,
    FORWARD: memory.ACTIVATIONS,
    BACKWARD: memory.BACKWARD,
    RECOMPUTE: memory.BACKWARD,
    OPTIMIZER_STEP: memory.STEP,
}

# Operator -> what it is, and where its group stands among the arguments.
_COLLECTIVES = {
    "_allgather_base_": (links.ALL_GATHER, 2),
    "_reduce_scatter_base_": (links.REDUCE_SCATTER, 2),
    "allreduce_": (links.ALL_REDUCE, 1),
    "alltoall_base_": (links.ALL_TO_ALL, 2),
    "broadcast_": (links.BROADCAST, 1),
    "all_reduce": (links.ALL_REDUCE, 2),
}


@dataclass
class Traffic:
    """All collectives of one kind over one mesh axis in one phase; bytes and seconds of one rank."""

    calls: int = 0
    buffer_bytes: float = 0.0
    bytes_inside: float = 0.0
    bytes_between: float = 0.0
    seconds: float = 0.0


@dataclass
class Work:
    """Operators of one phase."""

    flops: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by kind of matrix product
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # "memory" is all else
    bytes_moved: int = 0
    operators: int = 0


def _narrowest_float(args: Any) -> torch.dtype:
    """What a matrix product multiplies, whatever it adds up in."""
    dtypes = (tensor.dtype for tensor in tensors_in(args) if tensor.is_floating_point())
    return min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


class StepTracker(TorchDispatchMode):
    """Observes what runs inside `with`.

    Args:
        axis_of: the name of the mesh axis that these ranks lie on.
    """

    def __init__(self, costs: Costs, clock: Clock, ledger: Ledger, axis_of: Callable[[tuple[int, ...]], str]):
        super().__init__()
        self.costs, self.clock, self.ledger = costs, clock, ledger
        self._axis_of = axis_of
        self._phase = SETUP
        self._recomputing = False
        self._layer: str | None = None  # whose backward has begun
        self._names: dict[Any, str] = {}
        self._contexts = contextlib.ExitStack()
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what came before, but for what is alive."""
        self.work: defaultdict[str, Work] = defaultdict(Work)
        self.traffic: defaultdict[tuple[str, str, str], Traffic] = defaultdict(Traffic)  # by axis, kind, phase
        self.host_bytes_moved = 0
        self.phase_seconds: defaultdict[str, float] = defaultdict(float)
        self.ledger.begin_step()
        self.clock.begin_step()

    def __enter__(self):
        self._contexts.enter_context(hidden_propagation())
        self._contexts.enter_context(watched_storages(self._resized))
        return super().__enter__()

    def __exit__(self, *exception):
        self._contexts.close()
        return super().__exit__(*exception)

    # ---- where in the step we are ----

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase, start = self._phase, name, self.clock.now
        self._layer = None
        try:
            yield
        finally:
            self._phase = before
            self.phase_seconds[name] += self.clock.now - start

    def watch_layers(self, model: nn.Module) -> None:
        """Know which layer's backward runs, and tell recomputed layers from it. Call it once checkpointing is on."""
        numbers: defaultdict[str, int] = defaultdict(int)
        for path, layer in model.named_modules():
            if not isinstance(layer, GradientCheckpointingLayer):
                continue
            stack = "vision layer" if "vision_tower" in path.split(".") else "layer"
            layer.register_forward_hook(functools.partial(self._watch_backward, f"{stack} {numbers[stack]}"))
            numbers[stack] += 1
            if layer.gradient_checkpointing:
                checkpoint: Any = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = self._noting_recompute(checkpoint)  # type: ignore[assignment]

    def _watch_backward(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(functools.partial(self._enter_layer, name))

    def _enter_layer(self, name: str, grad: torch.Tensor) -> None:
        self._layer = name

    @property
    def region(self) -> str:
        """Where in the step memory is counted: the phase, and the layer of a backward."""
        return self._layer if self._phase == BACKWARD and self._layer is not None else self._phase

    def _noting_recompute(self, checkpoint: Callable) -> Callable:
        def noting(function: Callable) -> Callable:
            def layer(*args: Any):
                self._recomputing = self._phase == BACKWARD
                try:
                    return function(*args)
                finally:
                    self._recomputing = False

            return layer

        return lambda function, *args: checkpoint(noting(function), *args)

    @property
    def subphase(self) -> str:
        return RECOMPUTE if self._recomputing else self._phase

    # ---- operators ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types or GatheredWeight in types:
            return NotImplemented  # it comes back with the tensors inside
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = func._schema.name.split("::")[1]
        if name == "device" and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked so often that the way to the fake mode below costs a tenth of a dry run
        if func.namespace == "prim" or name == "wait_tensor":
            return func(*args, **kwargs)
        is_pinned = kwargs.get("pin_memory")
        if is_pinned:  # a CPU without an accelerator has no such memory
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if name == "index_put" and self._phase == BACKWARD:
            # Autograd writes into the zeros that it made; only under a mode does it copy them first.
            self.ledger.forget(args[0])
        self._remember(name, outputs, memory.HOST if is_pinned else _CATEGORY_OF_PHASE[self.subphase])
        if name in _COLLECTIVES:
            self._collective(name, args, outputs)
        elif not is_free(name):
            self._compute(name, args, kwargs, outputs)
        return result

    def _remember(self, name: str, outputs: list[torch.Tensor], category: str) -> None:
        for tensor in outputs:
            self.ledger.add(
                tensor,
                category,
                pool=self.clock.current.name,
                made_by=name,
                region=self.region,
                time=self.clock.current.free_at - self.clock.begin,
            )

    def _resized(self, storage: torch.UntypedStorage) -> None:
        self.ledger.resize(
            storage,
            memory.GATHERED,
            pool=self.clock.current.name,
            region=self.region,
            time=self.clock.current.free_at - self.clock.begin,
        )

    def _scratch(self, size: int) -> None:
        """Memory that a kernel takes and gives back."""
        now = self.clock.current.free_at - self.clock.begin
        self.ledger.pass_through(size, memory.REDUCED, pool=self.clock.current.name, region=self.region, time=now)

    def _compute(self, name: str, args, kwargs, outputs: list[torch.Tensor]) -> None:
        if name == "copy_" and self.ledger.is_on_host(args[0]) != self.ledger.is_on_host(args[1]):
            moved = num_bytes(args[0])
            self.host_bytes_moved += moved
            self.clock.current.title = "to the host" if self.ledger.is_on_host(args[0]) else "from the host"
            self.clock.run(moved / self.costs.device.host_link, "copy to or from the host")
            return
        if name == "all_gather_copy_in":
            self.clock.current.title = "gathering"
            self.ledger.assign(outputs[-1], memory.GATHERED)
        elif name in ("split_with_sizes_copy", "cat") and "out" in kwargs:  # FSDP2 takes apart what it has gathered
            for tensor in tensors_in(kwargs["out"]):
                self.ledger.assign(tensor, memory.GATHERED)
        elif name == "chunk_cat":
            self.ledger.assign(kwargs["out"], memory.REDUCED)
            device = kwargs["out"].device
            if is_host(device) and not is_simulated(device):
                self._scratch(chunk_cat_scratch(args[0], args[2], kwargs["out"]))
        flops, product = self.costs.flops(name, args, kwargs)
        moved = bytes_moved(name, args, kwargs, outputs)
        seconds = self.costs.seconds(flops, product, moved, _narrowest_float(args))
        work = self.work[self.subphase]
        if flops:
            work.flops[product] += flops
        work.seconds[product or "memory"] += seconds
        work.bytes_moved += moved
        work.operators += 1
        self.clock.run(seconds, name)

    def _collective(self, name: str, args, outputs: list[torch.Tensor]) -> None:
        what, place = _COLLECTIVES[name]
        group: Any = args[place]
        if isinstance(group, str):
            group = resolve_process_group(group)  # type: ignore[arg-type]
        elif not isinstance(group, dist.ProcessGroup):
            group = dist.ProcessGroup.unbox(group)
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if what == links.ALL_GATHER:
            size = num_bytes(first)
            self.ledger.assign(first, memory.GATHERED)
        elif what == links.REDUCE_SCATTER:
            size = num_bytes(args[1])
            self.clock.current.title = "reducing"
            self.ledger.assign(first, memory.GRADIENTS)
            self.ledger.assign(args[1], memory.REDUCED)
        elif what == links.ALL_TO_ALL:  # the fuller direction counts
            size = max(num_bytes(first), num_bytes(args[1]))
        else:
            size = num_bytes(first)
        ranks = tuple(dist.get_process_group_ranks(group))
        cost = links.transfer(self.costs.device, what, ranks, size)
        if not cost.seconds:
            return
        axis = self._axis_of(ranks)
        traffic = self.traffic[axis, what, self.subphase]
        traffic.calls += 1
        traffic.buffer_bytes += size
        traffic.bytes_inside += cost.bytes_inside
        traffic.bytes_between += cost.bytes_between
        traffic.seconds += cost.seconds
        self.clock.transfer(cost.seconds, f"{what} ({axis})", cost.link)
