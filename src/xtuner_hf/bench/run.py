"""One case of the benchmark: a layer stack trained for some steps by a trainer, each part of the step timed.

Ours runs `MoETrainer` on one packed row of documents; stock runs transformers' `Trainer` on the same documents, one a
row, with its own experts implementations. Both have bf16 parameters, the same optimizer and the same tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM as StockModel
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from .._compat import use_one_device
from ..data.collator import PackedCollator
from ..device import is_host, synchronize
from ..models.auto import AutoModelForCausalLM
from ..models.flops import TrainingFlops
from ..moe.routing import Routing
from ..trainers.arguments import MoETrainingArguments
from ..trainers.trainer import MoETrainer
from .shapes import VOCABULARY, Shape

# What a case can compare: (ours?, the name of an experts implementation, further arguments of the trainer).
VARIANTS: dict[str, tuple[bool, str, dict[str, Any]]] = {
    "ours": (True, "auto", {}),
    "ours compiled": (True, "auto", {"compile_blocks": True}),
    "ours fp8": (True, "auto", {"fp8": True}),
    "ours step by step": (True, "grouped_mm", {}),
    "stock grouped_mm": (False, "grouped_mm", {}),
    "stock sonicmoe": (False, "sonicmoe", {}),
}
# Stock does not balance the load by default; its work is left out on both sides.
NO_BALANCE = {"router_aux_loss_coef": 0.0, "router_sequence_loss_coef": 0.0, "router_bias_update_rate": 0.0}


@dataclass(frozen=True)
class Case:
    """Args:
    tokens: of a micro-batch, in documents of `length`.
    routing: "real", what the routers choose, or "balanced", the same number of tokens for each expert.
    """

    shape: str
    variant: str
    length: int
    tokens: int
    routing: str
    recompute: str


class StepClock(TrainerCallback):
    """Seconds of each part of each optimizer step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, float]] = []
        self._started = 0.0

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def add(self, part: str, seconds: float) -> None:
        self.steps[-1][part] = self.steps[-1].get(part, 0.0) + seconds

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append({})
        self._started = self.now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._optimizer_started = self.now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.add("optimizer", self.now() - self._optimizer_started)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[-1]["step"] = self.now() - self._started


class _Timed:
    """In front of a trainer class: times the forward and the backward pass of its step."""

    clock: StepClock

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        started = self.clock.now()
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        self.clock.add("forward", self.clock.now() - started)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        started, before = self.clock.now(), self.clock.steps[-1].get("forward", 0.0)
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        forward = self.clock.steps[-1]["forward"] - before
        self.clock.add("backward", self.clock.now() - started - forward)
        return loss


class TimedMoETrainer(_Timed, MoETrainer):
    pass


class TimedTrainer(_Timed, Trainer):
    pass


def measure(case: Case, shape: Shape, device: torch.device, *, steps: int, warmup: int) -> dict[str, Any]:
    """Figures of one case: medians over the steps after the first `warmup`.

    Returns:
        `seconds` by part of the step, `tokens_per_second` and `model_tflops` (both of the whole step and of forward
        and backward alone), `peak_gigabytes`, `largest_load` (of an expert, over the mean).
    """
    ours, experts, extra = VARIANTS[case.variant]
    set_seed(0)
    config = shape.config()
    if not ours:
        config._experts_implementation = experts
    dtype = torch.float32 if is_host(device) else torch.bfloat16
    model_class: Any = AutoModelForCausalLM if ours else StockModel
    with torch.device(device):
        model = model_class.from_config(config, dtype=dtype)
    flops = TrainingFlops.of_model(_reference_model(shape))
    clock, loads = StepClock(device), Loads(model, balanced=case.routing == "balanced")
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": warmup + steps,
            "learning_rate": 1e-5,
            "logging_steps": warmup + steps,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": is_host(device),
            "bf16": False,
            "gradient_checkpointing": case.recompute == "full",
        }
        documents = _documents(case, warmup + steps)
        if ours:
            options: dict[str, Any] = {"experts_kernel": experts, **NO_BALANCE, **extra}
            args: Any = MoETrainingArguments(**common, per_device_train_batch_size=_rows(case), **options)
            use_one_device(args)
            collator: Any = PackedCollator(pad_token_id=0, padding_free=True)
            trainer: Any = TimedMoETrainer(
                model=model, args=args, train_dataset=documents, data_collator=collator, callbacks=[clock]
            )
        else:
            args = TrainingArguments(**common, per_device_train_batch_size=_rows(case))
            use_one_device(args)
            trainer = TimedTrainer(model=model, args=args, train_dataset=documents, callbacks=[clock])
        trainer.clock = clock
        if not is_host(device):
            torch.get_device_module(device).reset_peak_memory_stats(device)
        trainer.train()
    return asdict(case) | _figures(case, clock.steps[warmup:], flops, loads, device)


