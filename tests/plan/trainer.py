"""A real trainer's optimizer step and the planner's, on the same weights and tokens, under the same tracker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import TrainerCallback

import xtuner_hf
from tests.plan.real import GlooTracker, RecordedReads, make_job
from tests.tiny import build
from tests.trainers.scenario import tiny_tokenizer
from xtuner_hf.data import PackedCollator
from xtuner_hf.host_reads import answered_by
from xtuner_hf.models.auto import AutoModelForCausalLM
from xtuner_hf.moe.ep_dispatcher import IMPLEMENTATION_NAME
from xtuner_hf.parallel.shard import shard_model, sum_gradients
from xtuner_hf.plan.clock import Clock
from xtuner_hf.plan.cluster import axis_of, fake_cluster
from xtuner_hf.plan.costs import Costs
from xtuner_hf.plan.dry_run import StepReport, label_resting, make_report
from xtuner_hf.plan.job import Job
from xtuner_hf.plan.ledger import Ledger
from xtuner_hf.plan.step import TrainingStep
from xtuner_hf.plan.torch_internals import tensors_in
from xtuner_hf.plan.tracker import BACKWARD, FORWARD, OPTIMIZER_STEP, StepTracker

TRAINERS = {
    "MoETrainer": (xtuner_hf.MoETrainer, xtuner_hf.MoETrainingArguments),
    "MoESFTTrainer": (xtuner_hf.MoESFTTrainer, xtuner_hf.MoESFTConfig),
}


class Operator(NamedTuple):
    """One that costs something."""

    phase: str
    in_head: bool  # between the trunk's output and its gradient: head, loss, and what is logged of them
    name: str
    tensors: tuple[str, ...]  # that it made, or changed in place; without those of 3 numbers or fewer

    @property
    def is_bookkeeping(self) -> bool:
        """On single numbers: scales of the loss, checks for NaN, what is logged."""
        return not self.tensors


@dataclass
class Observed:
    """One rank's second step: what ran in it, and what it cost."""

    operators: list[Operator]
    report: StepReport
    loss: float | None  # of the trainer's two steps


class ListingTracker(GlooTracker):
    """Writes down every operator that costs something."""

    in_head = False

    def begin_step(self) -> None:
        super().begin_step()
        self.operators: list[Operator] = []

    def watch_head(self, model: Any) -> None:
        trunk = model.model
        trunk.register_forward_pre_hook(lambda *_: self._enter_head(False))
        trunk.register_forward_hook(self._leave_trunk)

    def _leave_trunk(self, trunk, args, output) -> None:
        self._enter_head(True)
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(lambda grad: self._enter_head(False))

    def _enter_head(self, inside: bool) -> None:
        self.in_head = inside

    def _compute(self, name, args, kwargs, outputs) -> None:
        super()._compute(name, args, kwargs, outputs)
        self._note(name, outputs or tensors_in(args[:1]))

    def _collective(self, name, args, outputs) -> None:
        super()._collective(name, args, outputs)
        self._note(name, outputs)

    def _note(self, name: str, tensors: list[torch.Tensor]) -> None:
        large = tuple(f"{str(x.dtype)[6:]}{list(x.shape)}" for x in tensors if x.numel() > 3)
        self.operators.append(Operator(self.subphase, self.in_head, name, large))


def observe(job: Job, kind: str) -> Observed:
    """Two steps of this rank, of which the second is reported.

    Args:
        kind: "planner", or a trainer's name.
    """
    clock = Clock()
    costs = Costs(job.device, job.documents)
    tracker = ListingTracker(costs, clock, Ledger(), lambda group: axis_of(job.layout, group))
    with answered_by(RecordedReads()):
        observed = _run_planned_step(job, tracker) if kind == "planner" else _run_trainer(job, tracker, kind)
    return replace(observed, report=replace(observed.report, samples=[], spans=[]))


def _model(job: Job) -> Any:
    return build(lambda config: AutoModelForCausalLM.from_config(config, dtype=job.dtype), job.config, dtype=job.dtype)


def _row(job: Job) -> dict[str, list[int]]:
    """The tokens of every micro-batch."""
    tokens = torch.randint(2, job.config.vocab_size, (job.seq_len,), generator=torch.Generator().manual_seed(7))
    return {"input_ids": tokens.tolist(), "seq_lengths": job.documents}


