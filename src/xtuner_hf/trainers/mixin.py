"""What our trainers share: sharding, the step over a global batch, balance of the experts, and reporting."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers import ProgressCallback as BarCallback

from .. import __version__
from ..checkpoint.model_card import correct_card
from ..memory.optimizer import StepsInBackward, finish_optimizer, optimizer_class
from ..models.moe_model import BalanceDefaults
from ..moe.balance import BalanceConfig, LoadBalancer
from ..moe.replay import freeze_routers
from ..moe.tokens import TokenLayout
from ..parallel.adapters import base_model, is_adapted, place_adapters
from .arguments import MoEArguments
from .checkpointing import CheckpointingMixin
from .figure import FIGURE_FILE, draw_training
from .history import HISTORY_FILE, HistoryCallback
from .loss_weighting import LossWeightingMixin
from .planning import announce_plan
from .progress import ProgressLineCallback
from .sequence import SequenceParallelMixin
from .setup import check_dataset, check_output_dir, prepare_model
from .sharding import ShardingMixin
from .stability import StabilityMixin
from .throughput import ThroughputMeter
from .vision import freeze_parts, num_tiles, set_learning_rates

logger = logging.getLogger(__name__)


class MoETrainerMixin(LossWeightingMixin, StabilityMixin, CheckpointingMixin, SequenceParallelMixin, ShardingMixin):
    """Stands in front of a `Trainer` class in the bases of a trainer.

    One optimizer step:

        get_batch_samples   fetch all micro-batches, count their real tokens and documents over all ranks
        count pass          only with accumulation and a Switch loss: forward all of them without gradient
        training_step       each micro-batch: forward (counted), reduce the counts, backward
        _get_grad_norm      gradients are clipped; skip the step on all ranks if it is not finite (stability.py), or
                            update the correction bias
        log                 tokens/s, MFU and the load of the experts in this step
    """

    args: Any
    model: Any

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, **keywords: Any):
        if not isinstance(args, MoEArguments):
            raise TypeError(
                f"{type(self).__name__} needs its own arguments class, got {type(args).__name__}: it has the fields "
                "of its parent's, plus ep_size and the router_* ones."
            )
        for name in ("train_dataset", "eval_dataset"):
            check_dataset(keywords.get(name), name)
        training_args: Any = args  # one of the two classes that join ours with transformers' or TRL's
        super().__init__(prepare_model(model, args), training_args, *positional, **keywords)
        place_adapters(self.model, self.args.world_size)
        freeze_parts(self.model, args)
        if args.freeze_router:
            freeze_routers(self.model)
        self._batches: list[dict] = []
        self._micro_batch = 0
        self._counted = False
        self._meter: ThroughputMeter | None = None
        self._balance = self._attach_balance()
        self._add_reporting()

    # ---- set-up ----

    def _attach_balance(self) -> LoadBalancer:
        args, config = self.args, self.model.config.get_text_config()
        published = BalanceDefaults()
        if not args.freeze_language:
            published = getattr(self.model, "balance_defaults", published)

        def chosen(value: float | None, default: float) -> float:
            return default if value is None else value

        adapted = is_adapted(self.model)
        self._bias_update_rate = chosen(args.router_bias_update_rate, 0.0 if adapted else published.bias_update_rate)
        if adapted and self._bias_update_rate:
            logger.warning(
                "router_bias_update_rate moves correction biases of the base model, which a saved adapter does not "
                "hold: leave it at 0, or export with save_merged_model()."
            )
        balance = LoadBalancer.attach(
            self.model,
            BalanceConfig(
                chosen(args.router_aux_loss_coef, published.aux_loss_coef),
                args.router_z_loss_coef,
                chosen(args.router_sequence_loss_coef, published.sequence_loss_coef),
            ),
        )
        if self._bias_update_rate:
            lacking = [name for name, router in balance.routers.items() if router.e_score_correction_bias is None]
            if lacking or not balance.routers:
                raise ValueError(
                    f"router_bias_update_rate is {self._bias_update_rate}, but the routers of this "
                    f"{config.model_type} have no correction bias (none in its Hub layout). Set it to 0 and use "
                    "router_aux_loss_coef, or build the model with config.router_correction_bias=True, knowing that "
                    "engines which serve this family route without it."
                )
        return balance

    def _add_reporting(self) -> None:
        for callback in (PrinterCallback, BarCallback):
            self.remove_callback(callback)
        self._history = HistoryCallback()
        self.add_callback(self._history)
        self.add_callback(ProgressLineCallback())
        self.add_callback(_StepEnd(self._end_step))
        self._steps_in_backward: StepsInBackward | None = None

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        base, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class(base, args), keywords

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        set_learning_rates(optimizer, self.model, self.args)
        finish_optimizer(optimizer, self.args, self.model)
        return optimizer

    # ---- one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._meter is not None:
            self._meter.start()
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._start_step(batches, device)
        return batches, num_items_in_batch

    def _start_step(self, batches: list[dict], device: torch.device) -> None:
        layouts = [TokenLayout.of_batch(self._model_inputs(batch)) for batch in batches]
        totals = torch.stack([layout.totals() for layout in layouts]).sum(0)
        tiles = sum(map(num_tiles, batches))
        self._totals = self.sum_over_batches(torch.cat([totals, totals.new_tensor([tiles])]).to(device))
        self._balance.start_step(self._totals[0], self._totals[1])
        if (fp8 := base_model(self.model).fp8) is not None:
            fp8.new_step()
        if self.args.print_plan and self.state.global_step == 0 and self.is_world_process_zero():
            announce_plan(self.model, self.args, batches)
        self._batches, self._micro_batch, self._counted = batches, 0, False

    def _model_inputs(self, batch: dict) -> dict:
        """What of a micro-batch a forward pass without labels takes."""
        return {key: value for key, value in batch.items() if "labels" not in key}

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.optimizer_in_backward and self._steps_in_backward is None:  # sharded and resumed by now
            self._steps_in_backward = StepsInBackward(self.optimizer.optimizer)
        # The Switch loss's gradient in the first micro-batch depends on the load in the last.
        if self._micro_batch == 0 and len(self._batches) > 1 and self._balance.config.aux_loss_coef:
            self._count_pass(model)
        share = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batch += 1
        if self._micro_batch == len(self._batches):
            self._reduce_counts()
        # The parent logs the mean over ranks; the loss is the sum of the batches' shares.
        return share * (self.accelerator.num_processes // self.args.sp_size)

    def _count_pass(self, model) -> None:
        """Learn the experts' load of the whole step before the first backward needs it."""
        model.train()
        with torch.no_grad(), self._balance.recording(), self.compute_loss_context_manager():
            for batch in self._batches:
                inputs: Any = self._prepare_input(self._model_inputs(batch))
                self.shared(model)(**inputs, use_cache=False, logits_to_keep=1)
        self._reduce_counts()

    def _get_grad_norm(self, model, grad_norm=None):
        if self._steps_in_backward is not None:
            grad_norm = self._steps_in_backward.take_norm()
        norm = super()._get_grad_norm(model, grad_norm)
        if self._bias_update_rate and not self.step_was_skipped:
            self._balance.update_bias(self._bias_update_rate)
        return norm

    def _end_step(self) -> None:
        if self._meter is not None:
            self._meter.stop(self._totals)

    def _reduce_counts(self) -> None:
        if not self._counted:
            self._balance.reduce()
            self._counted = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model, inputs = self.weigh(self.shared(model), inputs, num_items_in_batch)
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        with contextlib.nullcontext() if self._counted else self._balance.recording():
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._balance.config.aux_loss_coef:
            self._reduce_counts()  # before this micro-batch's backward
        loss, *outputs = result if return_outputs else (result,)
        # The parent expects gradients to be averaged over ranks and multiplies by their number; here they are summed.
        loss = self._balance.watch(loss / self.accelerator.num_processes)
        return (loss, *outputs) if return_outputs else loss

    def _evaluation_loss(self, model, inputs, return_outputs, num_items_in_batch):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None or self.args.sp_size == 1:
            return result
        # Labels are counted for the mean over ranks, of which only one in `sp_size` has a batch.
        loss, *outputs = result if return_outputs else (result,)
        return (loss / self.args.sp_size, *outputs) if return_outputs else loss / self.args.sp_size

    # ---- a run ----

    def train(self, resume_from_checkpoint=None, *positional, **keywords):
        asked, resume_from_checkpoint = resume_from_checkpoint, self.checkpoint_to_resume(resume_from_checkpoint)
        if self._meter is None:  # a second train() of the same trainer goes on in its own folder
            check_output_dir(self.args.output_dir, resuming=bool(asked))
            self.accelerator.wait_for_everyone()
            self._meter = ThroughputMeter(self.model, self.args.device, self.accelerator.num_processes)
        try:
            output = super().train(resume_from_checkpoint, *positional, **keywords)
        finally:
            if self._steps_in_backward is not None:  # a backward of somebody else's is not ours to step
                self._steps_in_backward.remove()
                self._steps_in_backward = None
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            draw_training(folder / HISTORY_FILE, folder / FIGURE_FILE)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._meter is not None:
            logs |= self._meter.logs()
            load = self._balance.metrics()
            if load is not None:
                logs |= load.logs()
                self._history.record_load(load.load_LE)
        super().log(logs, start_time)

    # ---- what a run hands out ----

    def create_model_card(self, *positional: Any, **keywords: Any) -> None:
        """As the parent's, with what it guesses about the weights' and the data's origins put right."""
        super().create_model_card(*positional, **keywords)
        if not self.is_world_process_zero():
            return
        said = inspect.signature(super().create_model_card).bind(*positional, **keywords).arguments
        classes = type(self).__mro__
        ours = next(cls for cls in classes if cls.__module__.startswith(f"{__package__}."))
        behind = classes[classes.index(MoETrainerMixin) :]
        parent = next(cls for cls in behind if not cls.__module__.startswith(f"{__package__}."))
        correct_card(
            Path(self.args.output_dir) / "README.md",
            trainer=ours.__name__,
            parent=f"{parent.__module__.split('.')[0]}.{parent.__name__}",
            version=__version__,
            loaded_from=said.get("finetuned_from") or base_model(self.model).loaded_from,
            data_is_named=any(said.get(name) for name in ("dataset", "dataset_name", "dataset_tags")),
            pushed=self.hub_model_id is not None,
        )


class _StepEnd(TrainerCallback):
    """Calls back where the optimizer's step ends, before logging, evaluation and saving."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()
