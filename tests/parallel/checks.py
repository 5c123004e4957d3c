"""What a test asks of a sharded model, on the ranks of a job or on one rank of a pretended one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Trainer

from tests.families import FAMILIES
from tests.moe.ep_cases import WAITING_OPERATORS, OperatorSpy
from tests.parallel.loading import load
from tests.tiny import build, moe_config
from xtuner_hf import MoETrainer, MoETrainingArguments, Qwen3MoeForCausalLM
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.parallel.shard import shard_model


def training_arguments(folder: str, **changes) -> MoETrainingArguments:
    values = {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    return MoETrainingArguments(**(values | changes))


def everything_on_4_ranks(large: str, small: str) -> dict:
    """What tests/parallel/test_shard.py asks of four ranks, in one start."""
    dist.init_process_group("gloo")
    # First, while no memory lies free that loading could take without growing.
    found: dict = {"large": load(large, [{"ep_size": 2}], compare=False)}
    found["small"] = load(small, [{}, {"ep_size": 2}, {"ep_size": 2, "dp_replicate_size": 2}])
    found["norms"] = [norm_and_optimizer(copies) for copies in (1, 2)]
    return found


def norm_and_optimizer(copies: int) -> dict:
    """Gradient norm over two meshes, and the optimizer's groups, with EP 2 on 4 ranks."""
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, ep_size=2, dp_replicate_size=copies, weight_decay=0.1, max_grad_norm=0.5)
        model = build(Qwen3MoeForCausalLM, moe_config(router_correction_bias=True))
        trainer = MoETrainer(model=model, args=args)
        optimizer = trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = [
        {
            "names": [names[p] for p in group["params"]],
            "meshes": len({p.device_mesh for p in group["params"]}),
            "decay": group["weight_decay"],
        }
        for group in optimizer.param_groups
    ]
    torch.manual_seed(dist.get_rank() % (4 // copies))  # copies have the same gradients
    for parameter in names:
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().normal_()
    expected = torch.stack([p.grad.full_tensor().norm() for p in names]).norm()
    stock = Trainer._mixed_mesh_grad_norm(trainer, trainer.model, float("inf"))
    with OperatorSpy((*WAITING_OPERATORS, "c10d::allreduce_")) as spy:
        norm = trainer._clip_grad_norm(trainer.model)
    clipped = torch.stack([p.grad.full_tensor().norm() for p in names]).norm()
    return {
        "groups": groups,
        "parameters": len(names),
        "norm": norm.item(),
        "expected": expected.item(),
        "clipped": clipped.item(),
        "stock": stock.item(),
        "waits and collectives": spy.found,
    }


@contextlib.contextmanager
def pretend(num_ranks: int) -> Iterator[None]:
    """Be rank 0 of a job whose other ranks do not exist; collectives leave their output as it is."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    yield
    dist.destroy_process_group()


def on_pretended_ranks(checks: list[dict]) -> list[dict]:
    """Several checks in one process, which is what takes the time: {"check": name, "num_ranks": n, **arguments}."""
    results = []
    for options in checks:
        with pretend(options["num_ranks"]):
            results.append(globals()[options.pop("check")](**options))
    return results


def storage_of_experts(num_ranks: int, **sizes) -> dict:
    """What rank 0 stores of the experts' projections, in elements, padding included."""
    layout = ParallelLayout(world_size=num_ranks, ranks_per_node=num_ranks, **sizes)
    model = build(Qwen3MoeForCausalLM, moe_config())
    shard_model(model, layout.distributed_config())
    experts = model.model.layers[0].mlp.experts
    # FSDP keeps the padding in its own buffer, next to the parameter that it shows.
    stored = sum(p._sharded_param_data.numel() for p in experts._get_fsdp_state()._fsdp_param_group.fsdp_params)
    parameters = dict(experts.named_parameters())
    return {
        "stored": stored,
        "share": sum(p.numel() for p in parameters.values()) / (num_ranks // layout.dp_replicate_size),
        "placements": {name: str(p.placements) for name, p in parameters.items()},
    }


def reduction_and_casts(num_ranks: int, bf16_parameters: bool) -> dict:
    """Dtypes that FSDP computes and reduces in, by unit."""
    layout = ParallelLayout(world_size=num_ranks, ranks_per_node=num_ranks, ep_size=2)
    model = build(Qwen3MoeForCausalLM, moe_config(), dtype=torch.bfloat16 if bf16_parameters else torch.float32)
    shard_model(model, layout.distributed_config(bf16=True))
    units = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    return {name: unit._get_fsdp_state()._mp_policy for name, unit in units.items()}


def prefetch_order(num_ranks: int) -> dict:
    """Names of the units that FSDP prefetches, in order, forward and backward."""
    return _prefetched(_shard(build(Qwen3MoeForCausalLM, moe_config()), num_ranks))


def prefetch_of_mtp(num_ranks: int) -> list[dict]:
    """The same with a multi-token prediction layer that is kept, then trained, then kept again."""
    model = FAMILIES["deepseek_v3"].ours(torch.float32, init={"mtp_loss_coef": 0.0}, num_nextn_predict_layers=1)
    model = _shard(model, num_ranks).train()
    found = []
    for coef in (0.0, 0.3, 0.0):
        model.set_mtp_loss_coef(coef)
        found.append(_prefetched(model))
    return found


def _shard(model, num_ranks: int):
    return shard_model(model, ParallelLayout(world_size=num_ranks, ranks_per_node=num_ranks).distributed_config())


def _prefetched(model) -> dict:
    input_ids = torch.arange(8)[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = model(input_ids=input_ids, labels=input_ids, use_cache=False, chunked_loss=True)
        output.loss.nan_to_num().backward()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    found: dict = {}
    for direction in ("forward", "backward"):
        head = f"FSDP::{direction}_prefetch for "
        found[direction] = [event.name.removeprefix(head) for event in events if event.name.startswith(head)]
    return found


def accelerate_door(refused: list[dict]) -> list[dict]:
    """Trainers as with `distributed_type: FSDP` in the launch config: those that must be refused, then a good one."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    results = []
    for environment in (*refused, {}):
        before = dict(os.environ)
        os.environ |= environment
        try:
            results.append(door())
        except ValueError as error:
            results.append({"error": str(error)})
        os.environ.update(before)
        for name in environment.keys() - before.keys():
            del os.environ[name]
    return results


def door() -> dict:
    """What Accelerate makes of a model. TWO_DOORS in the environment: of one that is sharded already."""
    model = build(Qwen3MoeForCausalLM, moe_config())
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, ep_size=2, per_device_train_batch_size=1)
        if "TWO_DOORS" in os.environ:
            model = shard_model(model, args.parallel_layout.distributed_config())
        trainer = MoETrainer(model=model, args=args)
        trainer._prepare_for_training(1, None, None)
    parameters = dict(trainer.model.named_parameters())
    local = sum(p.to_local().numel() for p in parameters.values())
    return {
        "type": str(trainer.accelerator.distributed_type),
        "all sharded": all(isinstance(p, DTensor) for p in parameters.values()),
        "share": local / sum(p.numel() for p in parameters.values()),
        "units": [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)],
    }
