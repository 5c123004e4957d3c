"""Exports on the processes of a job, and a spy on all that they allocate and send."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.distributed import DistributedConfig

import xtuner_hf
from tests.tiny import build, moe_config, randomize_
from xtuner_hf import cli
from xtuner_hf.checkpoint.export import export_to_hub, write_configs
from xtuner_hf.checkpoint.folder import SHARDS, begin, commit, incomplete
from xtuner_hf.checkpoint.resume import GROUPS_FILE, optimizer_groups, training_state
from xtuner_hf.checkpoint.sources import Box, LiveTensors
from xtuner_hf.parallel.shard import shard_model

LAYOUTS = {
    "ep4": {"fsdp_size": 4, "ep_size": 4},
    "efsdp2 x ep2": {"fsdp_size": 4, "ep_size": 2},
    "fsdp4": {"fsdp_size": 4},
    "replicate2 x ep2": {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
}


def tiny_qwen(dtype=torch.float32, **changes):
    # Experts much larger than any dense tensor: the spy tells them apart by size.
    values = {"router_correction_bias": True, "vocab_size": 64, "moe_intermediate_size": 64, "hidden_size": 32}
    model = build(xtuner_hf.Qwen3MoeForCausalLM, moe_config(**(values | changes)))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def tiny_gpt_oss():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return randomize_(GptOssForCausalLM(config))


MODELS = {"qwen": tiny_qwen, "gpt_oss": tiny_gpt_oss, "tied": lambda: tiny_qwen(tie_word_embeddings=True)}


class Spy(TorchDispatchMode):
    """Notes the largest tensor that any operation takes or makes, collectives included, and the names of those seen."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.add(str(function))
        for leaf in tree_leaves((args, kwargs, result)):
            # A DTensor has the whole shape and no data of its own; its local part is seen where it is used.
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor) and leaf.device.type != "meta":
                self.largest = max(self.largest, leaf.nbytes)
        return result


def everything(folder: str) -> dict:
    """All that the tests need of four ranks, in one start: exports, what the spy saw of each, a training checkpoint."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    seen: dict = {}
    for model, layouts in (("qwen", list(LAYOUTS)), ("gpt_oss", ["ep4", "efsdp2 x ep2", "fsdp4"]), ("tied", ["fsdp4"])):
        for layout in layouts:
            sharded = shard_model(MODELS[model](), DistributedConfig(**LAYOUTS[layout]))
            with Spy() as spy:
                # Files of at most two experts: every rank writes several.
                export_to_hub(sharded, Path(folder) / model / layout, group=group, max_shard_bytes=60_000)
            seen[model, layout] = {"largest": spy.largest, "operations": spy.operations}
    sharded = shard_model(tiny_qwen(), DistributedConfig(**LAYOUTS["efsdp2 x ep2"]))
    export_to_hub(sharded, Path(folder) / "one file", group=group)
    with Spy() as spy:
        sharded.save_pretrained(Path(folder) / "stock")
    seen["stock"] = spy.largest
    save_shards(folder, sharded)
    arguments = [str(Path(folder) / "checkpoint-1"), str(Path(folder) / "converted"), "--max-shard-size", "60KB"]
    cli.main(["convert", *arguments])
    seen["boxes"] = fetch_from_any_layout(group)
    return seen


def step_(model) -> torch.optim.Optimizer:
    """A step of AdamW on made-up gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def save_shards(folder: str, model) -> None:
    """A training checkpoint after one step."""
    optimizer = step_(model)
    final = Path(folder) / "checkpoint-1"
    writing = incomplete(final)
    if dist.get_rank() == 0:
        begin(final)
    dist.barrier()
    dcp.save(training_state(model, optimizer), checkpoint_id=writing / SHARDS)
    if dist.get_rank() == 0:
        write_configs(model, writing)
        torch.save(optimizer_groups(model, optimizer), writing / GROUPS_FILE)
        (writing / "tokenizer_config.json").write_text("{}")
        commit(writing, final, {"step": 1, "resumable": True})
    dist.barrier()


def fetch_from_any_layout(group) -> list[bool]:
    """Boxes of tensors whose parts lie across dimensions, evenly and not."""
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
    whole = torch.arange(5 * 6 * 7, dtype=torch.float32).reshape(5, 6, 7)
    results = []
    for placements in ([Shard(1), Shard(0)], [Shard(0), Shard(2)], [Shard(2), Shard(1)]):
        source = LiveTensors({"x": distribute_tensor(whole, mesh, placements)}, group)
        for writer in range(4):
            for expert in range(5):
                part = source.fetch("x", Box.whole(whole.shape).expert(expert), writer)
                is_right = part is not None and torch.equal(part, whole[expert : expert + 1])
                results.append(is_right if dist.get_rank() == writer else part is None)
    return results
