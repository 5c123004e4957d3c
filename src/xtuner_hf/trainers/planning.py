"""The planner's verdict at the start of a run: one line, "fits: 61.0 of 79.6 GiB"."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from typing import Any

import torch

from ..device import device_name
from ..parallel.adapters import base_model, is_adapted
from ..plan.devices import PlanError, device_key, device_names, find_device
from ..plan.job import Job
from ..plan.planning import Plan
from .setup import reduces_each_micro_batch
from .vision import num_tiles

logger = logging.getLogger(__name__)

# Reads where modules are found and a job, writes the plan or why there is none. What anybody prints goes to stderr.
_PLANNER = """
import os, pickle, sys
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.path[:] = pickle.load(sys.stdin.buffer)
from xtuner_hf.plan.devices import PlanError
from xtuner_hf.plan.search import plan_briefly
try:
    found = plan_briefly(pickle.load(sys.stdin.buffer))
except PlanError as error:
    found = error
pickle.dump(found, answer)
answer.close()
"""


def announce_plan(model: Any, args: Any, batches: list[dict]) -> None:
    """Plan this run by a dry run in a process of its own, and log the verdict; some seconds on rank 0.

    Args:
        batches: micro-batches of an optimizer step; the first one's shape is planned.
    """
    try:
        plan = _plan_apart(job_of_run(model, args, batches))
    except PlanError as error:
        logger.warning("This run cannot be planned: %s", error)
        return
    logger.info("Planned: %s, %.2f s a step, MFU %.2f (a roofline).", plan.verdict, plan.report.seconds, plan.mfu)


def _plan_apart(job: Job) -> Plan:
    """`plan_briefly` in a process of its own, since planning changes torch (plan/torch_internals.py).

    A new interpreter and no worker of multiprocessing: that would run the training script once more there, unless it
    stands behind `if __name__ == "__main__"`.
    """
    question = pickle.dumps(sys.path) + pickle.dumps(job)
    run = subprocess.run([sys.executable, "-c", _PLANNER], input=question, stdout=subprocess.PIPE, check=False)
    if run.returncode:
        raise PlanError(f"the planner's process ended with {run.returncode}; its last words are above.")
    found = pickle.loads(run.stdout)
    if isinstance(found, PlanError):
        raise found
    return found


def job_of_run(model: Any, args: Any, batches: list[dict]) -> Job:
    """What the planner has to know of a trainer.

    Raises:
        PlanError: for a device that its table does not have, and for gradients that stay whole.
    """
    if len(batches) > 1 and args.dp_replicate_size == 1 and not reduces_each_micro_batch(args):
        raise PlanError("gradients that stay whole until the last micro-batch (sync_each_batch) are not simulated.")
    name = device_name(args.device)
    key = device_key(name)
    if key is None:
        raise PlanError(f"the device {name!r} is not in the planner's table; it has: {', '.join(device_names())}.")
    tokens = batches[0]["input_ids"]
    base = base_model(model)
    return Job(
        config=base.config,
        layout=args.parallel_layout,
        device=find_device(key),
        seq_len=tokens.shape[1],
        document_len=_mean_document(batches[0]),
        micro_batch=tokens.shape[0],
        accumulation=len(batches),
        recompute=args.recompute or ("full" if args.gradient_checkpointing else "none"),
        activation_offload=args.activation_offload,
        optimizer_states=args.optimizer_states,
        optimizer_offload=args.optimizer_offload,
        optimizer_in_backward=args.optimizer_in_backward,
        mtp_loss_coef=getattr(base, "mtp_loss_coef", None),
        tiles_per_row=-(-num_tiles(batches[0]) // tokens.shape[0]),
        frozen=tuple(args.frozen),
        fp8=args.fp8,
        adapter=model.peft_config[model.active_adapter] if is_adapted(model) else None,
        dtype=base.dtype,
        bf16=args.bf16 or base.dtype == torch.bfloat16,
    )


def _mean_document(batch: dict) -> int | None:
    positions = batch.get("position_ids")
    if positions is None or positions.shape[0] > 1:
        return None
    return max(positions.shape[1] // max(int((positions == 0).sum()), 1), 1)
