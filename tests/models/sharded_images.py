"""Runs on ranks: one step of models that read images, on rows that ranks split or share."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests import vision
from tests.trainers.scenario import full
from tests.vision import row, tiles
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.parallel.sequence import SequenceParallelModel, sequence_ranks
from xtuner_hf.parallel.shard import shard_model, sum_gradients

# Packed rows: documents of each with their tiles. The second row has no image; the third one has them on both halves.
ROWS = [
    [(row(5, -2, 9), 2), (row(2, -1, seed=1), 1)],
    [(row(20, seed=2), 0), (row(7, seed=3), 0)],
    [(row(-1, 9, -3, 1, seed=4), 4)],
    [(row(12, seed=5), 0), (row(3, -1, 8, seed=6), 1)],
]
LENGTH = 31  # of all rows, padded; no multiple of the ranks


def batch(rows: list[int]) -> dict[str, torch.Tensor]:
    """Some rows, one behind the other in a packed row, and `pixel_values` of their tiles if there are any."""
    ids, positions, real, pixels = [], [], [], []
    for index in rows:
        documents = [*ROWS[index]]
        length = sum(len(document) for document, _ in documents)
        for document, _ in [*documents, ([0] * (LENGTH - length), 0)]:
            ids += document
            positions += range(len(document))
        real += [True] * length + [False] * (LENGTH - length)
        number = sum(number for _, number in documents)
        pixels.append(tiles(number, seed=index))
    input_ids, position_ids, token_mask = (torch.tensor([values]) for values in (ids, positions, real))
    hidden = (position_ids == 0) | ~token_mask | (input_ids == vision.IMAGE_TOKEN)
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "token_mask": token_mask}
    inputs["labels"] = input_ids.masked_fill(hidden, -100)
    pixel_values = torch.cat(pixels)
    return inputs | ({"pixel_values": pixel_values} if len(pixel_values) else {})


def step(model: torch.nn.Module, rows: list[int], ranks=None) -> dict:
    """This process's share of the loss over all rows, in training and in evaluation, and the gradients that it ends up
    with."""
    num_items = int((batch([0, 1, 2, 3])["labels"][:, 1:] != -100).sum())
    call = model if ranks is None else SequenceParallelModel(model, ranks)
    model.train()
    inputs = batch(rows) | {"chunked_loss": True, "num_items_in_batch": num_items, "use_cache": False}
    loss = call(**inputs).loss
    loss.backward()
    grads = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        evaluated = call(**inputs).loss
    return {
        "loss": torch.stack([loss.detach(), evaluated]),
        "grads": grads,
    }


def run(cases: list[dict]) -> list[dict]:
    """Each case: `name` of a model, `ep_size`, `sp_size`, the `rows` of each rank, perhaps parts that are `frozen`."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = []
    for case in cases:
        model = vision.ours(case["name"], tied=case.get("tied", False))
        for part in case.get("frozen", ()):
            for module in model.parts[part]:
                module.requires_grad_(False)
        layout = ParallelLayout(
            world_size=world_size, ranks_per_node=world_size, ep_size=case["ep_size"], sp_size=case["sp_size"]
        )
        model = shard_model(model, layout.distributed_config())
        sum_gradients(model)
        ranks = sequence_ranks(layout, "cpu") if case["sp_size"] > 1 else None
        result = step(model, case["rows"][rank], ranks)
        if ranks is None:
            dist.all_reduce(result["loss"])
        results.append(result)
    return results
