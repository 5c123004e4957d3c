"""Training state written in one layout and read in another, on the processes of a job."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from tests.checkpoint.export_scenario import LAYOUTS, step_, tiny_qwen
from tests.trainers.scenario import full
from xtuner_hf.checkpoint.folder import SHARDS, CheckpointError
from xtuner_hf.checkpoint.resume import (
    GROUPS_FILE,
    load_model,
    load_optimizer,
    optimizer_groups,
    training_state,
)
from xtuner_hf.parallel.shard import shard_model


def like_accelerate():
    """FSDP2 by Accelerate's wrapping: layers and root, over all ranks, experts like everything else."""
    model = tiny_qwen()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def make(layout: str):
    if layout == "one process":
        return tiny_qwen()
    if layout == "accelerate":
        return like_accelerate()
    return shard_model(tiny_qwen(), DistributedConfig(**LAYOUTS[layout]))


def trained(layout: str):
    """A model after a step, and its optimizer; one parameter never had a gradient and so has no state."""
    model = make(layout)
    model.model.norm.weight.requires_grad_(False)
    optimizer = step_(model)
    model.model.norm.weight.requires_grad_(True)
    return model, optimizer


def values(model, optimizer) -> dict[str, torch.Tensor]:
    return {name: full(tensor) for name, tensor in training_state(model, optimizer).items()}


def save(folder: Path, model, optimizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(training_state(model, optimizer), checkpoint_id=folder / SHARDS)
    torch.save(optimizer_groups(model, optimizer), folder / GROUPS_FILE)


def load(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """Into a model and an optimizer that were elsewhere."""
    model = make(layout)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    load_model(folder, model)
    load_optimizer(folder, model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]
    return values(model, optimizer)


def pairs(folder: str, from_one: str) -> dict[str, bool | str]:
    """What is written in each layout, read in the two that follow; `from_one` is a checkpoint of one process."""
    dist.init_process_group("gloo")
    results: dict[str, bool | str] = {"odd state": odd_state()}
    layouts = [*LAYOUTS, "accelerate"]
    for index, written in enumerate(layouts):
        model, optimizer = trained(written)
        expected = values(model, optimizer)
        save(Path(folder) / written, model, optimizer)
        dist.barrier()
        for read in (layouts * 2)[index + 1 : index + 3]:
            found = load(Path(folder) / written, read)
            results[f"{written} -> {read}"] = found.keys() == expected.keys() and all(
                torch.equal(found[name], tensor) for name, tensor in expected.items()
            )
    one = torch.load(Path(from_one) / "values.pt")
    for read in layouts:
        found = load(Path(from_one), read)
        results[f"one process -> {read}"] = all(torch.equal(found[name], tensor) for name, tensor in one.items())
    return results


def odd_state() -> str:
    """The error for an optimizer whose state is not shaped like its parameter, Adafactor's moments say."""
    model = fully_shard(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model[0].weight]["row"] = torch.zeros(4)
    try:
        training_state(model, optimizer)
    except CheckpointError as error:
        return str(error)
    return "no error"
