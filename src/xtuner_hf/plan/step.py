"""The training step that is observed: what the trainers do between two logs, made of the same pieces.

`TrainingStep` neither knows nor cares whether tensors are fake. trainers/mixin.py and the loop of transformers are the
original; tests/plan/test_trainer_step.py holds both against each other, operator by operator, and names what is left
out: bookkeeping on numbers of a few bytes, and the head of `MoESFTTrainer`, which is TRL's (here it is `MoETrainer`'s).
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
from ..parallel.adapters import base_model, is_adapted, sync_replicated_parameters
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
        set_recompute(base_model(model), job.recompute, offload=job.activation_offload, device=device)
        model.train()
        if job.recompute != "none":
            base_model(model).activation_checkpointing_enable()
        self._is_last_micro_batch = True
        if is_adapted(model) and job.layout.world_size > 1:
            sync_replicated_parameters(model, lambda: self._is_last_micro_batch)
        self.optimizer = self._make_optimizer()
        self._in_backward: StepsInBackward | None = None
        self.balance = self._attach_balance()
        self._shared = model if ranks is None else SequenceParallelModel(model, ranks)

    def _make_optimizer(self) -> Any:
        args = self.job.optimizer_arguments
        groups: dict[Any, list[nn.Parameter]] = defaultdict(list)  # one kernel steps those of a mesh that decay
        for parameter in sorted(self.model.parameters(), key=lambda parameter: parameter.ndim < 2):
            if parameter.requires_grad:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                groups[parameter.ndim < 2, mesh].append(parameter)
        chosen: Any = optimizer_class(torch.optim.AdamW, args)
        optimizer = chosen([{"params": group} for group in groups.values()], lr=1e-5, fused=True)
        finish_optimizer(optimizer, args, self.model)
        return optimizer

    def _attach_balance(self) -> LoadBalancer:
        published = getattr(base_model(self.model), "balance_defaults", BalanceDefaults())
        defaults = BalanceDefaults() if "language" in self.job.frozen else published
        self._bias_update_rate = 0.0 if is_adapted(self.model) else defaults.bias_update_rate
        config = BalanceConfig(defaults.aux_loss_coef, sequence_loss_coef=defaults.sequence_loss_coef)
        return LoadBalancer.attach(self.model, config)

    def batch(self) -> dict[str, torch.Tensor]:
        """A micro-batch as the collator makes it: all rows in one, their documents apart."""
        documents, device = self.job.documents, self.device
        positions = torch.cat([torch.arange(length, device=device) for length in documents])[None]
        input_ids = torch.randint_like(positions, self.job.text_config.vocab_size)
        ends = torch.zeros(len(documents) + 1, dtype=torch.int32, device=device)
        torch.cumsum(torch.tensor(documents, device=device), 0, out=ends[1:])
        batch = {
            "input_ids": input_ids,
            "labels": input_ids.clone(),
            "position_ids": positions,
            "cu_seq_lens_q": ends,
        }
        if self.job.reads_images:
            self._show_images(batch)
        return batch

    def _show_images(self, batch: dict[str, torch.Tensor]) -> None:
        """Tiles as the collator gives them; their tokens come first in each row, and have no labels."""
        config, rows = self.job.config, self.job.micro_batch
        input_ids, labels = (batch[name].view(rows, -1) for name in ("input_ids", "labels"))
        input_ids.masked_fill_(input_ids == config.image_token_id, 0)
        input_ids[:, : self.job.image_tokens] = config.image_token_id
        labels[:, : self.job.image_tokens] = -100
        if self.job.tiles_per_row:
            shape = (rows * self.job.tiles_per_row, config.vision_config.num_channels, *config.vision_config.image_size)
            batch["pixel_values"] = torch.zeros(shape, device=self.device)

    def run(self, batch: dict[str, torch.Tensor], phase: Phase = no_phase) -> None:
        """One optimizer step over `accumulation` micro-batches, all of them this one."""
        job, balance = self.job, self.balance
        if job.optimizer_in_backward and self._in_backward is None:
            self._in_backward = StepsInBackward(self.optimizer)
        num_tokens = torch.full((), job.tokens_per_rank * job.layout.world_size, dtype=torch.int64, device=self.device)
        balance.start_step(num_tokens, num_tokens)
        if (fp8 := base_model(self.model).fp8) is not None:
            fp8.new_step()
        # The Switch loss's gradient in the first micro-batch depends on the load in the last.
        counted = job.accumulation > 1 and bool(balance.config.aux_loss_coef)
        if counted:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with phase(FORWARD):
                with torch.no_grad(), balance.recording():
                    for _ in range(job.accumulation):
                        self._call(inputs, logits_to_keep=1)
                balance.reduce()
        for micro_batch in range(job.accumulation):
            self._is_last_micro_batch = micro_batch == job.accumulation - 1
            with phase(FORWARD):
                with contextlib.nullcontext() if counted else balance.recording():
                    loss = self._call(batch, chunked_loss=True, num_items_in_batch=num_tokens).loss
                if balance.config.aux_loss_coef and not counted:
                    balance.reduce()
            if job.layout.dp_replicate_size > 1:  # copies sum up once, shards of a copy after each micro-batch
                base_model(self.model).set_requires_all_reduce(self._is_last_micro_batch)
            with phase(BACKWARD):
                balance.watch(loss).backward()
            del loss
        with phase(OPTIMIZER_STEP):
            if not balance.config.aux_loss_coef:
                balance.reduce()
            self._step_optimizer()

    def _call(self, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        # As accelerate does around a model's forward for `bf16=True`, sharded or not.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.bf16):
            return self._shared(**inputs, **options, use_cache=False)

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
