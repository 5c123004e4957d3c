"""Runs on ranks: one step of a tiny model whose sequences several ranks share, with every balance loss on."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist

from tests.families import FAMILIES, tokens
from tests.trainers.scenario import full
from xtuner_hf.moe.balance import BalanceConfig, LoadBalancer
from xtuner_hf.moe.tokens import TokenLayout
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.parallel.sequence import SequenceParallelModel, sequence_ranks
from xtuner_hf.parallel.shard import shard_model, sum_gradients

ROWS = 4
# Documents of each row: 27 tokens, which neither 2 nor 4 ranks divide; some lie on several ranks, some end at a cut.
LENGTHS = [(9, 15, 3), (27,), (1, 6, 7, 13), (14, 13)]
BALANCE = BalanceConfig(aux_loss_coef=0.05, z_loss_coef=0.01, sequence_loss_coef=0.02)


def batch(kind: str) -> dict[str, torch.Tensor]:
    input_ids = tokens(ROWS, sum(LENGTHS[0]))
    generator = torch.Generator().manual_seed(1)
    labels = input_ids.masked_fill(torch.rand(input_ids.shape, generator=generator) < 0.3, -100)
    if kind == "padded":
        mask = torch.ones_like(input_ids)
        for row, (left, right) in enumerate([(0, 9), (4, 0), (3, 5), (0, 0)]):
            mask[row, :left], mask[row, input_ids.shape[1] - right :] = 0, 0
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "labels": labels.masked_fill(positions == 0, -100),
    }


def step(model, kind: str, rows: slice, ranks=None) -> dict:
    """Forward and backward on some rows of the batch; what this process has then."""
    whole = batch(kind)
    own = {name: tensor[rows] for name, tensor in whole.items()}
    totals = TokenLayout.of_batch(whole).totals()
    balance = LoadBalancer.attach(model, BALANCE)
    balance.start_step(totals[0], totals[1])
    call = model if ranks is None else SequenceParallelModel(model, ranks)
    num_items = (whole["labels"][:, 1:] != -100).sum()
    model.train()
    with balance.recording():
        output = call(**own, chunked_loss=True, num_items_in_batch=num_items, use_cache=False)
    balance.reduce()
    balance.watch(output.loss).backward()
    metrics = balance.metrics()
    return {
        "loss": output.loss.detach(),
        "aux": torch.tensor([metrics.aux_loss, metrics.z_loss, metrics.sequence_loss]),
        "load": metrics.load_LE,
        "grads": {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None},
    }


def model_of(case: dict) -> torch.nn.Module:
    return FAMILIES[case["family"]].ours(torch.float32, init=case.get("init"), **case.get("config", {}))


def run(cases: list[dict]) -> list[dict]:
    """Each case: a family, changes to its configuration, `sp_size`, `ep_size`, and the kind of batch."""
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    models: dict[str, torch.nn.Module] = {}
    results = []
    for case in cases:
        key = str((case["family"], case.get("config"), case.get("init")))
        model = copy.deepcopy(models.setdefault(key, model_of(case)))
        layout = ParallelLayout(
            world_size=world_size, ranks_per_node=world_size, ep_size=case["ep_size"], sp_size=case["sp_size"]
        )
        model = shard_model(model, layout.distributed_config())
        sum_gradients(model)
        ranks = sequence_ranks(layout, "cpu")
        share, group = ROWS // layout.data_size, dist.get_rank() // layout.sp_size
        rows = slice(group * share, (group + 1) * share)
        result = step(model, case["kind"], rows, ranks if layout.sp_size > 1 else None)
        dist.all_reduce(result["loss"])
        result["loss"] /= layout.sp_size
        results.append(result)
    return results if dist.get_rank() == 0 else []
