"""What keeps a long run alive: steps that all ranks skip, steps that all ranks have, a stop that all ranks take.

step begins   all ranks say how many micro-batches they have           one host all-reduce
backward      this rank's loss is watched
norm known    all ranks say: loss finite? norm finite? told to stop?   one device all-reduce
step ends     skipped or taken; checkpoint and exit if told to
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from .watchdog import Watchdog

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient is not a number."""


class UnevenBatchesError(RuntimeError):
    """Ranks with different numbers of batches."""


class StabilityMixin(_Base):
    """Stands in front of a `Trainer` class, before `CheckpointingMixin`, whose group of the hosts it uses."""

    args: Any
    model: Any
    _host_group: Any

    def __init__(self, *positional: Any, **keywords: Any):
        super().__init__(*positional, **keywords)
        self.skipped_steps = 0
        """Optimizer steps that all ranks skipped since this run or its continuation began."""
        self.step_was_skipped = False
        self._skipped_in_a_row = 0
        self._loss_is_finite: torch.Tensor | None = None
        self._stop_requested = threading.Event()
        self._stopping = False
        self._drained: Any = None
        self._watchdog: Watchdog | None = None
        self.add_callback(_StabilityCallback(self))

    # ---- every rank has a batch, or none has ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._drained is epoch_iterator:
            return [], None
        self._beat("waiting for data")
        batches = []
        for batch in epoch_iterator:
            batches.append(batch)
            if len(batches) == num_batches:
                break
        self._beat("in a step")
        fewest, most = self._agree_on_batches(len(batches))
        if fewest != most:
            self._uneven(fewest, most, len(batches))
            batches = []
        if not batches:
            self._drained = epoch_iterator
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _agree_on_batches(self, number: int) -> tuple[int, int]:
        if self._host_group is None:
            return number, number
        extremes = torch.tensor([-number, number])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._host_group)
        return -int(extremes[0]), int(extremes[1])

    def _uneven(self, fewest: int, most: int, own: int) -> None:
        found = (
            f"Before step {self.state.global_step + 1} some ranks have {most} micro-batches left and some {fewest} "
            f"(rank {self.args.process_index} has {own})"
        )
        if self.args.uneven_batches == "error":
            raise UnevenBatchesError(
                f"{found}: going on would hang. Give every rank as much data, or set uneven_batches='drain' to end "
                "the epoch for all ranks where the first one runs out."
            )
        logger.warning("%s: the epoch ends here for all, the rest is dropped.", found)

    # ---- steps that are not numbers ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        finite = torch.isfinite(loss.detach()).all()
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        bad_losses, bad_norms, stops = self._agree_on_step(norm)
        self._stopping = self._stopping or stops > 0
        self.step_was_skipped = bad_losses + bad_norms > 0
        if self.step_was_skipped and self.args.optimizer_in_backward:
            raise NonFiniteError(
                f"Step {self.state.global_step + 1} has a loss or gradient that is not finite, and "
                "optimizer_in_backward has stepped with it already, so it cannot be skipped. Continue from the last "
                "checkpoint with a lower learning_rate, or with optimizer_in_backward=False."
            )
        if self.step_was_skipped and getattr(self.accelerator, "scaler", None) is None:
            self._skip_step(model, bad_losses, norm)
        else:
            self._skipped_in_a_row = 0
        return norm

    def _agree_on_step(self, norm) -> tuple[float, float, float]:
        """How many ranks have a loss that is not finite, a gradient norm that is not, and the wish to stop."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm, device=self.args.device)
        loss_is_finite, self._loss_is_finite = self._loss_is_finite, None
        if loss_is_finite is None:
            loss_is_finite = torch.ones_like(norm, dtype=torch.bool)
        stop = torch.full_like(norm, self._stop_requested.is_set(), dtype=torch.bool)
        flags = torch.stack([~loss_is_finite.to(norm.device), ~torch.isfinite(norm), stop]).float()
        if self._host_group is not None:
            dist.all_reduce(flags)
        bad_losses, bad_norms, stops = flags.tolist()
        return bad_losses, bad_norms, stops

    def _skip_step(self, model, bad_losses: float, norm) -> None:
        """Leave parameters and optimizer state as they are. The schedule goes on: it follows the data used."""
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        found = f"loss not finite on {bad_losses:.0f} rank(s), gradient norm {float(norm):.4g}"
        if self.is_world_process_zero():
            logger.warning("Step %d is skipped on all ranks: %s.", self.state.global_step + 1, found)
        if self._skipped_in_a_row >= self.args.max_skipped_steps:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} optimizer steps in a row were skipped, up to step "
                f"{self.state.global_step + 1} ({found}). Continue from an earlier checkpoint with a lower "
                "learning_rate, look at the data of these steps, or raise max_skipped_steps."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
        super().log(logs, start_time)

    # ---- SIGTERM, and the watchdog ----

    def train(self, *positional, **keywords):
        """As in the parent. After SIGTERM it saves a checkpoint at the end of the step and raises SystemExit(0)."""
        self._stopping = False
        self._stop_requested.clear()
        # Python runs signal handlers in the main thread alone. Without checkpoints there is nothing to do.
        handles = self.args.save_strategy != "no" and threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGTERM, self._on_sigterm) if handles else None
        self._watchdog = Watchdog.start(self.args.watchdog_timeout, self.args.process_index)
        try:
            output = super().train(*positional, **keywords)
        finally:
            self._watchdog.stop()
            if handles:
                signal.signal(signal.SIGTERM, previous)
        if self._stopping:
            logger.warning("Stopped by SIGTERM after step %d; the checkpoint is complete.", self.state.global_step)
            raise SystemExit(0)
        return output

    def _on_sigterm(self, signum, frame) -> None:
        self._stop_requested.set()

    def _beat(self, doing: str) -> None:
        if self._watchdog is not None:
            self._watchdog.beat(f"{doing}, step {self.state.global_step + 1}")


class _StabilityCallback(TrainerCallback):
    """Stops where all ranks agreed to, and tells the watchdog that the run moves."""

    def __init__(self, trainer: StabilityMixin):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._beat("after a step")
        if self._trainer._stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._trainer._stopping:  # saved already; the time until SIGKILL is short
            control.should_save = control.should_evaluate = False

    def on_substep_end(self, args, state, control, **kwargs):
        self._trainer._beat("in a step")

    def on_prediction_step(self, args, state, control, **kwargs):
        self._trainer._beat("in evaluation")

    def on_save(self, args, state, control, **kwargs):
        self._trainer._beat("after saving")
