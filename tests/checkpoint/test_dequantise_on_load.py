"""Official-format folders load into our classes: equal to the values they stand for, and to stock transformers."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import BitsAndBytesConfig, DeepseekV3Config, FineGrainedFP8Config, GenerationConfig, Mxfp4Config
from transformers.distributed import DistributedConfig

from tests.checkpoint.families import (
    CASES,
    STOCK,
    DeepseekV3ForCausalLM,
    config_json,
    hub_state,
    plain_checkpoint,
    write_case,
)
from tests.checkpoint.official import INT4_CONFIG, write_official
from tests.checkpoint.test_hub_source import change
from tests.ranks import run_on_ranks
from tests.tiny import moe_config
from xtuner_hf import AutoModelForCausalLM, Qwen3MoeForCausalLM
from xtuner_hf.checkpoint import dequantise_on_load
from xtuner_hf.checkpoint.hub_folder import HubFolder
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_equals_what_the_checkpoint_stands_for(tmp_path, case, dtype):
    model_class, values = write_case(tmp_path, case)
    model = model_class.from_pretrained(tmp_path, **({"dtype": dtype} if dtype else {}))
    assert model.dtype == (dtype or torch.bfloat16)
    state = hub_state(model)
    assert state.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(state[name], value.to(state[name].dtype)), name
        if name.endswith("e_score_correction_bias"):
            assert state[name].dtype == torch.float32


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_equals_stock_transformers(tmp_path, case):
    model_class, _ = write_case(tmp_path, case)
    ours = model_class.from_pretrained(tmp_path).state_dict()
    stock_config = {"deepseek_v3": FineGrainedFP8Config, "gpt_oss": Mxfp4Config}[case](dequantize=True)
    stock = STOCK[model_class].from_pretrained(tmp_path, quantization_config=stock_config, dtype=torch.bfloat16)
    assert ours.keys() == stock.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.state_dict().items())


def test_stock_misreads_ragged_blocks(tmp_path):
    """Why the loader above is compared with tables for ragged blocks: transformers divides 144 rows by 2 scales."""
    model_class, values = write_case(tmp_path, "deepseek_v3_ragged")
    config = FineGrainedFP8Config(dequantize=True)
    stock = STOCK[model_class].from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert not torch.equal(stock.state_dict()[name], values[name].bfloat16())


def test_packed_int4(tmp_path):
    """As Kimi-K2-Thinking is published: routed experts alone."""
    config = moe_config(hidden_size=192, moe_intermediate_size=64)
    plain = plain_checkpoint(Qwen3MoeForCausalLM, config)
    values = write_official(tmp_path, plain, config_json(config, INT4_CONFIG))
    state = hub_state(Qwen3MoeForCausalLM.from_pretrained(tmp_path))
    assert state.keys() == values.keys()
    assert all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in values.items())


def test_saves_as_bf16_and_remembers_its_source(tmp_path):
    """transformers 5.23 would raise, or write bf16 under quantised names, after its own dequantising load."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    model_class, values = write_case(source, "gpt_oss")
    GenerationConfig(max_length=77).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    model = model_class.from_pretrained(source)
    assert model.name_or_path == model.config.name_or_path == str(source)
    assert model.source_folder == source
    assert model.generation_config.max_length == 77
    model.save_pretrained(saved)
    entries = json.loads((source / "config.json").read_text())
    del entries["quantization_config"]
    assert json.loads((saved / "config.json").read_text()) == entries
    assert (saved / "tokenizer.json").read_text() == "{}"
    folder = HubFolder(saved)
    assert set(folder.names()) == set(values)
    again = STOCK[model_class].from_pretrained(saved).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_arguments_that_belong_to_the_configuration(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    model, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path, use_cache=False, output_loading_info=True)
    assert model.config.use_cache is False
    assert not info["missing_keys"]
    config = DeepseekV3Config.from_pretrained(tmp_path)
    DeepseekV3ForCausalLM.from_pretrained(tmp_path, config=config)
    assert config.quantization_config  # the caller's own is left alone


def test_from_the_hub_by_name(tmp_path, monkeypatch):
    _, values = write_case(tmp_path, "qwen3_moe")
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr(dequantise_on_load, "snapshot_download", download)
    config = Qwen3MoeForCausalLM.config_class.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("somebody/model", config=config, revision="main", token=False)
    assert (asked["name"], asked["revision"], asked["token"]) == ("somebody/model", "main", False)
    assert model.name_or_path == "somebody/model"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], values[name].bfloat16())


def test_side_files_that_cannot_be_had_are_one_line_in_the_log(monkeypatch, caplog):
    def download(name, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(dequantise_on_load, "snapshot_download", download)
    assert dequantise_on_load.side_folder("somebody/model", {"revision": "main"}) is None
    (record,) = caplog.records
    assert "The files beside the weights of somebody/model could not be read (no network)" in record.message


def test_a_model_that_stays_quantised_is_refused(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    with pytest.raises(CheckpointFormatError, match="quantization_config=FineGrainedFP8Config was passed for a check"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path, quantization_config=FineGrainedFP8Config())
    with pytest.raises(CheckpointFormatError, match="leave the argument out"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_unknown_format_before_any_model_is_built(tmp_path):
    write_case(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointFormatError, match="has quant_method 'awq'; xtuner_hf reads fp8, mxfp4, compressed-t"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_scale_before_any_model_is_built(tmp_path):
    write_case(tmp_path, "kimi_k2")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    change(tmp_path, lambda stored: stored.pop(name))
    with pytest.raises(CheckpointFormatError, match=rf"needs the tensor {re.escape(name)} to be dequantised, and "):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def drop_from_config(folder, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_config_without_the_method_of_its_router(tmp_path):
    """As transformers writes it."""
    write_case(tmp_path, "deepseek_v3")
    drop_from_config(tmp_path, "topk_method")
    with pytest.raises(ValueError, match=r"config\.topk_method of this deepseek_v3 is None, expected 'noaux_tc'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_scales_that_the_config_does_not_announce(tmp_path):
    write_case(tmp_path, "qwen3_moe")
    drop_from_config(tmp_path, "quantization_config")
    with pytest.raises(CheckpointFormatError, match=r"scales of quantised weights .* they were left out"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def load_sharded(folder: str) -> dict:
    """On a rank: this rank's shards, gathered to compare, and the bytes that it read of quantised tensors."""
    read = 0
    whole_read = HubFolder.read

    def counting_read(self, name, region=None):
        nonlocal read
        tensor = whole_read(self, name, region)
        read += tensor.nbytes
        return tensor

    HubFolder.read = counting_read
    layout = DistributedConfig(fsdp_size=2, ep_size=2)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, distributed_config=layout)
    return {"state": {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}, "read": read}


def test_each_rank_reads_its_own_part(tmp_path):
    _, values = write_case(tmp_path, "qwen3_moe")
    expected = Qwen3MoeForCausalLM.from_pretrained(tmp_path).state_dict()
    quantised = sum(value.numel() for value in values.values() if value.dtype == torch.float32)
    for rank in run_on_ranks("tests.checkpoint.test_dequantise_on_load:load_sharded", 2, folder=str(tmp_path)):
        assert rank["state"].keys() == expected.keys()
        assert all(torch.equal(rank["state"][name], tensor) for name, tensor in expected.items())
        assert rank["read"] < 0.51 * quantised  # one byte a value, and few scales
