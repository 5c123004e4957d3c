"""Weight sync and rollouts on the processes of a job."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from xtuner_hf.rl.engines.contract import EngineError
from xtuner_hf.rl.weight_sync import WeightSync


class Collector:
    """An engine that keeps what it is sent and checks how it comes.

    Args:
        fails_in_layer: raise when that many layers have arrived.
    """

    scores_given_tokens: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    reads_whole_folder: ClassVar[bool] = False

    def __init__(self, fails_in_layer: int | None = None):
        self.layers: list[dict[str, torch.Tensor]] = []
        self.ranks: list[set[int]] = []
        self.calls: list[str] = []
        self.fails_in_layer = fails_in_layer

    def load(self, files: Sequence[Path]) -> None:
        if len(self.layers) == self.fails_in_layer:
            raise EngineError("out of memory")
        assert sorted(files) == sorted(files[0].parent.glob("[!.]*"))  # nothing else lies there
        with ThreadPoolExecutor(1) as reader:  # unseen by the spy, which watches the trainer's thread
            self.layers.append({name: t for loaded in reader.map(load_file, files) for name, t in loaded.items()})
        self.ranks.append({int(re.search(r"rank-(\d+)", file.name)[1]) for file in files})

    def end_update(self, version: str, folder: Path) -> None:
        self.calls.append(f"end_update {version}")

    def __getattr__(self, name: str) -> Any:
        if name not in ("pause", "resume", "begin_update"):
            raise AttributeError(name)
        return lambda: self.calls.append(name)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for layer in self.layers for name, tensor in layer.items()}


def sync_on_ranks(folder: str) -> dict:
    """Sends models that are sharded with expert parallelism; then one whose engine fails half way."""
    from transformers.distributed import DistributedConfig

    from tests.checkpoint.export_scenario import MODELS, Spy
    from xtuner_hf.parallel.shard import shard_model

    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    seen: dict = {}
    for name in ("qwen", "gpt_oss"):
        model = shard_model(MODELS[name](), DistributedConfig(fsdp_size=2, ep_size=2))
        engine = Collector()
        with Spy() as spy:
            WeightSync(engine, Path(folder) / name, group=group, probe_tokens=0)(model, "1")
        seen[name] = {"tensors": engine.tensors, "ranks": engine.ranks, "largest": spy.largest}
    started = time.monotonic()
    try:
        WeightSync(Collector(fails_in_layer=2), Path(folder) / "fails", group=group, probe_tokens=0)(model, "2")
    except Exception as error:
        seen["failure"] = str(error)
    seen["seconds"] = time.monotonic() - started
    return seen


def train_on_ranks(folder: str) -> dict:
    """GRPO with an engine on each rank, R3 and weight sync, also of adapters; then an engine fails on rank 1 alone."""
    from peft import LoraConfig

    from tests.rl.engine import share_of_digits
    from tests.tiny import build, moe_config
    from tests.trainers.preference_scenario import policy, run_quickly
    from tests.trainers.rl_scenario import make_trainer
    from xtuner_hf import MoEGRPOConfig, MoEGRPOTrainer, Qwen3MoeForCausalLM
    from xtuner_hf.rl.engines.local import LocalEngine
    from xtuner_hf.rl.rollouts import EngineRollouts

    def trainer_with(engine: Any, name: str, ranks: int, **further: Any):
        settings = {
            "batch": 8 // ranks,
            "steps": 3,
            "router_replay": "R3",
            "model": policy(0, torch.float32),
            "reward": share_of_digits,
            "ep_size": ranks,
        }
        rollouts = EngineRollouts(engine, Path(folder) / "weights", seed=0)
        settings |= {"rollout_func": rollouts} | further
        return make_trainer(MoEGRPOTrainer, MoEGRPOConfig, str(Path(folder) / name), **settings)

    import os

    ranks = int(os.environ["WORLD_SIZE"])
    trainer, recorder, _ = trainer_with(LocalEngine(build(Qwen3MoeForCausalLM, moe_config(), seed=5)), "a", ranks)
    run_quickly(trainer)
    result = {"logs": recorder.logs}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    engine = LocalEngine(build(Qwen3MoeForCausalLM, moe_config(), seed=5))
    trainer, recorder, _ = trainer_with(engine, "adapted", ranks, peft_config=lora, learning_rate=0.02)
    run_quickly(trainer)
    result["adapted"] = recorder.logs

    class Broken(LocalEngine):
        def generate(self, *positional: Any, **keywords: Any):
            if dist.is_initialized() and dist.get_rank() != 1:
                return super().generate(*positional, **keywords)
            raise EngineError("the server is gone")

    started = time.monotonic()
    trainer, _, _ = trainer_with(Broken(build(Qwen3MoeForCausalLM, moe_config())), "b", ranks)
    try:
        run_quickly(trainer)
    except Exception as error:
        result["failure"] = str(error)
    return result | {"seconds": time.monotonic() - started}
