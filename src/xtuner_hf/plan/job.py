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
from ..models.auto import IMAGE_TEXT_CLASSES, check_has_mtp, model_class, num_experts
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
        recompute, activation_offload, optimizer_states, optimizer_offload, optimizer_in_backward, mtp_loss_coef, fp8:
            as in `MoETrainingArguments`.
        tiles_per_row: of images, whose tokens are part of `seq_len`; of models that read images.
        frozen: parts of such a model that do not train: "vision", "projector", "language".
        adapter: PEFT's `LoraConfig`, where adapters train in place of the model (plan/adapters.py).
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
    tiles_per_row: int = 0
    frozen: tuple[str, ...] = ()
    fp8: bool = False
    adapter: Any = None
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
        if self.fp8 and self.device.fp8_flops is None:
            raise PlanError(f"{self.device.name} has no FP8 products of e4m3: leave fp8 off.")
        if self.fp8 and self.adapter is not None and self.adapter.target_parameters:
            raise PlanError("fp8 has no kernel for adapters on experts: leave one of the two out.")
        self._check_model()

    def _check_model(self) -> None:
        try:
            check_optimizer(self.optimizer_arguments)
            if self.mtp_loss_coef is not None:
                check_has_mtp(model_class(self.config), self.config, self.mtp_loss_coef)
            self.layout.check_experts(self.num_experts)
            if self.layout.sp_size > 1:
                check_heads(self.text_config.num_attention_heads, self.layout.sp_size)
        except ValueError as error:
            raise PlanError(str(error)) from None
        if not self.reads_images:
            if self.tiles_per_row or self.frozen:
                raise PlanError(f"{self.config.model_type} reads no images: leave tiles_per_row and frozen out.")
        elif self.tiles_per_row < 0 or self.image_tokens > self.seq_len:
            raise PlanError(
                f"{self.tiles_per_row} tiles of {self.config.image_seq_length} tokens do not fit into rows of "
                f"{self.seq_len}."
            )

    @property
    def text_config(self) -> Any:
        """Of the language model."""
        return self.config.get_text_config()

    @property
    def reads_images(self) -> bool:
        return self.config.model_type in IMAGE_TEXT_CLASSES

    @property
    def image_tokens(self) -> int:
        """In a row."""
        return self.tiles_per_row * self.config.image_seq_length if self.reads_images else 0

    @property
    def num_experts(self) -> int | None:
        return num_experts(self.config)

    @property
    def expert_choice(self) -> ExpertChoice | None:
        if self.num_experts is None:
            return None
        text = self.text_config
        groups = getattr(text, "n_group", None) or 1
        return ExpertChoice(self.num_experts, groups, getattr(text, "topk_group", None) or groups)

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
    return getattr(config.get_text_config(), "first_k_dense_replace", None) or 0


def with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """A copy of the configuration with the first `number` layers; a vision tower stays as it is."""
    whole = config.to_dict()
    values = whole if config.get_text_config() is config else whole["text_config"]
    values["num_hidden_layers"] = number
    for name in ("layer_types", "mlp_layer_types"):
        if values.get(name):
            values[name] = values[name][:number]
    if values.get("mlp_only_layers"):
        values["mlp_only_layers"] = [layer for layer in values["mlp_only_layers"] if layer < number]
    return type(config).from_dict(whole)
