from __future__ import annotations

import pytest

from tests import vision
from tests.families import ALL_FAMILIES
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.plan.devices import find_device
from xtuner_hf.plan.dry_run import dry_run
from xtuner_hf.plan.extrapolate import full_depth, shallow_depths
from xtuner_hf.plan.job import Job

DEEP = {
    "qwen3_moe": {"num_hidden_layers": 10, "mlp_only_layers": [], "hidden_size": 256, "moe_intermediate_size": 128},
    "gpt_oss": {"num_hidden_layers": 10, "hidden_size": 256, "intermediate_size": 128},
    "deepseek_v3": {"num_hidden_layers": 10, "hidden_size": 256, "moe_intermediate_size": 128},
}


@pytest.mark.parametrize(
    ("family", "ranks", "changes"),
    [
        ("qwen3_moe", 16, {"recompute": "full"}),  # peaks where gradients are nearly whole
        ("gpt_oss", 16, {"recompute": "none"}),  # peaks where activations are whole
        ("deepseek_v3", 16, {"activation_offload": True, "recompute": "selective"}),
    ],
)
def test_two_shallow_models_tell_the_deep_one(family, ranks, changes):
    config = ALL_FAMILIES[family].make_config(**DEEP[family])
    layout = ParallelLayout(ranks, 8, ep_size=8 if family == "deepseek_v3" else 1)
    job = Job(config, layout, find_device("h100"), seq_len=512, **changes)
    assert shallow_depths(job.config) is not None
    deep, told = dry_run(job), full_depth(job)
    assert told.peak.total == pytest.approx(deep.peak.total, rel=0.01)
    assert told.reserved == pytest.approx(deep.reserved, rel=0.01)
    assert told.host_peak == pytest.approx(deep.host_peak, rel=0.01)
    assert told.seconds == pytest.approx(deep.seconds, rel=0.01)
    assert told.model_flops == pytest.approx(deep.model_flops, rel=1e-9)
    assert told.num_parameters == deep.num_parameters
    for key, traffic in deep.traffic.items():
        assert told.traffic[key].buffer_bytes == pytest.approx(traffic.buffer_bytes, rel=0.01)


def test_a_tower_stays_as_deep_as_it_is():
    config = vision.config("internvl_moe", text=DEEP["qwen3_moe"], num_hidden_layers=3)
    job = Job(config, ParallelLayout(16, 8), find_device("h100"), seq_len=512, tiles_per_row=8)
    deep, told = dry_run(job), full_depth(job)
    assert {"vision layer 0", "vision layer 2", "layer -1"} <= told.peaks.keys()
    assert told.peak.total == pytest.approx(deep.peak.total, rel=0.01)
    assert told.seconds == pytest.approx(deep.seconds, rel=0.01)
    assert told.model_flops == pytest.approx(deep.model_flops, rel=1e-9)
    assert told.num_parameters == deep.num_parameters


def test_a_shallow_model_is_run_as_it_is():
    config = ALL_FAMILIES["qwen3_moe"].make_config(num_hidden_layers=4)
    assert shallow_depths(config) is None


def test_shallow_models_keep_the_pattern_of_layers():
    config = ALL_FAMILIES["gpt_oss"].make_config(num_hidden_layers=24)
    less, more = shallow_depths(config)
    assert (more - less) % 2 == 0
