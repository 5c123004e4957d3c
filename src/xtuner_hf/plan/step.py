"""The training step that is observed: what the trainers do between two logs, made of the same pieces.

`TrainingStep` neither knows nor cares whether tensors are fake. trainers/mixin.py is the original; no test holds both
against each other yet.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..attention.ulysses import SequenceRanks
from ..memory.optimizer import StepsInBackward, finish_optimizer, optimizer_class
from ..memory.recompute import set_recompute
from ..models.moe_model import BalanceDefaults
from ..moe.balance import BalanceConfig, LoadBalancer
from ..parallel.grad_norm import clip_grad_norm
from ..parallel.sequence import SequenceParallelModel
from .job import Job
from .tracker import BACKWARD, FORWARD, OPTIMIZER_STEP

Phase = Callable[[str], AbstractContextManager]


def no_phase(name: str) -> AbstractContextManager:
    return contextlib.nullcontext()


class TrainingStep:
    """Steps a sharded model.

    Args:
        model: of this package, sharded, on its device.
        device: that the model computes on.
        ranks: that share this rank's sequences, with `sp_size` above 1.
    """

    def __init__(self, job: Job, model: Any, device: torch.device, ranks: SequenceRanks | None = None):
        self.job, self.model, self.device = job, model, device
        set_recompute(model, job.recompute, offload=job.activation_offload, device=device)
        model.train()
        if job.recompute != "none":
            model.activation_checkpointing_enable()
        self.optimizer = self._make_optimizer()
        self._in_backward: StepsInBackward | None = None
        self.balance = self._attach_balance()
        self._shared = model if ranks is None else SequenceParallelModel(model, ranks)

    def _make_optimizer(self) -> Any:
        args = self.job.optimizer_arguments
        by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                by_mesh[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
        groups = [{"params": parameters} for parameters in by_mesh.values()]
        chosen: Any = optimizer_class(torch.optim.AdamW, args)
        optimizer = chosen(groups, lr=1e-5, fused=True)
        finish_optimizer(optimizer, args, self.model)
        return optimizer

    def _attach_balance(self) -> LoadBalancer:
        defaults = getattr(self.model, "balance_defaults", BalanceDefaults())
        self._bias_update_rate = defaults.bias_update_rate
        config = BalanceConfig(defaults.aux_loss_coef, sequence_loss_coef=defaults.sequence_loss_coef)
        return LoadBalancer.attach(self.model, config)

    def batch(self) -> dict[str, torch.Tensor]:
        """A micro-batch as the collator makes it: all rows in one, their documents apart."""
        documents, device = self.job.documents, self.device
        positions = torch.cat([torch.arange(length, device=device) for length in documents])[None]
        input_ids = torch.randint_like(positions, self.model.config.vocab_size)
        ends = torch.zeros(len(documents) + 1, dtype=torch.int32, device=device)
        torch.cumsum(torch.tensor(documents, device=device), 0, out=ends[1:])
        return {
            "input_ids": input_ids,
            "labels": input_ids.clone(),
            "position_ids": positions,
            "cu_seq_lens_q": ends,
        }

    def run(self, batch: dict[str, torch.Tensor], phase: Phase = no_phase) -> None:
        """One optimizer step over `accumulation` micro-batches, all of them this one."""
        job, balance = self.job, self.balance
        if job.optimizer_in_backward and self._in_backward is None:
            self._in_backward = StepsInBackward(self.optimizer)
        num_tokens = torch.full((), job.tokens_per_rank * job.layout.world_size, dtype=torch.int64, device=self.device)
        balance.start_step(num_tokens, num_tokens)
        # The Switch loss's gradient in the first micro-batch depends on the load in the last.
        counted = job.accumulation > 1 and bool(balance.config.aux_loss_coef)
        if counted:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with phase(FORWARD), torch.no_grad(), balance.recording(), self._autocast():
                for _ in range(job.accumulation):
                    self._shared(**inputs, use_cache=False, logits_to_keep=1)
            balance.reduce()
        for micro_batch in range(job.accumulation):
            with phase(FORWARD), contextlib.nullcontext() if counted else balance.recording():
                loss = self._forward(batch, num_tokens)
            if balance.config.aux_loss_coef and not counted:
                balance.reduce()
            with phase(BACKWARD):
                balance.watch(loss).backward()
            del loss
            if micro_batch == job.accumulation - 1 and not balance.config.aux_loss_coef:
                balance.reduce()
        with phase(OPTIMIZER_STEP):
            self._step_optimizer()

    def _forward(self, batch: dict[str, torch.Tensor], num_items: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            return self._shared(**batch, chunked_loss=True, use_cache=False, num_items_in_batch=num_items).loss

    def _autocast(self) -> AbstractContextManager:
        """As accelerate puts it around a model's forward for `bf16=True`, sharded or not."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.bf16)

    def _step_optimizer(self) -> None:
        if self._in_backward is not None:
            self._in_backward.take_norm()
        else:
            clip_grad_norm(self.model.parameters(), 1.0)
        if self._bias_update_rate:
            self.balance.update_bias(self._bias_update_rate)
        if self._in_backward is None:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def resting(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors that live on between steps: parameters (and buffers), and states of the optimizer on the device
        or on the host."""
        model = [*self.model.parameters(), *self.model.buffers()]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return model, [value for value in states if isinstance(value, torch.Tensor)]