def _peak_bytes(device: torch.device) -> int:
    return torch.get_device_module(device).max_memory_allocated(device)


def _figures(case: Case, timed: list[dict[str, float]], flops: TrainingFlops, loads: Loads, device) -> dict[str, Any]:
    seconds = {part: statistics.median(step[part] for step in timed) for part in timed[0]}
    work = flops(case.tokens, case.tokens * case.length)
    passes = seconds["forward"] + seconds["backward"]
    return {
        "seconds": seconds,
        "tokens_per_second": case.tokens / seconds["step"],
        "tokens_per_second_of_passes": case.tokens / passes,
        "model_tflops": work / seconds["step"] / 1e12,
        "model_tflops_of_passes": work / passes / 1e12,
        "peak_gigabytes": None if is_host(device) else _peak_bytes(device) / 1e9,
        "largest_load": loads.largest(),
    }


def _reference_model(shape: Shape) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape.config())


def _rows(case: Case) -> int:
    if case.tokens % case.length:
        raise ValueError(f"tokens {case.tokens} must be whole documents of length {case.length}.")
    return case.tokens // case.length


def _documents(case: Case, steps: int) -> Dataset:
    """Tokens by Zipf's law, as those of texts roughly are: a router sees the same ones again and again."""
    generator = torch.Generator().manual_seed(0)
    odds = 1 / torch.arange(1, VOCABULARY - 1, dtype=torch.float64)
    shape = (steps * _rows(case), case.length)
    tokens = torch.multinomial(odds, shape[0] * shape[1], replacement=True, generator=generator) + 2
    rows = tokens.view(shape).numpy()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


class Loads:
    """Watches every router of a model, and with `balanced` gives each expert the same number of tokens."""

    def __init__(self, model: nn.Module, balanced: bool):
        self._balanced = balanced
        self._largest: list[torch.Tensor] = []
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias") or type(module).__name__.endswith(("Router", "TopkRouter")):
                module.register_forward_hook(self._after_router)

    def _after_router(self, router: nn.Module, inputs: Any, output: Any) -> Any:
        parts = list(output)
        place = next((i for i, part in enumerate(parts) if not part.is_floating_point()), None)
        if place is None:
            raise TypeError(f"{type(router).__name__} returns no ids of experts: its load cannot be watched.")
        ids_TK, logits_TE = parts[place], max(parts, key=lambda part: part.shape[-1])
        num_experts = logits_TE.shape[-1]
        if self._balanced:
            slots = torch.arange(ids_TK.numel(), device=ids_TK.device)
            ids_TK = parts[place] = (slots % num_experts).view_as(ids_TK).to(ids_TK.dtype)
        if not self._largest:
            ones = torch.ones_like(ids_TK, dtype=torch.float32).reshape(-1)
            counts_E = ones.new_zeros(num_experts).scatter_add_(0, ids_TK.reshape(-1).long(), ones)
            self._largest.append(counts_E.max() / counts_E.mean())
        return Routing(*parts) if isinstance(output, Routing) else tuple(parts)

    def largest(self) -> float:
        """The most tokens of an expert over the mean, in the first layer's first pass."""
        return self._largest[0].item()
