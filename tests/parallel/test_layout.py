"""Layouts that cannot be say so in one sentence; those that can are drawn."""

from __future__ import annotations

import re

import pytest

from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.trainers.arguments import MoETrainingArguments


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        pytest.param(
            {"world_size": 16, "ranks_per_node": 8, "ep_size": 16},
            "ep_size 16 is larger than a node, which has 8 ranks; choose a divisor of 8, or set ep_across_nodes",
            id="EP larger than a node",
        ),
        pytest.param(
            {"world_size": 24, "ranks_per_node": 6, "ep_size": 4},
            "ep_size 4 does not divide the 6 ranks of a node, so some expert-parallel groups would reach over two",
            id="EP across nodes",
        ),
        pytest.param(
            {"world_size": 16, "ranks_per_node": 8, "sp_size": 16},
            "sp_size 16 is larger than a node, which has 8 ranks; choose a divisor of 8, or set sp_across_nodes",
            id="SP larger than a node",
        ),
        pytest.param(
            {"world_size": 24, "ranks_per_node": 6, "sp_size": 4},
            "some sequence-parallel groups would reach over two nodes",
            id="SP across nodes",
        ),
        pytest.param(
            {"world_size": 8, "ranks_per_node": 8, "ep_size": 3},
            "ep_size 3 does not divide the 8 ranks that hold one copy of the parameters",
            id="EP does not multiply to the world",
        ),
        pytest.param(
            {"world_size": 16, "ranks_per_node": 8, "ep_size": 8, "dp_replicate_size": 4},
            "ep_size 8 does not divide the 4 ranks that hold one copy of the parameters (4 copies of 4), so the sizes "
            "do not multiply to the 16 ranks",
            id="EP and HSDP do not multiply to the world",
        ),
        pytest.param(
            {"world_size": 16, "ranks_per_node": 8, "dp_replicate_size": 3},
            "dp_replicate_size 3 does not divide the 16 ranks of this job; choose a divisor of 16, the number of nodes "
            "(2) say",
            id="HSDP does not multiply to the world",
        ),
        pytest.param(
            {"world_size": 12, "ranks_per_node": 8}, "12 ranks do not make whole nodes of 8", id="unequal nodes"
        ),
        pytest.param(
            {"world_size": 8, "ranks_per_node": 8, "ep_size": 0}, "ep_size is 0; it must be 1 or more", id="0"
        ),
    ],
)
def test_bad_sizes(sizes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ParallelLayout(**sizes)


@pytest.mark.parametrize("sizes", [{"ep_size": 16, "ep_across_nodes": True}, {"sp_size": 16, "sp_across_nodes": True}])
def test_groups_over_nodes_with_consent(sizes):
    assert ParallelLayout(world_size=16, ranks_per_node=8, **sizes).num_nodes == 2


def test_experts():
    layout = ParallelLayout(world_size=8, ranks_per_node=8, ep_size=8)
    layout.check_experts(128)
    with pytest.raises(ValueError, match="ep_size 8 does not divide the model's 60 experts"):
        layout.check_experts(60)
    with pytest.raises(ValueError, match="ep_size is 8, but the model has no experts; leave ep_size at 1"):
        layout.check_experts(None)
    ParallelLayout(world_size=8, ranks_per_node=8).check_experts(None)


def test_sizes_multiply_to_the_world():
    layout = ParallelLayout(world_size=64, ranks_per_node=8, ep_size=8, sp_size=4, dp_replicate_size=2)
    assert (layout.fsdp_size, layout.efsdp_size, layout.data_size, layout.num_nodes) == (32, 4, 16, 8)
    config = layout.distributed_config(bf16=True)
    assert (config.fsdp_size, config.efsdp_size, config.ep_size, config.dp_replicate_size) == (32, 4, 8, 2)
    assert config.fsdp_mixed_precision


def test_picture_of_one_node():
    assert ParallelLayout(world_size=8, ranks_per_node=8, ep_size=4).picture().splitlines() == [
        "node 0",
        "  rank               0     1     2     3     4     5     6     7",
        "  parameter shard [  0     1     2     3     4     5     6     7 ]",
        "  experts (ep)    [  0     1     2     3 ][  0     1     2     3 ]",
        "  expert shard       0     0     0     0     1     1     1     1",
    ]


def test_picture_of_copies_and_of_many_nodes():
    picture = ParallelLayout(world_size=64, ranks_per_node=8, ep_size=8, dp_replicate_size=2, sp_size=2).picture()
    lines = picture.splitlines()
    assert lines[0] == "node 0"
    assert "nodes 2 to 6 go on in the same way" in lines
    last = lines[lines.index("node 7") + 1 :]
    assert last == [
        "  rank              56    57    58    59    60    61    62    63",
        "  copy               1     1     1     1     1     1     1     1",
        "  parameter shard   24    25    26    27    28    29    30    31 ]",
        "  experts (ep)    [  0     1     2     3     4     5     6     7 ]",
        "  expert shard       3     3     3     3     3     3     3     3",
        "  sequence (sp)   [  0     1 ][  0     1 ][  0     1 ][  0     1 ]",
    ]


def test_description():
    layout = ParallelLayout(world_size=16, ranks_per_node=8, ep_size=8)
    assert layout.describe(128) == (
        "16 ranks on 2 nodes of 8; parameters: 1 copy in 16 shards; experts: 16 of 128 computed on a rank (ep 8), "
        "stored in 2 shards"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"expert_dispatch": "deep_ep"},
            "expert_dispatch is 'deep_ep'; it must be one of all_reduce, all_to_all",
        ),
        ({"dp_replicate_size": 0}, "dp_replicate_size is 0; it must be 1 or more"),
    ],
)
def test_bad_arguments(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        MoETrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)


def test_ep_on_one_process_is_an_error(tmp_path):
    args = MoETrainingArguments(output_dir=str(tmp_path), use_cpu=True, ep_size=2)
    with pytest.raises(ValueError, match="ep_size 2 does not divide the 1 ranks"):
        _ = args.parallel_layout


def test_unknown_nodes_are_an_error(monkeypatch):
    from xtuner_hf._compat import ranks_per_node

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_per_node(1) == 1
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE is not set"):
        ranks_per_node(8)
