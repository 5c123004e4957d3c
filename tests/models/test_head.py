"""The chunked loss inside a sharded model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.families import FAMILIES, tokens
from tests.ranks import run_on_ranks
from xtuner_hf.memory.chunked_loss import LossWeights
from xtuner_hf.moe.ep_dispatcher import IMPLEMENTATION_NAME
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.parallel.shard import shard_model


def weighted_in_bf16() -> tuple[float, float]:
    """The weighted loss of a model sharded in bf16, and the same from its own logits."""
    dist.init_process_group("gloo")
    layout = ParallelLayout(world_size=2, ranks_per_node=2)
    config = layout.distributed_config(bf16=True, ep_implementation=IMPLEMENTATION_NAME)
    model = shard_model(FAMILIES["qwen3_moe"].ours(torch.float32), config)
    input_ids = tokens(2, 40)
    weights_BS = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) + 0.1
    total = torch.tensor(514.7)
    with torch.no_grad():
        weights = LossWeights(weights_BS, total)
        loss = model(input_ids, labels=input_ids, chunked_loss=True, loss_weights=weights).loss
        logits = model(input_ids).logits.float()
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return loss.item(), ((each * weights_BS[:, 1:].flatten()).sum() / total).item()


def test_weights_of_labels_are_not_cast_with_a_models_inputs():
    """FSDP casts floating-point inputs to bf16: weights were off by up to 0.4 %, and so was their sum."""
    for loss, expected in run_on_ranks("tests.models.test_head:weighted_in_bf16", 2):
        assert loss == pytest.approx(expected, rel=1e-5)
