"""The planner's verdict at the start of a run: one line, "fits: 61.0 of 79.6 GiB"."""

from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from ..device import device_name
from ..parallel.adapters import base_model, is_adapted
from ..plan.devices import PlanError, device_names, find_device
from ..plan.job import Job
from ..plan.search import plan_briefly

logger = logging.getLogger(__name__)


def announce_plan(model: Any, args: Any, batches: list[dict]) -> None:
    """Plan this run by a dry run in a process of its own, and log the verdict; some seconds on rank 0.

    Args:
        batches: micro-batches of an optimizer step; the first one's shape is planned.
    """
    try:
        job = job_of_run(model, args, batches)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            plan = process.submit(plan_briefly, job).result()
    except PlanError as error:
        logger.warning("This run cannot be planned: %s", error)
        return
    logger.info("Planned: %s, %.2f s a step, MFU %.2f (a roofline).", plan.verdict, plan.report.seconds, plan.mfu)


def job_of_run(model: Any, args: Any, batches: list[dict]) -> Job:
    """What the planner has to know of a trainer.

    Raises:
        PlanError: for a device that its table does not have, or adapters.
    """
    if is_adapted(model):
        raise PlanError("adapters are not simulated.")
    name = device_name(args.device)
    key = next((key for key in sorted(device_names(), key=len, reverse=True) if key.upper() in name), None)
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
        dtype=base.dtype,
        bf16=args.bf16 or base.dtype == torch.bfloat16,
    )


def _mean_document(batch: dict) -> int | None:
    positions = batch.get("position_ids")
    if positions is None or positions.shape[0] > 1:
        return None
    return max(positions.shape[1] // max(int((positions == 0).sum()), 1), 1)
