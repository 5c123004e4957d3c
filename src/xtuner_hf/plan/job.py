"""`Job`: the training run that is planned."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..attention.ulysses import check_heads
from ..memory.optimizer import check_optimizer
from ..memory.recompute import RECOMPUTE_POLICIES
from ..models.auto import causal_lm_class, check_has_mtp, num_experts
from ..parallel.layout import ParallelLayout
from .devices import Device, PlanError
from .expert_loads import ExpertChoice

# What is built once the ranks pass this is no longer a dry run of seconds.
MAX_RANKS = 16384


@dataclass(frozen=True)
class Job:
    """A model, the ranks that train it, and the arguments of training that memory and time depend on.

    Args:
        config: of the model, at full size.
        layout: of the ranks.
        device: of each rank.
        seq_len: tokens of a row; with `sp_size` ranks, of a row that they share.
        document_len: tokens of the documents packed in a row; None for one document a row.
        micro_batch: rows of a rank (of an SP group) at a time.
        accumulation: micro-batches of an optimizer step.
        recompute, activation_offload, optimizer_states, optimizer_offload, optimizer_in_backward, mtp_loss_coef: as in
            `MoETrainingArguments`.
        dtype: of the parameters between steps; computed is in bf16, unless `bf16` is False.
        load: of the observed rank's experts, 1 if all ranks' are chosen as often (EP only).
    """

    config: PreTrainedConfig
    layout: ParallelLayout
    device: Device
    seq_len: int = 4096
    document_len: int | None = None
    micro_batch: int = 1
    accumulation: int = 1
    recompute: str = "full"
    activation_offload: bool = False
    optimizer_states: str = "full"
    optimizer_offload: bool = False
    optimizer_in_backward: bool = False
    mtp_loss_coef: float | None = None
    dtype: torch.dtype = torch.float32
    bf16: bool = True
    load: float = 1.0
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("seq_len", "micro_batch", "accumulation"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.document_len is not None and not 1 <= self.document_len <= self.seq_len:
            raise PlanError(f"documents of {self.document_len} tokens do not fit into rows of {self.seq_len}.")
        if self.layout.world_size > MAX_RANKS:
            raise PlanError(f"{self.layout.world_size} ranks are more than the {MAX_RANKS} that can be simulated.")
        if self.recompute not in RECOMPUTE_POLICIES:
            raise PlanError(f"recompute is {self.recompute!r}; choose one of {', '.join(RECOMPUTE_POLICIES)}.")
        if self.activation_offload and self.recompute == "none":
            raise PlanError("activation_offload moves the inputs of recomputed layers, and recompute is 'none'.")
        if self.optimizer_states == "8bit":
            raise PlanError("optimizer_states='8bit' cannot be simulated: its kernels are compiled on first use.")
        if self.load < 1:
            raise PlanError(f"load is {self.load}; 1 is even, 2 is a rank whose experts are chosen twice as often.")
        self._check_model()

    def _check_model(self) -> None:
        try:
            check_optimizer(self.optimizer_arguments)
            model_class = causal_lm_class(self.config)
            if self.mtp_loss_coef is not None:
                check_has_mtp(model_class, self.config, self.mtp_loss_coef)
            self.layout.check_experts(self.num_experts)
            if self.layout.sp_size > 1:
                check_heads(self.config.num_attention_heads, self.layout.sp_size)
        except ValueError as error:
            raise PlanError(str(error)) from None

    @property
    def num_experts(self) -> int | None:
        return num_experts(self.config)

    @property
    def expert_choice(self) -> ExpertChoice | None:
        if self.num_experts is None:
            return None
        groups = getattr(self.config, "n_group", None) or 1
        return ExpertChoice(self.num_experts, groups, getattr(self.config, "topk_group", None) or groups)

    @property
    def documents(self) -> list[int]:
        """Tokens of each document of a micro-batch."""
        length = self.document_len or self.seq_len
        number, rest = divmod(self.seq_len, length)
        return ([length] * number + [rest] * bool(rest)) * self.micro_batch

    @property
    def tokens_per_rank(self) -> float:
        """Of an optimizer step."""
        return self.micro_batch * self.accumulation * self.seq_len / self.layout.sp_size

    @property
    def optimizer_arguments(self) -> SimpleNamespace:
        """What memory/optimizer.py reads of a trainer's arguments."""
        in_backward = self.optimizer_in_backward
        return SimpleNamespace(
            optim="adamw_torch_fused",
            optimizer_states=self.optimizer_states,
            optimizer_offload=self.optimizer_offload,
            optimizer_in_backward=in_backward,
            max_grad_norm=0.0 if in_backward else 1.0,
            gradient_accumulation_steps=self.accumulation,
            fp16=False,
        )

    def with_layers(self, number: int) -> Job:
        """The same job with a model of fewer layers."""
        return replace(self, config=with_layers(self.config, number))


def num_dense_layers(config: PreTrainedConfig) -> int:
    """Layers without experts at the bottom of the stack."""
    return getattr(config, "first_k_dense_replace", None) or 0


def with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """A copy of the configuration with the first `number` layers."""
    values = config.to_dict()
    values["num_hidden_layers"] = number
    for name in ("layer_types", "mlp_layer_types"):
        if values.get(name):
            values[name] = values[name][:number]
    if values.get("mlp_only_layers"):
        values["mlp_only_layers"] = [layer for layer in values["mlp_only_layers"] if layer < number]
    return type(config).from_dict(values)
