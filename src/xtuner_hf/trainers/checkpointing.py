"""Checkpoints of a training run: when they are written, what is in them, and how a run goes on from one.

    checkpoint-N/
      checkpoint.json          complete; facts that the next run checks (checkpoint/folder.py)
      dcp/                     model and optimizer, sharded (checkpoint/resume.py)
      optimizer_groups.pt      learning rates and other hyperparameters
      scheduler.pt             learning rate schedule
      rng_state_R.pth          random number generators of each rank (rng_state.pth in a job of one process)
      progress_R.pt            each rank's loss since the last log
      trainer_state.json       step, epoch, log history, callbacks: as in transformers
      config.json, tokenizer   what `xtuner-hf convert` needs to make a Hub checkpoint of it

The data position is the step: the next run skips as many rows, in the sampler's order, as the steps so far have used.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy

from ..checkpoint import folder as folders
from ..checkpoint.adapter import export_merged, write_adapter, write_adapter_config
from ..checkpoint.export import export_to_hub, write_configs
from ..checkpoint.folder import CheckpointError
from ..checkpoint.resume import (
    GROUPS_FILE,
    AsyncSaver,
    load_model,
    load_optimizer,
    optimizer_groups,
    training_state,
)
from ..device import HOST_COLLECTIVES
from ..models.base import HubModelMixin
from ..parallel.adapters import base_model, is_adapted

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

# Writing a shard may take its time; a rank that never comes is the watchdog's business.
_TIMEOUT = timedelta(hours=2)
_TRAINER_STATE, _SCHEDULER, _ARGUMENTS = "trainer_state.json", "scheduler.pt", "training_args.bin"


class CheckpointingMixin(_Base):
    """Stands in front of a `Trainer` class; takes the place of its saving and loading."""

    args: Any
    model: Any
    lr_scheduler: Any
    state: Any

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, **keywords: Any):
        if args.push_to_hub:
            _push_at_the_end(args)
        if getattr(args, "enable_jit_checkpoint", False):
            raise ValueError("enable_jit_checkpoint is not needed: this trainer saves on SIGTERM by itself. Drop it.")
        # transformers refuses checkpoints of models that it sharded at load unless they hold only the model. Ours hold
        # all; the argument gets its value back at once.
        save_only_model, args.save_only_model = args.save_only_model, True
        try:
            super().__init__(model, args, *positional, **keywords)
        finally:
            args.save_only_model = save_only_model
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # One for this thread, one for the thread that writes: collectives of two threads must not share a group.
        self._host_group = dist.new_group(backend=HOST_COLLECTIVES, timeout=_TIMEOUT) if distributed else None
        self._saver = AsyncSaver(dist.new_group(backend=HOST_COLLECTIVES, timeout=_TIMEOUT) if distributed else None)
        self.add_callback(_RestoreProgress(self))
        self._progress: dict[str, Any] | None = None

    @property
    def host_group(self) -> dist.ProcessGroup | None:
        """Gloo group of all ranks, for what happens in host memory; None in a job of one process."""
        return self._host_group

    # ---- writing ----

    def _save_checkpoint(self, model, trial) -> None:
        """Start a checkpoint of the step that just ended; it is complete some time later."""
        self.wait_for_checkpoint()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == final or folders.read_facts(best) is not None):
            self.state.best_model_checkpoint = str(best)
        folder = self._begin(final)
        if self.args.save_only_model:
            self.save_model(str(folder), _internal_call=True)
            state = {}
        else:
            self._save_rank_state(folder)
            state = training_state(self.model, _unwrapped(self.optimizer))
        if self.is_world_process_zero():
            if not self.args.save_only_model:
                self._save_shared_state(folder)
            self._note_callbacks()
            self.state.save_to_json(str(folder / _TRAINER_STATE))
        self._barrier()  # what all ranks wrote besides the shards is there
        self._saver.start(state, folder, self._completion(folder, final))

    def _begin(self, final: Path) -> Path:
        if self.is_world_process_zero():
            folders.begin(final)
        self._barrier()
        folder = folders.incomplete(final)
        if not folder.is_dir():
            raise CheckpointError(
                f"Rank {self.args.process_index} does not see {folder}, which rank 0 made: output_dir must be on "
                "storage that all nodes share."
            )
        return folder

    def _completion(self, folder: Path, final: Path):
        if not self.is_world_process_zero():
            return lambda: None
        facts = {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "rows_per_step": self.get_total_train_batch_size(self.args),
            "max_tokens_per_micro_batch": self.args.max_tokens_per_micro_batch,
            "model_type": base_model(self.model).config.model_type,
            "resumable": not self.args.save_only_model,
        }
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint

        def complete() -> None:
            folders.commit(folder, final, facts)
            folders.keep_newest(final.parent, limit, best)

        return complete

    def _save_rank_state(self, folder: Path) -> None:
        self._save_rng_state(str(folder))
        progress = {"tr_loss": self._tr_loss, "last_logged": self._globalstep_last_logged}
        path = folder / f"progress_{self.args.process_index}.pt"
        torch.save(progress, path)
        folders.fsync(path)

    def _save_shared_state(self, folder: Path) -> None:
        torch.save(optimizer_groups(self.model, _unwrapped(self.optimizer)), folder / GROUPS_FILE)
        torch.save(self.lr_scheduler.state_dict(), folder / _SCHEDULER)
        self._save_scaler(str(folder))
        self._save_companions(folder)
        if isinstance(self.model, HubModelMixin):
            write_configs(self.model, folder)
        elif is_adapted(self.model):
            write_adapter_config(self.model, folder)

    def _save_companions(self, folder: Path) -> None:
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(str(folder))
        torch.save(self.args, folder / _ARGUMENTS)

    def _note_callbacks(self) -> None:
        states: dict[str, Any] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        # transformers writes a list only where there are several of a class.
        self.state.stateful_callbacks = {name: s if len(s) > 1 else s[0] for name, s in states.items()}

    def wait_for_checkpoint(self) -> None:
        """Until the last checkpoint is complete on disk. Every rank must call it."""
        self._saver.wait()
        self._barrier()

    def _barrier(self) -> None:
        if self._host_group is not None:
            dist.barrier(self._host_group)

    # ---- the model for the Hub ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as the Hub has it, each tensor by a rank that owns it; or its adapters, as PEFT has them."""
        folder = Path(output_dir or self.args.output_dir)
        if is_adapted(self.model):
            write_adapter(self.model, folder, self._host_group)
        else:
            # The parent's own calls with a folder save checkpoint-N, which keeps the dtype that training goes on in.
            is_checkpoint = _internal_call and output_dir is not None
            dtype = None if is_checkpoint else self.args.exported_dtype
            export_to_hub(self.model, folder, dtype=dtype, group=self._host_group)
        if self.is_world_process_zero():
            self._save_companions(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_merged_model(self, output_dir: str) -> None:
        """Write the model with its adapters merged into the weights, as the Hub has models. Collective.

        What `save_model` does for a model without adapters: each expert is merged and written by a rank that owns it.
        The running model stays as it is.

        Raises:
            ExportError: for adapters that are not plain LoRA.
        """
        export_merged(self.model, Path(output_dir), dtype=self.args.exported_dtype, group=self._host_group)
        if self.is_world_process_zero():
            self._save_companions(Path(output_dir))

    # ---- reading ----

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint that this argument of `train` stands for, the same on all ranks.

        Args:
            resume_from_checkpoint: a folder; True for the newest complete one in output_dir; "auto" for that one, or a
                new run where there is none.

        Raises:
            CheckpointError: it is not complete, holds only the model, or is of a run with other rows in a step.
        """
        if not resume_from_checkpoint:
            return None
        found = self._find_checkpoint(resume_from_checkpoint) if self.is_world_process_zero() else None
        answer = [found]
        if self._host_group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._host_group)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _find_checkpoint(self, asked: str | bool) -> str | Exception | None:
        output_dir = Path(self.args.output_dir)
        folders.remove_incomplete(output_dir)
        if asked is True or asked == "auto":
            complete = folders.complete_checkpoints(output_dir)
            if complete:
                folder = complete[-1]
            elif asked == "auto":
                logger.warning("No complete checkpoint in %s: a new run begins.", output_dir)
                return None
            else:
                return CheckpointError(
                    f"There is no complete checkpoint in {output_dir}. Start without resume_from_checkpoint, or with "
                    "resume_from_checkpoint='auto', which starts anew if there is none."
                )
        else:
            folder = Path(str(asked))
        try:
            self._check_facts(folder)
        except CheckpointError as error:
            return error
        logger.warning("Continuing from %s.", folder)
        return str(folder)

    def _check_facts(self, folder: Path) -> None:
        facts = folders.read_facts(folder)
        if facts is None:
            raise CheckpointError(
                f"{folder} is no complete checkpoint of this package: {folders.MARKER} is missing, or files that it "
                "lists are missing or cut short. To start from a Hub checkpoint, load the model from it."
            )
        if not facts["resumable"]:
            raise CheckpointError(f"{folder} was saved with save_only_model=True: it holds no optimizer to go on with.")
        if not self.args.ignore_data_skip:
            self._check_position(folder, facts)
        if facts["world_size"] != self.args.world_size:
            logger.warning(
                "%s was written by %d processes and this job has %d: random number generators start from the seed, "
                "all else goes on.",
                folder,
                facts["world_size"],
                self.args.world_size,
            )

    def _check_position(self, folder: Path, facts: dict[str, Any]) -> None:
        """Whether a step number stands for the same rows here."""
        budget, its_budget = self.args.max_tokens_per_micro_batch, facts.get("max_tokens_per_micro_batch")
        if its_budget != budget:
            raise CheckpointError(
                f"{folder} is of a run with max_tokens_per_micro_batch {its_budget}, this one has {budget}, so the "
                "data position would be wrong. Choose the same, or set ignore_data_skip=True to start again at the "
                "first row."
            )
        rows, its_rows = self.get_total_train_batch_size(self.args), facts["rows_per_step"]
        if its_rows == rows:
            return
        unit, sizes = "rows", "per_device_train_batch_size and gradient_accumulation_steps"
        if budget is not None:
            unit, sizes = "micro-batches", "gradient_accumulation_steps"
        raise CheckpointError(
            f"{folder} is of a run with {its_rows} {unit} in an optimizer step, this one has {rows}, so the data "
            f"position would be wrong. Choose {sizes} so that a step has {its_rows} {unit} on all processes together, "
            "or set ignore_data_skip=True to start again at the first row."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing yet: the model is read with the optimizer, when both have their layout."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, optimizer = Path(checkpoint), _unwrapped(self.optimizer)
        load_model(folder, self.model, self._host_group)
        load_optimizer(folder, self.model, optimizer, self._host_group)
        schedule = torch.load(folder / _SCHEDULER, weights_only=True)
        own = self.lr_scheduler.state_dict()
        if len(schedule.get("base_lrs", ())) != len(own.get("base_lrs", ())):
            # Another layout has other groups: take the position in the schedule, keep this optimizer's groups.
            rates = [group.get("lr") for group in optimizer.param_groups]
            initial = [group.get("initial_lr") for group in optimizer.param_groups]
            schedule |= {"base_lrs": initial, "_last_lr": rates}
            schedule |= {key: own[key] for key in ("lr_lambdas",) if key in own}
        self.lr_scheduler.load_state_dict(schedule)
        self._progress = self._load_progress(folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        facts = folders.read_facts(Path(checkpoint)) if checkpoint else None
        if facts is not None and facts["world_size"] == self.args.world_size:
            super()._load_rng_state(checkpoint)

    def _load_progress(self, folder: Path) -> dict[str, Any]:
        paths = sorted(folder.glob("progress_*.pt"))
        own = folder / f"progress_{self.args.process_index}.pt"
        if len(paths) == self.args.world_size and own in paths:
            return torch.load(own, weights_only=True, map_location="cpu")
        # What is logged is the mean over ranks.
        all_ranks = [torch.load(path, weights_only=True, map_location="cpu") for path in paths]
        return all_ranks[0] | {"tr_loss": torch.stack([p["tr_loss"] for p in all_ranks]).mean()}

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        facts = folders.read_facts(Path(best)) if best else None
        if best is None or facts is None or not facts["resumable"]:
            raise CheckpointError(
                f"load_best_model_at_end: {best} holds no shards to load the best model from (save_only_model=True, or "
                "an incomplete checkpoint). Load it with from_pretrained instead."
            )
        load_model(Path(best), self.model, self._host_group)

    def _finalize_training(self, *positional, **keywords):
        self.wait_for_checkpoint()
        return super()._finalize_training(*positional, **keywords)


class _RestoreProgress(TrainerCallback):
    """Puts back the loss since the last log, after the parent has zeroed it: the next log is the same mean."""

    def __init__(self, trainer: CheckpointingMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        progress, self._trainer._progress = self._trainer._progress, None
        if progress is not None:
            self._trainer._tr_loss = progress["tr_loss"].to(args.device)
            self._trainer._globalstep_last_logged = progress["last_logged"]


def _push_at_the_end(args: Any) -> None:
    if args.hub_strategy == HubStrategy.EVERY_SAVE:  # what push_to_hub=True means when nothing else is said
        logger.warning("The model goes to the Hub when training ends: checkpoints on the way hold shards for resuming.")
        args.hub_strategy = HubStrategy.END
    elif args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"hub_strategy is {args.hub_strategy.value!r}, but checkpoints of this trainer hold shards and no Hub "
            "weights to upload. Set hub_strategy='end'; `xtuner-hf convert` makes a Hub checkpoint of any of them."
        )


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer inside Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
