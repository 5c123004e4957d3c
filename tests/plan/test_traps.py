"""What simulations of training get wrong, each once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.plan.real import make_job
from xtuner_hf.models.flops import TrainingFlops
from xtuner_hf.models.manifest import meta_model
from xtuner_hf.parallel.layout import ParallelLayout
from xtuner_hf.plan.devices import find_device
from xtuner_hf.plan.dry_run import dry_run
from xtuner_hf.plan.expert_loads import ExpertChoice, pairs_probabilities
from xtuner_hf.plan.job import Job
from xtuner_hf.plan.models import find_config


def job_235b(ranks: int, layers: int, **changes) -> Job:
    job = Job(find_config("qwen3-235b-a22b"), ParallelLayout(ranks, 8), find_device("h800"), **changes)
    return job.with_layers(layers)


@pytest.fixture(scope="module")
def on_128_ranks():
    return dry_run(job_235b(128, 2))


@pytest.fixture(scope="module")
def on_256_ranks():
    return dry_run(job_235b(256, 2))


def test_the_optimizer_runs_on_shards_and_not_on_global_shapes(on_128_ranks):
    """DTensor's propagation runs each optimizer operator on whole parameters: more than 100 GiB of fp32 in 2 layers."""
    assert on_128_ranks.peaks["optimizer"].total < on_128_ranks.peak.total < 30 * 2**30
    resting = 12 * on_128_ranks.num_parameters / 128
    assert on_128_ranks.resting == pytest.approx(resting, rel=0.01)


def test_nothing_of_the_square_of_the_sequence_is_built():
    """transformers takes fake tensors for tracing and builds masks of S x S: 8 GiB in bf16 at 64K tokens."""
    report = dry_run(job_235b(128, 1, seq_len=65536))
    for peak in report.peaks.values():
        for alike in peak.holders:
            assert sum(size >= 65536 for size in alike.shape) <= 1


