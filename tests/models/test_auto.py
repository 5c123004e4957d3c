from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny import build, dense_config, moe_config
from xtuner_hf import AutoModelForCausalLM, IncompleteCheckpointError, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from xtuner_hf.models.auto import UnknownFamilyError

FAMILIES = [
    pytest.param(transformers.Qwen3MoeForCausalLM, Qwen3MoeForCausalLM, moe_config(), id="qwen3_moe"),
    pytest.param(transformers.Qwen3ForCausalLM, Qwen3ForCausalLM, dense_config(), id="qwen3"),
]


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(2, 128, (2, 15), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("stock_class", "our_class", "config"), FAMILIES)
def test_a_stock_checkpoint_loads_in_ours_and_ours_in_stock(stock_class, our_class, config, input_ids, tmp_path):
    stock = build(stock_class, config).eval()
    stock.save_pretrained(tmp_path / "stock")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(ours) is our_class
    assert (ours.eval()(input_ids).logits - stock(input_ids).logits).abs().max() < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    before = load_file(tmp_path / "stock" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is stock_class
    assert torch.equal(again.eval()(input_ids).logits, stock(input_ids).logits)


def test_names_on_disk_are_the_hub_s_own(tmp_path):
    build(Qwen3MoeForCausalLM, moe_config()).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.0.mlp.experts.7.{part}.weight" in names
    assert "model.layers.0.mlp.gate.weight" in names
    assert not any("gate_up_proj" in name for name in names)


def test_from_config_makes_our_class():
    assert type(AutoModelForCausalLM.from_config(moe_config())) is Qwen3MoeForCausalLM
    assert type(AutoModelForCausalLM.from_config(dense_config())) is Qwen3ForCausalLM


def test_an_unknown_family_is_named_with_those_that_there_are():
    with pytest.raises(UnknownFamilyError, match=r"'gpt2'; it has: .*qwen3, qwen3_moe"):
        AutoModelForCausalLM.from_config(transformers.GPT2Config())


def test_a_checkpoint_without_an_expert_is_refused(tmp_path):
    build(Qwen3MoeForCausalLM, moe_config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for expert in range(8):
        del tensors[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"1 parameters are missing .*model\.layers\.2\.mlp\.experts\.down_proj"
    with pytest.raises(IncompleteCheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_that_lacks_one_of_the_experts_is_refused(tmp_path):
    build(Qwen3MoeForCausalLM, moe_config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpointError, match=r"experts\.down_proj \(7, 64, 48\) instead of \(8, 64, 48\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_correction_bias_is_saved_in_fp32_and_loaded_again(tmp_path):
    model = build(Qwen3MoeForCausalLM, moe_config(router_correction_bias=True), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    bias = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = again.model.layers[0].mlp.gate.e_score_correction_bias
    assert found.dtype == bias.dtype == torch.float32
    assert torch.equal(found, bias)
    assert bias.abs().max() > 0


def test_config_json_speaks_the_hub_s_dialect(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 128}
    build(Qwen3MoeForCausalLM, moe_config(rope_parameters=rope)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["model_type"] == "qwen3_moe"
    assert config["num_experts"] == 8
    assert config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 5e6
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    foreign = {"rope_parameters", "dtype", "num_local_experts", "auto_map", "distributed_config"}
    assert not foreign & config.keys()
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters["rope_theta"] == 5e6
    assert again.rope_parameters["factor"] == 4.0
    assert again.num_experts == 8


def test_a_path_without_a_folder(tmp_path):
    """The Hub's client says that a repo id must have the form 'namespace/repo_name'."""
    with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere: check the path"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "nowhere"))
