"""The second door: what an FSDP launch config makes of our trainers, on CPU processes too, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.ranks import REPO, run_on_ranks
from xtuner_hf import MoEParallelPlugin, ParallelLayout

CONFIGS = sorted((REPO / "accelerate_configs").glob("*.yaml"))


REFUSED = {
    "both doors": ({"TWO_DOORS": "yes"}, "Two doors at once"),
    "FSDP 1": ({"FSDP_VERSION": "1"}, "write fsdp_version: 2"),
    "loading on rank 0": ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "Set it to false"),
    "recompute": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "pass --gradient_checkpointing"),
}


@pytest.fixture(scope="module")
def doors() -> list[list[dict]]:
    refused = [environment for environment, _ in REFUSED.values()]
    return run_on_ranks("tests.parallel.checks:accelerate_door", 2, refused=refused)


def test_fsdp_is_real_on_cpu_processes(doors):
    for *_, found in doors:
        assert found["type"] == "DistributedType.FSDP"
        assert found["all sharded"]
        assert found["share"] == pytest.approx(0.5, abs=0.01)
        assert "model.layers.0.mlp.experts" in found["units"]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, doors):
    index, sentence = list(REFUSED).index(case), REFUSED[case][1]
    for rank in doors:
        assert sentence in rank[index]["error"]


def test_defaults_and_layout():
    layout = ParallelLayout(world_size=16, ranks_per_node=8, ep_size=8, dp_replicate_size=2)
    plugin = MoEParallelPlugin(layout=layout)
    assert plugin.fsdp_version == 2
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    config = plugin.parallelism_config()
    assert (config.dp_replicate_size, config.dp_shard_size) == (2, 8)
    plugin.check_parallelism(None)
    plugin.check_parallelism(config)
    with pytest.raises(ValueError, match="has dp_replicate_size 4, the training arguments say 2"):
        plugin.check_parallelism(ParallelismConfig(dp_replicate_size=4, dp_shard_size=4))
    with pytest.raises(ValueError, match="has tp_size 2, cp_size 1 and sp_size 1"):
        plugin.check_parallelism(ParallelismConfig(tp_size=2, dp_replicate_size=2, dp_shard_size=4))
    given = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    plugin = MoEParallelPlugin(layout=layout, mixed_precision_policy=given)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy is given
    with pytest.raises(ValueError, match="needs layout"):
        MoEParallelPlugin()
    with pytest.raises(ValueError, match="nothing to shard"):
        MoEParallelPlugin(layout=ParallelLayout(world_size=2, ranks_per_node=2, dp_replicate_size=2))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_configs_are_what_accelerate_reads(path):
    values = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert config.num_processes == values["num_processes"]
    assert config.distributed_type == values["distributed_type"]
    assert config.mixed_precision == "no"  # the trainer's --bf16 decides


@pytest.mark.parametrize("name", ["cpu_2", "cpu_2_fsdp"])
def test_launched(name, tmp_path):
    """One training step from the command line; `--ep_size 2` is all that expert parallelism adds."""
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "--config_file", f"accelerate_configs/{name}.yaml", "--main_process_port", "0"]
    command += ["tests/parallel/launched.py", "--use_cpu", "--ep_size", "2", "--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "src")])}
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "experts (ep)    [  0     1 ]" in result.stderr
    expected = "DistributedType.FSDP" if name.endswith("fsdp") else "DistributedType.MULTI_CPU"
    assert "sequential all_reduce" not in result.stderr
    assert f"trained as {expected} with 36 sharded parameters" in result.stdout
