"""Runs on ranks: load every family sharded, compute one step's loss, gradients and FLOPs, save again."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.families import tokens
from tests.trainers.scenario import full
from xtuner_hf import AutoModelForCausalLM
from xtuner_hf.models.flops import TrainingFlops
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.parallel.shard import sum_gradients

ROWS = 4
LENGTHS = (9, 15)


def batch(rows: slice) -> dict[str, torch.Tensor]:
    """Packed rows of two documents each."""
    input_ids = tokens(ROWS, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(ROWS, -1)
    labels = input_ids.masked_fill(positions == 0, -100)
    return {"input_ids": input_ids[rows], "position_ids": positions[rows], "labels": labels[rows]}


def loss_and_grads(model: torch.nn.Module, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This process's share of the loss over all rows, and the gradients that it ends up with."""
    num_labels = int((batch(slice(None))["labels"] != -100).sum())
    loss = model.train()(**batch(rows), chunked_loss=True, num_items_in_batch=num_labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def run(folder: str, ep_size: int, cases: dict[str, dict]) -> dict[str, tuple]:
    """`cases`: sub-folder of a checkpoint -> arguments of `from_pretrained`."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = ROWS // world_size
    results = {}
    for name, arguments in cases.items():
        config = ParallelLayout(world_size=world_size, ranks_per_node=world_size, ep_size=ep_size).distributed_config()
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / name, distributed_config=config, **arguments)
        sum_gradients(model)
        loss, grads = loss_and_grads(model, slice(rank * share, (rank + 1) * share))
        dist.all_reduce(loss)
        model.save_pretrained(Path(folder) / f"{name}-saved")
        results[name] = (loss.item(), grads, TrainingFlops.of_model(model))
    return results