def test_more_ranks_than_experts_do_not_double_them(on_128_ranks, on_256_ranks):
    """`Shard(0)` pads 128 experts to 256; the hidden dimension is sharded in its place."""
    assert on_256_ranks.resting == pytest.approx(on_128_ranks.resting / 2, rel=0.02)
    kinds = ("fsdp", "all-gather", "forward")
    assert on_256_ranks.traffic[kinds].buffer_bytes == pytest.approx(on_128_ranks.traffic[kinds].buffer_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3", "glm-4.5-air"])
def test_every_matrix_product_is_counted(name):
    """Counters lack formulas of grouped products and of attention kernels. Here the executed FLOPs are those of
    models/flops.py, and the router's, the recomputed scores in attention's backward, and the recomputed layers'."""
    job = Job(find_config(name), ParallelLayout(8, 8), find_device("h100"), seq_len=2048, recompute="none")
    job = job.with_layers(2 if job.config.model_type != "deepseek_v3" else 5)
    report = dry_run(job)
    done = {phase: sum(work.flops.values()) for phase, work in report.work.items()}
    model = meta_model(job.config)
    config = job.config
    routers = (job.config.num_hidden_layers - (getattr(config, "first_k_dense_replace", 0) or 0)) * 6 * 2048
    routers *= config.hidden_size * job.num_experts
    # Backward makes the scores of attention once more, and the head's logits.
    attention = sum(work.flops.get("attention_backward", 0) for work in report.work.values())
    forward_attention = report.work["forward"].flops["attention_forward"]
    head = 2 * 2047 * config.hidden_size * config.vocab_size
    useful = TrainingFlops.of_model(model)(2048, 2048**2) + routers
    total = sum(done.values()) - head - (attention - 2 * forward_attention)
    # There, windows are counted as if every token met a full one; here, MLA's values are as wide as its keys.
    differs = config.model_type in ("gpt_oss", "deepseek_v3")
    assert total == pytest.approx(useful, rel=0.02 if differs else 0.002)


@pytest.mark.parametrize(
    ("family", "changes", "sizes"),
    [
        ("deepseek_v3", {}, {"ep_size": 2}),
        ("gpt_oss", {"optimizer_offload": True, "optimizer_states": "bf16"}, {}),
    ],
)
def test_a_whole_first_step_would_change_nothing(family, changes, sizes, monkeypatch):
    """Before the step that is observed, the optimizer makes its states from gradients of zeros."""
    job = make_job(family, 2, changes, **sizes)
    quick = dry_run(job)
    monkeypatch.setattr("xtuner_hf.plan.dry_run.begin_training", lambda step, batch, phase: step.run(batch, phase))
    whole = dry_run(job)
    assert whole.peaks.keys() == quick.peaks.keys()
    for region, peak in whole.peaks.items():
        if region != "setup":
            assert Counter(peak.by_category) == Counter(quick.peaks[region].by_category), region
            pools = [sorted(filter(None, peak_of.pools.values())) for peak_of in (peak, quick.peaks[region])]
            assert pools[0] == pools[1], region
    for name in ("reserved", "resting", "host_peak", "traffic", "work", "host_bytes_moved"):
        assert getattr(whole, name) == getattr(quick, name), name
    assert whole.seconds == pytest.approx(quick.seconds)


def test_recompute_is_told_from_backward():
    with_recompute, without = (dry_run(make_job("qwen3_moe", 2, {"recompute": how})) for how in ("full", "none"))
    assert "recompute" not in without.work
    forward = with_recompute.work["forward"].flops
    assert with_recompute.work["recompute"].flops["grouped_matmul"] == forward["grouped_matmul"]
    assert with_recompute.work["backward"].flops == without.work["backward"].flops
    # the head is no layer and not recomputed by it
    assert with_recompute.work["recompute"].flops["dense_matmul"] < forward["dense_matmul"]


def test_transfers_overlap_with_computing(on_128_ranks):
    links = sum(on_128_ranks.link_seconds.values())
    assert max(on_128_ranks.compute_seconds, links) < on_128_ranks.seconds < on_128_ranks.compute_seconds + links


def test_the_hosts_waits_are_counted():
    alone, with_experts = (dry_run(make_job("deepseek_v3", 4, {}, ep_size=size)) for size in (1, 4))
    # Documents, labels; with EP also once for each of two MoE layers, forward and recomputed.
    assert with_experts.host_waits == alone.host_waits + 4


def test_offloaded_inputs_are_on_the_host_and_not_on_the_device():
    kept, offloaded = (
        dry_run(job_235b(128, 4, seq_len=16384, activation_offload=offload)) for offload in (False, True)
    )
    one_input = 16384 * 4096 * 2
    assert offloaded.host_peak == pytest.approx(4 * one_input, rel=0.01)
    assert kept.host_peak == 0
    saved = kept.peaks["backward"].total - offloaded.peaks["backward"].total
    assert saved == pytest.approx(3 * one_input, rel=0.05)
    assert offloaded.host_bytes_moved == pytest.approx(7 * one_input, rel=0.01)  # the last one is still there


def test_even_loads_are_the_hypergeometric_ones():
    """Top-8 of 128 experts on 8 ranks meet 5.3 ranks; DeepSeek's groups limit a token to 4 of 8."""
    some = 1 - pairs_probabilities(ExpertChoice(128), 8, 16, 1.0)[0]
    assert 8 * some == pytest.approx(5.34, abs=0.01)
    limited = pairs_probabilities(ExpertChoice(256, 8, 4), 8, 32, 1.0)
    assert limited[0] > 0.5
    assert sum(pairs * p for pairs, p in enumerate(limited)) == pytest.approx(1.0)


@pytest.mark.parametrize("load", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("choice", [ExpertChoice(128), ExpertChoice(256, 8, 4), ExpertChoice(384)])
def test_a_busier_rank_gets_so_many_times_the_pairs(choice, load):
    here = choice.num_experts // 8
    probabilities = pairs_probabilities(choice, 8, here, load)
    assert sum(probabilities) == pytest.approx(1.0)
    assert sum(pairs * p for pairs, p in enumerate(probabilities)) == pytest.approx(load, rel=1e-6)


def test_the_even_loads_are_those_of_random_routing():
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(20000, 128, generator=generator).topk(8, dim=1).indices
    pairs_T = (ids_TK < 16).sum(1)
    found = torch.bincount(pairs_T, minlength=9) / len(pairs_T)
    expected = torch.tensor(pairs_probabilities(ExpertChoice(128), 8, 16, 1.0))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def kept(report) -> list:
    """The largest tensors that wait for the layers' backward."""
    return [alike for alike in report.peaks["backward"].holders if alike.category == "activations"]


def test_experts_take_the_way_of_the_planned_device():
    """CUDA's fused path builds no [T*K, H] in fp32, and of all rows keeps [T*K, 2*I] alone for backward. What stands
    for an NPU computes step by step."""
    rows = 8192 * 8
    job = job_235b(128, 1, seq_len=8192, recompute="none")
    fused, stepwise = (dry_run(replace(job, device=find_device(name))) for name in ("h800", "ascend-a2"))
    assert {alike.shape for alike in kept(fused) if rows in alike.shape} == {(rows, 3072)}
    assert {alike.shape for alike in kept(stepwise) if rows in alike.shape} >= {
        (rows, 3072),
        (rows, 1536),
        (rows, 4096),
    }
    fp32_rows = {alike for peak in fused.peaks.values() for alike in peak.holders if alike.dtype == "float32"}
    assert (rows, 4096) not in {alike.shape for alike in fp32_rows}


def test_weights_gathered_in_fp8_take_half_and_are_counted_once():
    """They stand for tensors of bf16, whose bytes are nowhere: 4.5 GiB too many in four layers."""
    job = Job(find_config("qwen3-30b-a3b"), ParallelLayout(8, 8, ep_size=2), find_device("h100"), seq_len=1024)
    job = job.with_layers(1)
    in_bf16, in_fp8 = (dry_run(replace(job, fp8=fp8)) for fp8 in (False, True))
    gathered = [report.traffic["efsdp", "all-gather", "forward"].buffer_bytes for report in (in_bf16, in_fp8)]
    assert gathered[1] == pytest.approx(gathered[0] / 2, rel=0.001)
    assert in_fp8.peak.by_category["gathered parameters"] < in_bf16.peak.by_category["gathered parameters"]
    for peak in in_fp8.peaks.values():
        whole = [alike for alike in peak.holders if alike.shape == (64, 1536, 2048) and alike.dtype == "bfloat16"]
        assert all(alike.made_by == "_grouped_mm" for alike in whole)  # gradients
    assert in_fp8.compute_seconds < in_bf16.compute_seconds
