"""Optimizers that need less of the device: states that rest small or on the host, steps inside backward.

    optimizer step   parameter 1 | parameter 2 | parameter 3
    states in          of 2      |   of 3      |
    states out                   |   of 1      |   of 2

Any torch optimizer steps one parameter at a time here, with its own kernels and its states in the parameter's dtype.
Between steps the states rest in bf16, in pinned host memory, or both; those of the next parameter come while one is
stepped. Gradients never move, so clipping, accumulation, FSDP2 and expert parallelism are none the wiser.

torchao's `CPUOffloadOptimizer` copies gradients to the host as backward makes them, before they can be clipped, and is
for one CUDA device; FSDP2's `CPUOffloadPolicy` moves parameters and gradients too and steps on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..device import CopyStream
from ..parallel.shard import local_part

OPTIMIZER_STATES = ("full", "bf16", "8bit")
_TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
_TORCHAO_ADAMW = "adamw_torch_8bit"


def check_optimizer(args: Any) -> None:
    """Refuse what cannot be, and turn `optimizer_states="8bit"` into transformers' name for torchao's optimizer.

    Args:
        args: of a trainer of ours, before its parent's `__post_init__`.
    """
    if args.optimizer_states not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer_states is {args.optimizer_states!r}; choose one of {', '.join(OPTIMIZER_STATES)}.")
    optim = getattr(args.optim, "value", args.optim)
    if args.optimizer_states == "8bit":
        if args.optimizer_offload:
            raise ValueError(
                "optimizer_offload moves states of 'full' or 'bf16', and optimizer_states is '8bit' (2 bytes a "
                "parameter): choose one of the two."
            )
        if optim not in (*_TORCH_ADAMW, _TORCHAO_ADAMW):
            raise ValueError(f"optimizer_states='8bit' is torchao's AdamW8bit, but optim is {optim!r}; leave it out.")
        args.optim = _TORCHAO_ADAMW
    elif (args.optimizer_states == "bf16" or args.optimizer_offload) and optim not in _TORCH_ADAMW:
        raise ValueError(
            f"optimizer_states='bf16' and optimizer_offload are for torch's AdamW, but optim is {optim!r}; choose "
            f"one of {', '.join(_TORCH_ADAMW)}."
        )
    if args.optimizer_in_backward:
        _check_in_backward(args)


def _check_in_backward(args: Any) -> None:
    if args.max_grad_norm:
        raise ValueError(
            f"optimizer_in_backward steps a parameter before the other gradients exist, so their norm cannot be known, "
            f"and max_grad_norm is {args.max_grad_norm}: set it to 0, or optimizer_in_backward=False."
        )
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"optimizer_in_backward steps after each backward, and gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}: set it to 1 with larger batches, or optimizer_in_backward=False."
        )
    if args.fp16:
        raise ValueError("optimizer_in_backward cannot unscale fp16 gradients first: train in bf16.")


def optimizer_class(base: type[Optimizer], args: Any) -> type[Optimizer]:
    """The optimizer class of a trainer whose arguments ask for any of this; otherwise the one it would have had."""
    if args.optimizer_states == "8bit":
        return type(base.__name__, (QuantizedStep, base), {})
    rest_dtype = torch.bfloat16 if args.optimizer_states == "bf16" else None
    if rest_dtype is None and not args.optimizer_offload and not args.optimizer_in_backward:
        return base
    namespace = {"rest_dtype": rest_dtype, "on_host": args.optimizer_offload}
    return type(base.__name__, (ParameterStep, base), namespace)


def finish_optimizer(optimizer: Optimizer, args: Any, model: nn.Module) -> None:
    """What is left to do once a trainer has made its optimizer; refuses one that it was given, where ours is wanted."""
    wants = args.optimizer_in_backward or args.optimizer_offload or args.optimizer_states != "full"
    if wants and not isinstance(optimizer, ParameterStep):
        raise ValueError(
            "optimizer_states, optimizer_offload and optimizer_in_backward change the optimizer that the trainer makes,"
            f" but a {type(optimizer).__name__} was given: drop `optimizers`, or leave these arguments out."
        )
    if isinstance(optimizer, QuantizedStep):
        optimizer.keep_in_full({m.weight for m in model.modules() if isinstance(m, nn.Embedding)})


class ParameterStep(Optimizer):
    """Stands in front of an optimizer class: steps one parameter at a time, whose states rest elsewhere in between.

    Attributes:
        rest_dtype: what states of the parameter's shape rest in; None for the dtype they have.
        on_host: whether they rest in host memory.
    """

    rest_dtype: torch.dtype | None = None
    on_host: bool = False

    def __init__(self, *positional: Any, **keywords: Any):
        super().__init__(*positional, **keywords)
        # Made at the first step: Accelerate shards and moves parameters after the optimizer is made.
        self.to_host: Any = None  # CopyStream
        self.to_device: Any = None
        self._numbers: dict[torch.Tensor, int] = {}
        # Learnt from the last step: backward's order is not that of the parameters.
        self._successor: dict[torch.Tensor, torch.Tensor] = {}
        self._last: torch.Tensor | None = None
        self._host: dict[torch.Tensor, dict[str, torch.Tensor]] = {}  # where the states of each parameter rest
        # What is being copied stays alive until the computation has waited for it.
        self._coming: dict[torch.Tensor, list[tuple[str, torch.Tensor, Any]]] = {}
        self._leaving: list[tuple[torch.Tensor, Any]] = []

    def parameters(self) -> Iterator[torch.Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def number_of(self, parameter: torch.Tensor) -> int:
        """Its place among all parameters, the same on all ranks and in a run that goes on."""
        if parameter not in self._numbers:
            self._numbers = {each: i for i, each in enumerate(self.parameters())}
        return self._numbers[parameter]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_parameter(group, parameter)
            if self.rest_dtype is not None:
                group["rounding_step"] = group.get("rounding_step", 0) + 1
        self._settle()
        return loss

    @torch.no_grad()
    def step_parameter(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        """Step one parameter of a group, which must have a gradient."""
        number = self.number_of(parameter)  # of all groups, before the others are hidden
        self._make_streams(parameter)
        self._bring(parameter)
        if self._last is not None:
            self._successor[self._last] = parameter
        self._last = parameter
        successor = self._successor.get(parameter)
        if successor is not None and successor not in self._coming:
            self._fetch(successor)
        groups = self.param_groups
        self.param_groups = [{**group, "params": [parameter]}]
        try:
            super().step()
        finally:
            self.param_groups = groups
        self._put_to_rest(parameter, group.get("rounding_step", 0) * len(self._numbers) + number)

    def _make_streams(self, parameter: torch.Tensor) -> None:
        if self.to_host is None:
            self.to_host, self.to_device = CopyStream(parameter.device), CopyStream(parameter.device)

    # ---- where states are ----

    def _resting(self, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The states that move and change dtype: those of the parameter's shape, not its count of steps."""
        if self.rest_dtype is None and not self.on_host:
            return []
        state = self.state.get(parameter, {})
        return [
            (name, value)
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and value.ndim and value.shape == parameter.shape
        ]

    def _fetch(self, parameter: torch.Tensor) -> None:
        coming = self._coming[parameter] = []
        for name, resting in self._resting(parameter):
            if not self.on_host:
                coming.append((name, resting, None))
                continue
            here = torch.empty_like(parameter, dtype=resting.dtype)
            coming.append((name, here, self.to_device.copy_(local_part(here), local_part(resting))))

    def _bring(self, parameter: torch.Tensor) -> None:
        if parameter not in self._coming:
            self._fetch(parameter)
        for name, here, arrived in self._coming.pop(parameter):
            self.to_device.wait(arrived)
            self.state[parameter][name] = here.to(parameter.dtype)

    def _put_to_rest(self, parameter: torch.Tensor, seed: int) -> None:
        """Round its states, start their way to the host, and let those of the parameter before go.

        Args:
            seed: of step and parameter alone, so that ranks which hold copies round alike, and a run that goes on too.
        """
        before, self._leaving = self._leaving, []
        generator = torch.Generator(parameter.device).manual_seed(seed) if self.rest_dtype is not None else None
        for name, value in self._resting(parameter):
            if generator is not None and value.dtype != torch.bfloat16:
                rounded = torch.empty_like(value, dtype=torch.bfloat16)
                local_part(rounded).copy_(stochastic_bf16(local_part(value).float(), generator))
                value = rounded
            if self.on_host:
                hosts = self._host.setdefault(parameter, {})
                if name not in hosts:
                    hosts[name] = self.to_host.host_like(value)
                self._leaving.append((value, self.to_host.copy_(local_part(hosts[name]), local_part(value))))
                value = hosts[name]
            self.state[parameter][name] = value
        for _, left in before:
            self.to_host.wait(left)

    def _settle(self) -> None:
        """After the last parameter: wait for what is under way, then let go of it."""
        for _, left in self._leaving:
            self.to_host.wait(left)
        for coming in self._coming.values():  # fetched for a parameter that had no gradient this time
            for _, _, arrived in coming:
                self.to_device.wait(arrived)
        self._leaving, self._coming, self._last = [], {}, None

    def state_dict(self):
        self._settle()
        if self.to_host is not None:
            self.to_host.synchronize()  # whoever reads the states on the host knows of no stream
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        for parameter in self.parameters():
            self._make_streams(parameter)
            self._put_to_rest(parameter, seed=0)
        self._settle()