def _run_planned_step(job: Job, tracker: ListingTracker) -> Observed:
    model = _model(job)
    if job.layout.world_size > 1:
        model = shard_model(model, job.layout.distributed_config(bf16=job.bf16, ep_implementation=IMPLEMENTATION_NAME))
        sum_gradients(model)
    with tracker:
        step = TrainingStep(job, model, torch.device("cpu"))
        tracker.watch_layers(model)
        tracker.watch_head(model)
        batch = PackedCollator(pad_token_id=0, padding_free=True)([_row(job)])
        for _ in range(2):
            label_resting(tracker.ledger, step)
            tracker.begin_step()
            step.run(batch, tracker.phase)
        return Observed(tracker.operators, make_report(job, tracker, model), None)


class _Phases:
    """In front of a trainer: tells the tracker where in the step it is."""

    tracker: ListingTracker

    def get_batch_samples(self, *positional, **keywords):
        if self.state.global_step == 0:  # sharded, and checkpointing is on
            self.tracker.watch_layers(self.model)
            self.tracker.watch_head(self.model)
        label_resting(self.tracker.ledger, self)
        self.tracker.begin_step()
        return super().get_batch_samples(*positional, **keywords)

    def resting(self):
        return TrainingStep.resting(SimpleNamespace(model=self.model, optimizer=self.optimizer.optimizer))

    def _count_pass(self, *positional, **keywords):
        with self.tracker.phase(FORWARD):
            return super()._count_pass(*positional, **keywords)

    def compute_loss(self, *positional, **keywords):
        with self.tracker.phase(FORWARD):
            return super().compute_loss(*positional, **keywords)


class _UpdatePhase(TrainerCallback):
    """From the end of the last backward to the end of the step."""

    report: Callable[[], None]

    def __init__(self, tracker: StepTracker):
        self.tracker = tracker
        self._phase = ExitStack()

    def around(self, backward: Callable, is_last: Callable[[], bool]) -> Callable:
        def tracked(loss, **keywords):
            with self.tracker.phase(BACKWARD):
                backward(loss, **keywords)
            if is_last():
                self._phase.enter_context(self.tracker.phase(OPTIMIZER_STEP))

        return tracked

    def on_step_end(self, args, state, control, **kwargs):
        self._phase.close()
        self.report()


def _run_trainer(job: Job, tracker: ListingTracker, kind: str) -> Observed:
    trainer_class, arguments_class = TRAINERS[kind]
    update = _UpdatePhase(tracker)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = type(kind, (_Phases, trainer_class), {})(
            model=_model(job),
            args=arguments_class(output_dir=folder, **_arguments(job, kind)),
            data_collator=PackedCollator(pad_token_id=0, padding_free=True),
            train_dataset=Dataset.from_list([_row(job)] * 16),
            callbacks=[update],
            **({"processing_class": tiny_tokenizer()} if kind == "MoESFTTrainer" else {}),
        )
        trainer.tracker = tracker
        trainer.accelerator.backward = update.around(
            trainer.accelerator.backward, lambda: trainer._micro_batch == len(trainer._batches) - 1
        )
        seen: list[Observed] = []
        update.report = lambda: seen.append(
            Observed(tracker.operators, make_report(job, tracker, trainer.model), trainer._tr_loss.item())
        )
        with tracker:
            trainer.train()
    AcceleratorState._reset_state()  # it outlives a trainer
    return seen[-1]


def _arguments(job: Job, kind: str) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": 2,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "bf16": job.bf16,
        "recompute": job.recompute,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": job.optimizer_arguments.max_grad_norm,
        "optimizer_states": job.optimizer_states,
        "optimizer_offload": job.optimizer_offload,
        "activation_offload": job.activation_offload,
        "optimizer_in_backward": job.optimizer_in_backward,
        "ep_size": job.layout.ep_size,
        "dp_replicate_size": job.layout.dp_replicate_size,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if kind == "MoESFTTrainer" else {}),
    }


def run(cases: dict[str, tuple]) -> dict[str, dict[str, Observed]]:
    """Name of the case -> what the planner's step does, and what each trainer's; on each rank or in one process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    results = {}
    for name, (family, changes, sizes, kinds) in cases.items():
        job = make_job(family, world_size, changes, **sizes)
        with fake_cluster(1) if world_size == 1 else nullcontext():
            planned = observe(job, "planner")
        results[name] = {"planner": planned} | {kind: observe(job, kind) for kind in kinds}
    return results
