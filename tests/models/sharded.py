"""Runs on ranks: load every family sharded, compute one step's loss, gradients and FLOPs, save again."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.families import tokens
from tests.trainers.scenario import full
from xtuner_hf import AutoModelForCausalLM, host_reads
from xtuner_hf.models.flops import TrainingFlops
from xtuner_hf.moe import ep_dispatcher
from xtuner_hf.moe.block import SparseMoEBlock
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


class OrderOfCalls:
    """Notes, in order, what the MoE blocks of a model do: route, send the split sizes to the host, run the shared
    experts, wait for the sizes."""

    def __init__(self, model: torch.nn.Module):
        self.calls: list[str] = []
        self._blocks = [module for module in model.modules() if isinstance(module, SparseMoEBlock)]

    def __enter__(self):
        calls = self.calls
        self._original = host_reads.HostCopy

        class Noted(host_reads.HostCopy):
            def __init__(self, tensor):
                calls.append("sizes leave")
                super().__init__(tensor)

            def wait(self):
                calls.append("sizes awaited")
                return super().wait()

        host_reads.HostCopy = Noted
        self._hooks = []
        for block in self._blocks:
            named = {"routed": getattr(block, block.router_name), "shared experts": block.shared_experts}
            for what, module in named.items():
                if module is not None:
                    hook = module.register_forward_hook(lambda *_, what=what: calls.append(what))
                    self._hooks.append(hook)
        return self

    def __exit__(self, *_):
        host_reads.HostCopy = self._original
        for hook in self._hooks:
            hook.remove()


def run(folder: str, ep_size: int, cases: dict[str, dict]) -> dict[str, tuple]:
    """`cases`: sub-folder of a checkpoint -> arguments of `from_pretrained`."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = ROWS // world_size
    results = {}
    for name, arguments in cases.items():
        layout = ParallelLayout(world_size=world_size, ranks_per_node=world_size, ep_size=ep_size)
        config = layout.distributed_config(ep_implementation=ep_dispatcher.IMPLEMENTATION_NAME)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / name, distributed_config=config, **arguments)
        sum_gradients(model)
        with OrderOfCalls(model) as order:
            loss, grads = loss_and_grads(model, slice(rank * share, (rank + 1) * share))
        dist.all_reduce(loss)
        model.save_pretrained(Path(folder) / f"{name}-saved-{ep_size}")
        results[name] = (loss.item(), grads, TrainingFlops.of_model(model), order.calls)
    return results


def run_all(folder: str, cases: dict[int, dict[str, dict]]) -> dict[int, dict[str, tuple]]:
    dist.init_process_group("gloo")
    return {ep_size: run(folder, ep_size, of_size) for ep_size, of_size in cases.items()}
