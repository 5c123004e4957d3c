"""How parameters lie: without padding, read without waste, gathered ahead of time, reduced in fp32."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny import build, moe_config
from xtuner_hf import Qwen3MoeForCausalLM

STORAGE = {
    "8 experts on 16 ranks": ({"num_ranks": 16}, "Shard(dim=2)"),
    "4 experts on 8 ranks, 2 copies": ({"num_ranks": 32, "ep_size": 2, "dp_replicate_size": 2}, "Shard(dim=2)"),
    "4 experts on 4 ranks": ({"num_ranks": 8, "ep_size": 2}, "_StridedShard(dim=0"),
}


@pytest.fixture(scope="module")
def pretended() -> dict:
    """Checks on one rank of jobs whose other ranks do not exist."""
    checks = {case: {"check": "storage_of_experts", **sizes} for case, (sizes, _) in STORAGE.items()}
    for bf16_parameters in (False, True):
        checks[bf16_parameters] = {
            "check": "reduction_and_casts",
            "num_ranks": 4,
            "bf16_parameters": bf16_parameters,
        }
    checks["prefetch"] = {"check": "prefetch_order", "num_ranks": 4}
    checks["prefetch of further layers"] = {"check": "prefetch_of_mtp", "num_ranks": 4}
    found = run_on_ranks("tests.parallel.checks:on_pretended_ranks", 1, checks=list(checks.values()))[0]
    return dict(zip(checks, found, strict=True))


@pytest.mark.parametrize("case", STORAGE)
def test_experts_are_stored_without_padding(case, pretended):
    found, placement = pretended[case], STORAGE[case][1]
    assert found["stored"] == found["share"]
    assert placement in found["placements"]["gate_up_proj"]


def test_padding_that_cannot_be_avoided_is_logged(caplog):
    from xtuner_hf.parallel.shard import expert_placement

    experts = build(Qwen3MoeForCausalLM, moe_config()).model.layers[0].mlp.experts
    place = expert_placement(experts, 6)
    assert place(experts.gate_up_proj).dim == 0
    assert "Neither the 8 experts of a rank nor the hidden size 64 divide evenly over 6 ranks" in caplog.text
    assert "padded to 12, 50 % more memory" in caplog.text


@pytest.mark.parametrize("bf16_parameters", [False, True])
def test_gradients_are_reduced_in_fp32_and_routing_weights_stay_fp32(bf16_parameters, pretended):
    policies = pretended[bf16_parameters]
    assert len(policies) == 9
    for name, policy in policies.items():
        assert policy.param_dtype == torch.bfloat16
        assert policy.reduce_dtype == torch.float32
        # FSDP would cast the experts' inputs to bf16, the fp32 weights of the router among them.
        assert policy.cast_forward_inputs == (not name.endswith("experts"))


def test_every_block_prefetches_the_next_and_its_experts(pretended):
    found = pretended["prefetch"]
    layers = ["model.layers.0", "model.layers.0.mlp.experts", "model.layers.1"]
    layers += ["model.layers.2", "model.layers.2.mlp.experts"]
    # FSDP notes what is asked for; asking again for what is gathered already does nothing.
    assert list(dict.fromkeys(found["forward"])) == [*layers, "model.norm, lm_head"]
    backward = ["model.layers.2", "model.layers.2.mlp.experts", "model.layers.1"]
    backward += ["model.layers.0", "model.layers.0.mlp.experts", "model.embed_tokens"]
    assert list(dict.fromkeys(found["backward"])) == backward


def test_a_layer_that_does_not_run_is_not_gathered(pretended):
    """A kept multi-token prediction layer would be gathered by the last layer, in every step for nothing."""
    kept, trained, kept_again = pretended["prefetch of further layers"]
    last = max(name for name in trained["forward"] if name.startswith("model.layers."))
    further = last.removesuffix(".mlp.experts")
    for run in (kept, kept_again):
        gathered = {name for direction in run.values() for name in direction}
        assert not any(name.startswith(further) for name in gathered)
        assert "model.norm, lm_head" in run["forward"]
        assert set(trained["forward"]) == set(run["forward"]) | {further, f"{further}.mlp.experts"}


FILE_SIZE = 30e6
LARGE = {"num_experts": 16, "hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 9}
FEW_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}


def large_model() -> Qwen3MoeForCausalLM:
    """102 MB."""
    return build(Qwen3MoeForCausalLM, moe_config(**LARGE, mlp_only_layers=[1]))


@pytest.fixture(scope="module")
def on_4_ranks(tmp_path_factory) -> list[dict]:
    """By rank: a large checkpoint loaded, one of 2 experts loaded, norms and optimizers."""
    large, small = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    large_model().save_pretrained(large, max_shard_size=int(FILE_SIZE))
    build(Qwen3MoeForCausalLM, moe_config(**FEW_EXPERTS)).save_pretrained(small)
    return run_on_ranks("tests.parallel.checks:everything_on_4_ranks", 4, large=str(large), small=str(small))


@pytest.fixture(scope="module")
def norms(on_4_ranks) -> list[list[dict]]:
    """By number of copies, then by rank."""
    return list(zip(*(rank["norms"] for rank in on_4_ranks), strict=True))


def test_norm_over_two_meshes(norms):
    for ranks in norms:
        assert len({found["norm"] for found in ranks}) == 1  # to the last bit
        for found in ranks:
            assert found["norm"] == pytest.approx(found["expected"], rel=1e-6)
            assert found["norm"] == pytest.approx(found["stock"], rel=1e-6)
            assert found["clipped"] == pytest.approx(0.5, rel=1e-5)
            assert found["waits and collectives"] == ["c10d::allreduce_"]


def test_groups_of_the_optimizer(norms):
    for found in (found for ranks in norms for found in ranks):
        groups = found["groups"]
        assert sum(len(group["names"]) for group in groups) == found["parameters"]
        assert all(group["meshes"] == 1 for group in groups)
        assert [all("experts" in name for name in group["names"]) for group in groups] == [False, True, False]
        undecayed = {name for group in groups if group["decay"] == 0 for name in group["names"]}
        assert undecayed == {n for group in groups for n in group["names"] if "norm" in n}


def test_vectors_do_not_decay():
    from xtuner_hf import MoETrainer

    model = torch.nn.Module()
    model.sinks = torch.nn.Parameter(torch.zeros(4))
    model.down_proj_bias = torch.nn.Parameter(torch.zeros(2, 4))
    model.register_buffer("e_score_correction_bias", torch.zeros(4))
    model.projection = torch.nn.Linear(4, 4)
    trainer = object.__new__(MoETrainer)
    assert trainer.get_decay_parameter_names(model) == ["projection.weight"]


def test_loading_takes_a_shard_and_a_file(on_4_ranks):
    """4 ranks: of 102 MB in files of 30, each rank needs memory for its quarter and one file at most."""
    size = sum(p.numel() * p.element_size() for p in large_model().parameters())
    for (found,) in (rank["large"] for rank in on_4_ranks):
        assert found["shard"] == pytest.approx(size / 4, rel=0.01)
        assert 0.9 * found["shard"] < found["peak"] < found["shard"] + FILE_SIZE < 0.6 * size, found


def test_loaded_shards_are_the_checkpoint(on_4_ranks):
    """With 2 experts on 4 ranks too, where a rank reads a part of every expert's columns."""
    expected = build(Qwen3MoeForCausalLM, moe_config(**FEW_EXPERTS)).state_dict()
    for rank in on_4_ranks:
        for run in rank["small"]:
            assert run["state"].keys() == expected.keys()
            assert all(torch.equal(run["state"][name], tensor) for name, tensor in expected.items())
    placements = on_4_ranks[0]["small"][0]["placements"]
    assert "Shard(dim=2)" in placements["model.layers.0.mlp.experts.gate_up_proj"]
    assert "Shard(dim=1)" in placements["model.layers.0.mlp.experts.down_proj"]
