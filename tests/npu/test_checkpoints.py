"""Checkpoints read onto NPUs: each rank its part, and FP8 dequantised, which NPUs before Ascend 950 cannot cast."""

from __future__ import annotations

import torch

from tests.checkpoint.families import write_case
from tests.npu.ranks import run_on_npus
from xtuner_hf import Qwen3MoeForCausalLM


def test_each_rank_reads_and_dequantises_its_own_part(tmp_path):
    write_case(tmp_path, "qwen3_moe")
    expected = Qwen3MoeForCausalLM.from_pretrained(tmp_path).state_dict()
    for rank in run_on_npus("tests.checkpoint.test_dequantise_on_load:load_sharded", 2, folder=str(tmp_path)):
        assert rank["state"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert rank["state"][name].device.type == "npu"
            assert torch.equal(rank["state"][name].cpu(), tensor), name
