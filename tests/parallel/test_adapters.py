"""LoRA on fused experts: the same training under every layout, and files that PEFT, transformers and others read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from tests.families import FAMILIES, tokens
from tests.parallel.lora import ADAPTER, train
from tests.ranks import run_on_ranks
from xtuner_hf import cli
from xtuner_hf.checkpoint.export_plan import ExportError

RUN = "tests.parallel.lora:run_layouts"
# EP 4 keeps its checkpoints and is exported; the next one goes on from its second step under EP 2.
LAYOUTS = [
    {"ep_size": 4, "export": True, "init_lora_weights": True, "output_dir": "ep4"},
    {"ep_size": 2, "export": True, "init_lora_weights": True, "resume": "ep4/checkpoint-2"},
    {"ep_size": 4, "save_strategy": "no"},
    {"ep_size": 2, "accumulation": 2, "save_strategy": "no", "gradient_checkpointing": True},
    {"ep_size": 2, "dp_replicate_size": 2, "save_strategy": "no", "expert_dispatch": "all_to_all"},
    {"ep_size": 1, "save_strategy": "no", "experts_kernel": "reference"},
    {"sp_size": 2, "ep_size": 2, "accumulation": 2, "save_strategy": "no", "recompute": "selective"},
    {"ep_size": 2, "save_strategy": "no", "family": "gpt_oss"},
    {"sp_size": 4, "ep_size": 2, "save_strategy": "no", "family": "gpt_oss"},
]
SFT = {"kind": "MoESFTTrainer", "save_strategy": "no"}
# By the reference that they are compared with.
DOORS = {"random": {"sp_size": 2, "ep_size": 2, "save_strategy": "no"}, "sft": {"ep_size": 2, **SFT}}
BF16 = {"ep_size": 2, "save_strategy": "no", "bf16": True, "export": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def references(folder) -> dict[str, dict]:
    """One process: random factors, PEFT's own start, TRL's `peft_config`, GPT-OSS."""
    runs = {
        "random": {"save_strategy": "no"},
        "zero": {"init_lora_weights": True, "export": True, "output_dir": str(folder / "one")},
        "sft": SFT,
        "gpt_oss": {"family": "gpt_oss", "save_strategy": "no"},
    }
    found = run_on_ranks(RUN, 1, folder=str(folder / "references"), layouts=list(runs.values()))[0]
    return dict(zip(runs, found, strict=True))


@pytest.fixture(scope="module")
def on_4_ranks(folder) -> list[dict]:
    layouts = [dict(layout) for layout in LAYOUTS]
    for layout in layouts:
        layout |= {key: str(folder / layout[key]) for key in ("output_dir", "resume") if key in layout}
    layouts[1]["output_dir"] = str(folder / "ep2")
    return run_on_ranks(RUN, 4, folder=str(folder / "4"), layouts=layouts)[0]


def assert_same(run: dict, reference: dict, tolerance: float = 1e-5) -> None:
    assert run["losses"]
    for part in ("losses", "norms"):
        for step, value in run[part].items():
            assert value == pytest.approx(reference[part][step], rel=tolerance), (part, step)
    assert run["adapter"].keys() == reference["adapter"].keys()
    for name, expected in reference["adapter"].items():
        # Adam divides by the gradient's size: a tensor's few entries whose gradient nearly cancels differ more (1.6e-5
        # between two kernels for experts).
        assert (run["adapter"][name] - expected).norm() < 5 * tolerance * expected.norm(), name


@pytest.mark.parametrize("index", range(2, 7))
def test_every_layout_trains_the_same_adapter(index, on_4_ranks, references):
    run = on_4_ranks[index]
    assert_same(run, references["random"])
    assert all(torch.equal(run["start"][name], tensor) for name, tensor in references["random"]["start"].items())
    assert run["grads"][0].keys() == {name for name in run["start"]}
    placements = {name: place for name, place in run["placements"].items() if "experts" in name and "lora" in name}
    assert placements
    assert all("Shard(dim=0)" in place for place in placements.values())


def test_transposed_experts_with_biases(on_4_ranks, references):
    for run in on_4_ranks[7:]:
        assert_same(run, references["gpt_oss"])


def test_resumed_under_another_layout(on_4_ranks, references):
    assert sorted(on_4_ranks[1]["losses"]) == [3, 4]
    assert_same(on_4_ranks[1], references["zero"])


def test_both_doors_and_trl(folder, references):
    """`peft_config` comes around a model that is already sharded; Accelerate shards one that has adapters."""
    layouts = [*DOORS.values(), BF16]
    runs = run_on_ranks(
        RUN, 2, folder=str(folder / "2"), layouts=[*layouts, *layouts], through_accelerate=len(layouts)
    )[0]
    for first in (0, len(layouts)):
        *of_door, bf16 = runs[first : first + len(layouts)]
        for run, reference in zip(of_door, DOORS, strict=True):
            assert_same(run, references[reference])
        assert bf16["losses"] == pytest.approx(references["random"]["losses"], rel=1e-2)
        saved = load_file(folder / "2" / str(first + len(DOORS)) / "adapter" / "adapter_model.safetensors")
        assert {name.replace(".weight", ".default.weight") for name in saved} == bf16["adapter"].keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor.double(), bf16["adapter"][name.replace(".weight", ".default.weight")]), name


def test_no_zero_rows_after_a_save_under_ep(on_4_ranks, folder):
    """Every expert that got tokens moved its factor away from PEFT's zeros, whichever rank it lives on."""
    saved = load_file(folder / "ep4" / "adapter" / "adapter_model.safetensors")
    moved = {name: tensor for name, tensor in saved.items() if "experts" in name and "lora_B" in name}
    assert len(moved) == 4
    for name, tensor in moved.items():
        of_expert = tensor.view(tensor.shape[0], -1, 8)
        assert (of_expert.abs().amax(dim=(0, 1)) > 0).all(), name
        assert (tensor.abs().amax(dim=1) > 0).all(), name
    trained = on_4_ranks[0]["adapter"]
    for name, tensor in saved.items():
        assert torch.equal(tensor.double(), trained[name.replace(".weight", ".default.weight")]), name