class QuantizedStep(ParameterStep):
    """The same in front of torchao's optimizers, with embeddings' states in full.

    Most rows of an embedding have no gradient in a step; next to those that have one, 8 bits round their second moment
    to zero but not their first, and the quotient explodes (arXiv 2110.02861, section 2.3; bitsandbytes does the same).
    """

    def __init__(self, *positional: Any, **keywords: Any):
        self.in_full: set[int] = set()
        super().__init__(*positional, **keywords)

    def keep_in_full(self, parameters: set[torch.Tensor]) -> None:
        self.in_full = {self.number_of(parameter) for parameter in self.parameters() if parameter in parameters}

    @torch.no_grad()
    def step_parameter(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        if self.number_of(parameter) not in self.in_full:
            super().step_parameter(group, parameter)
            return
        # By torch's own function: torchao's compiled one takes a state in full for one in 8 bits of the same shape.
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            [parameter],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def stochastic_bf16(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 -> bf16, up or down with the probability that makes the mean right (arXiv 2010.06192).

    AdamW's second moment with beta2 = 0.999 changes by less than half a bf16 step at a time; rounded to the nearest it
    would stand still.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # The upper half of an fp32 number is a bf16 one; noise in the lower half carries over as often as it is large.
    bits = noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


class StepsInBackward:
    """Until `remove()`, each parameter is stepped as soon as its gradient is whole, and the gradient freed.

    Args:
        optimizer: of a class made by `optimizer_class`, over parameters that are sharded already.
    """

    def __init__(self, optimizer: ParameterStep):
        self.optimizer = optimizer
        self._group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._handles = [p.register_post_accumulate_grad_hook(self._step) for p in self._group_of if p.requires_grad]
        # Of the local shards, by where they lie.
        self._squares: dict[tuple, torch.Tensor] = {}

    def _step(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        place: tuple = ()
        if isinstance(grad, DTensor):
            place = (grad.device_mesh, tuple(isinstance(placement, Replicate) for placement in grad.placements))
        dtype = torch.promote_types(grad.dtype, torch.float32)
        square = torch.linalg.vector_norm(local_part(grad), dtype=dtype).square()
        self._squares[place] = self._squares[place] + square if place in self._squares else square
        self.optimizer.step_parameter(self.optimizer.param_groups[self._group_of[parameter]], parameter)
        parameter.grad = None

    def take_norm(self) -> torch.Tensor:
        """L2 norm of all gradients since the last call, scalar; every rank must call it. Too late to clip by."""
        total = torch.zeros((), device=next(self.optimizer.parameters()).device)
        for place, square in self._squares.items():
            if place:
                mesh, replicated = place
                placements = [Replicate() if whole else Partial() for whole in replicated]
                square = DTensor.from_local(square, mesh, placements, run_check=False).full_tensor()
            total = total + square
        self._squares = {}
        return total.sqrt()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
