"""`xtuner-hf bench` in tiny, on this machine: what it writes, and that it compares like with like."""

from __future__ import annotations

import json

import pytest
import torch

from xtuner_hf.bench import arguments, rates
from xtuner_hf.bench.run import VARIANTS, Case, _documents, measure
from xtuner_hf.bench.shapes import SHAPES
from xtuner_hf.cli import main
from xtuner_hf.models.auto import AutoModelForCausalLM
from xtuner_hf.plan.costs import Costs
from xtuner_hf.plan.devices import PlanError, find_device

CPU = torch.device("cpu")


def test_the_command_line_offers_what_there_is():
    assert set(arguments.SHAPES) == set(SHAPES)
    assert set(arguments.VARIANTS) == set(VARIANTS)


def bench(out, *options: str) -> list[dict]:
    main(["bench", "--tiny", "--out", str(out), "--lengths", "32", "--recomputes", "none", "--steps", "1", *options])
    return json.loads((out / "bench.json").read_text())["cases"]


@pytest.fixture(scope="module")
def every_shape(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    bench(out, "--tokens", "64", "--warmup", "1", "--routings", "real", "--variants", "ours", "stock grouped_mm")
    return out


def test_every_shape_runs(every_shape):
    results = json.loads((every_shape / "bench.json").read_text())
    assert len(results["cases"]) == 2 * len(SHAPES)
    for case in results["cases"]:
        assert "error" not in case, case
        seconds = case["seconds"]
        assert 0 < seconds["forward"] + seconds["backward"] + seconds["optimizer"] <= seconds["step"]
        assert case["tokens_per_second"] == pytest.approx(64 / seconds["step"])
        assert case["model_tflops_of_passes"] > case["model_tflops"]
        assert case["largest_load"] > 1.0
    assert results["layers"]["deepseek-v3"] == "2 of 61"


def test_table_plot_and_efficiencies(every_shape):
    lines = (every_shape / "bench.md").read_text().splitlines()
    assert len(lines) == 2 + 2 * len(SHAPES)
    assert len({line.count("|") for line in lines}) == 1
    assert (every_shape / "bench.png").stat().st_size > 10_000
    measured = json.loads((every_shape / "efficiencies.json").read_text())
    assert measured["device"] == "cpu"
    names = {"dense_matmul", "grouped_matmul", "attention_forward", "attention_backward"}
    assert set(measured["efficiencies"]) == names
    assert all(value > 0 for value in measured["efficiencies"].values())


def test_the_planner_takes_what_was_measured(every_shape, tmp_path):
    """Parts of the rate that was measured become parts of the data sheet's; those of another device are refused."""
    file = every_shape / "efficiencies.json"
    with pytest.raises(PlanError, match="measured on 'cpu', which is not what 'h100' means"):
        find_device("h100", file)
    measured = json.loads(file.read_text())
    on_h100 = tmp_path / "efficiencies.json"
    on_h100.write_text(json.dumps(measured | {"device": "NVIDIA H100 80GB HBM3"}))
    taken = find_device("h100", on_h100).efficiencies
    for name, part in measured["efficiencies"].items():
        assert taken[name] * 989e12 == pytest.approx(part * measured["flops_per_second"])
    with pytest.raises(PlanError, match="H100 80GB HBM3', which is not what 'h200' means"):
        find_device("h200", on_h100)


def test_attention_is_measured_in_the_planners_flops(monkeypatch):
    """Backward as 5 products of queries and keys, forward as 2: the planner divides its FLOPs by these rates."""
    seconds = iter((1.0, 4.0))  # forward, forward and backward
    monkeypatch.setattr(rates, "seconds_of", lambda function, device: next(seconds))
    config = SHAPES["qwen3-30b-a3b"].made_tiny().config()
    found = rates._attention(config, 64, 32, CPU, torch.float32)
    q, k, v = (torch.empty(64, config.num_attention_heads, config.head_dim) for _ in range(3))
    costs = Costs(find_device("h100"), [32, 32])
    forward, _ = costs.flops("_varlen_attn", (q, k, v), {})
    backward, _ = costs.flops("_varlen_attn_backward", (None, q, k, v), {})
    assert found == {"attention_forward": forward / 1.0, "attention_backward": backward / 3.0}


def test_every_variant_runs_and_one_that_cannot_does_not_end_the_run(tmp_path):
    found = bench(tmp_path, "--tokens", "64", "--warmup", "0", "--routings", "balanced", "--shapes", "gpt-oss-20b")
    assert [case["variant"] for case in found] == list(VARIANTS)
    for case in found:
        if case["variant"] == "stock sonicmoe":  # for GPUs, and downloaded by transformers
            assert case["error"]
        else:
            assert case["largest_load"] == 1.0
    lines = (tmp_path / "bench.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_tokens_are_documents_by_zipfs_law():
    documents = _documents(Case("qwen3-30b-a3b", "ours", 16, 64, "real", "none"), steps=20)
    tokens = torch.tensor(documents["input_ids"])
    assert tokens.shape == (20 * 64 // 16, 16)
    counts = tokens.flatten().bincount(minlength=10)
    assert counts[:2].sum() == 0, "nothing that ends or pads"
    assert counts[2] == counts.max()


def test_the_widths_are_the_published_ones():
    def parameters(name: str) -> float:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(SHAPES[name].config())
        layers = sum(p.numel() for key, p in model.named_parameters() if ".layers." in key)
        return layers / SHAPES[name].layers

    # Billions of parameters of a layer: published totals without embeddings, divided by the layers.
    assert parameters("qwen3-30b-a3b") == pytest.approx(29.9e9 / 48, rel=0.01)
    assert parameters("qwen3-235b-a22b") == pytest.approx(233.8e9 / 94, rel=0.01)
    assert parameters("gpt-oss-20b") == pytest.approx(19.7e9 / 24, rel=0.02)
    assert parameters("deepseek-v3") == pytest.approx(11.5e9, rel=0.01)


def test_full_recompute_is_measured_too():
    shape = SHAPES["qwen3-30b-a3b"].made_tiny()
    for variant in ("ours", "stock grouped_mm"):
        case = Case("qwen3-30b-a3b", variant, 32, 64, "real", "full")
        assert measure(case, shape, CPU, steps=1, warmup=0)["seconds"]["backward"] > 0