@pytest.fixture(scope="module")
def merged_logits(on_4_ranks, folder) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The base model's checkpoint, its logits, and those of stock PEFT around stock transformers with our adapter."""
    base = folder / "base"
    FAMILIES["qwen3_moe"].ours(torch.float32).save_pretrained(base)
    stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert type(stock).__module__.startswith("transformers.")
    before = stock(tokens()).logits.detach()
    adapted = PeftModel.from_pretrained(stock, folder / "ep4" / "adapter")
    logits = adapted(tokens()).logits.detach()
    merged = adapted.merge_and_unload()
    assert (merged(tokens()).logits - logits).abs().max() < 1e-4
    return base, before, logits


def test_stock_peft_loads_and_merges(merged_logits):
    _, before, logits = merged_logits
    assert (logits - before).abs().max() > 0.1


def test_no_rank_held_a_whole_fused_tensor_while_merging(on_4_ranks):
    fused_bytes = 8 * 2 * 48 * 64 * 4
    assert fused_bytes // 8 < on_4_ranks[0]["largest tensor"] <= fused_bytes // 4


def test_merged_checkpoint(merged_logits, folder):
    """Written by the ranks that own the experts: what PEFT merges, and tensor by tensor what one process writes."""
    _, _, logits = merged_logits
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder / "ep4" / "merged", dtype=torch.float32)
    assert (stock(tokens()).logits - logits).abs().max() < 1e-4
    found, expected = (load_file(folder / name / "merged" / "model.safetensors") for name in ("ep4", "one"))
    assert found.keys() == expected.keys()
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in found
    assert not any("lora" in name or "base_layer" in name for name in found)
    assert all((found[name] - tensor).norm() < 1e-5 * tensor.norm() for name, tensor in expected.items())


def test_adapter_of_a_training_checkpoint(merged_logits, folder, tmp_path):
    """PEFT's layout, and the one with a tensor for each expert, which PEFT converts back: the same logits."""
    base, _, logits = merged_logits
    checkpoint = str(folder / "ep4" / "checkpoint-4")
    cli.main(["convert", checkpoint, str(tmp_path / "fused")])
    cli.main(["convert", checkpoint, str(tmp_path / "single"), "--per-expert"])
    names = set(load_file(tmp_path / "single" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_B.weight" in names
    config = json.loads((tmp_path / "single" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    for layout in ("fused", "single"):
        stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(stock, tmp_path / layout)
        assert (adapted(tokens()).logits - logits).abs().max() < 1e-4, layout
    assert (tmp_path / "fused" / "tokenizer.json").exists()


def test_what_has_no_layout_for_single_experts(tmp_path):
    train(str(tmp_path / "run"), family="gpt_oss", stop_after=2)
    with pytest.raises(ExportError, match="Checkpoints of gpt_oss do not hold experts one by one"):
        cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--per-expert"])


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="set experts_kernel to one of auto, reference, grouped_mm"):
        train(str(tmp_path / "kernel"), experts_kernel="batched_mm")
    biases = {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.down_proj_bias"]}
    with pytest.raises(ValueError, match="an adapter on down_proj_bias of the experts"):
        train(str(tmp_path / "bias"), family="gpt_oss", adapter=ADAPTER | biases)
