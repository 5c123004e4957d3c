"""What came in goes out: untouched tensors byte for byte, trained ones by the format's rule."""

import json

import pytest
import torch
from transformers import FineGrainedFP8Config, Mxfp4Config

from tests.checkpoint.families import CASES, STOCK, config_json, hub_state, plain_checkpoint, write_case
from tests.checkpoint.official import INT4_CONFIG, read_stored, same_bytes, write_folder, write_official
from tests.tiny import moe_config
from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf.checkpoint.hub_source import HubSource
from xtuner_hf.checkpoint.passthrough import SourceEncoder
from xtuner_hf.checkpoint.quantised_format import CheckpointFormatError, TensorSpec


def encode_all(encoder: SourceEncoder, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stored |= encoder.encode(name, tensor)
    return stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_an_untrained_model_goes_out_byte_for_byte(tmp_path, case, dtype):
    model_class, _ = write_case(tmp_path, case)
    model = model_class.from_pretrained(tmp_path, dtype=dtype)
    stored = encode_all(SourceEncoder(HubSource(tmp_path), quantise=True), hub_state(model))
    original = read_stored(tmp_path)
    assert stored.keys() == original.keys()
    assert all(same_bytes(stored[name], tensor) for name, tensor in original.items())


def test_training_changes_what_it_trains_alone(tmp_path):
    """A step of training with all but one layer's experts frozen."""
    write_case(tmp_path, "qwen3_moe")
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2.mlp.experts" in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tokens = torch.randint(2, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = hub_state(model)
    stored = encode_all(SourceEncoder(HubSource(tmp_path), quantise=True), state)
    original = read_stored(tmp_path)
    changed = {name for name, tensor in original.items() if not same_bytes(stored[name], tensor)}
    trained = {name for name in original if "layers.2.mlp.experts" in name}
    assert changed == trained
    for name in trained:
        if name.endswith("_proj.weight"):
            again = (
                stored[name].float()
                * torch.kron(stored[f"{name}_scale_inv"], torch.ones(128, 128))[
                    : stored[name].shape[0], : stored[name].shape[1]
                ]
            )
            worst = (again - state[name]).abs().max() / state[name].abs().max()
            assert worst < 2**-4  # half a step of e4m3's 3 bits, at the top


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_what_we_write_loads_in_stock_transformers(tmp_path, case):
    source, target = tmp_path / "source", tmp_path / "target"
    model_class, _ = write_case(source, case)
    model = model_class.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    stored = encode_all(SourceEncoder(HubSource(source), quantise=True), hub_state(model))
    write_folder(target, stored, json.loads((source / "config.json").read_text()))
    stock_config = {"deepseek_v3": FineGrainedFP8Config, "gpt_oss": Mxfp4Config}[case](dequantize=True)
    stock = STOCK[model_class].from_pretrained(target, quantization_config=stock_config, dtype=torch.bfloat16)
    ours = model_class.from_pretrained(target).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quantise", [True, False])
def test_specs_say_beforehand_what_is_written(tmp_path, case, quantise):
    model_class, _ = write_case(tmp_path, case)
    state = hub_state(model_class.from_pretrained(tmp_path, dtype=torch.float32))
    encoder = SourceEncoder(HubSource(tmp_path), quantise=quantise)
    for name, tensor in state.items():
        specs = encoder.specs(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
        written = encoder.encode(name, tensor)
        assert [spec.name for spec in specs] == list(written)
        assert all(spec[1:] == (written[spec.name].dtype, written[spec.name].shape) for spec in specs)
        assert quantise or written[name].dtype == (torch.float32 if "e_score" in name else torch.bfloat16)


@pytest.mark.parametrize(
    ("case", "name", "cut"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", 1),
        ("gpt_oss", "model.layers.0.self_attn.sinks", 3),
        ("deepseek_v3", "model.layers.0.mlp.gate_proj.weight", 256),
    ],
)
def test_parts_of_a_tensor(tmp_path, case, name, cut):
    """Ranks that each hold some experts, or some blocks of rows, need not gather."""
    model_class, _ = write_case(tmp_path, case)
    tensor = hub_state(model_class.from_pretrained(tmp_path))[name] * 1.01
    encoder = SourceEncoder(HubSource(tmp_path), quantise=True)
    size = len(tensor)
    parts = [encoder.encode(name, tensor[start:stop], (start, stop)) for start, stop in [(0, cut), (cut, size)]]
    for stored_name, whole in encoder.encode(name, tensor).items():
        joined = torch.cat([part[stored_name] for part in parts])
        assert same_bytes(joined, whole)


def test_rows_that_cut_a_block(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    encoder = SourceEncoder(HubSource(tmp_path), quantise=True)
    name = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(ValueError, match=rf"rows \(0, 100\) of {name} cut through a block of 128 rows"):
        encoder.encode(name, torch.zeros(100, 256), (0, 100))


def test_fp32_of_the_source_survives_a_bf16_model(tmp_path):
    _, values = write_case(tmp_path, "deepseek_v3")
    encoder = SourceEncoder(HubSource(tmp_path), quantise=False)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    held = values[name].bfloat16()
    assert not torch.equal(held.float(), values[name])
    assert same_bytes(encoder.encode(name, held)[name], values[name])
    assert torch.equal(encoder.encode(name, held * 2)[name], (held * 2).float())


def test_tensors_that_the_source_does_not_know(tmp_path):
    """New ones stay as they are; a resized one is quantised by the rule, its old scales mean nothing."""
    write_case(tmp_path, "deepseek_v3")
    encoder = SourceEncoder(HubSource(tmp_path), quantise=True)
    new = torch.randn(3)
    assert encoder.encode("model.new", new)["model.new"] is new
    name = "model.layers.0.mlp.gate_proj.weight"
    resized = encoder.encode(name, torch.ones(640, 256))
    assert resized[f"{name}_scale_inv"].shape == (5, 2)


def test_left_over_tensors(tmp_path):
    """An MTP layer that the model does not hold is copied; the stale buffers of Kimi K2 are not."""
    model_class, make_config, quantization_config = CASES["deepseek_v3"]
    plain = plain_checkpoint(model_class, make_config())
    held = list(plain)
    plain |= {
        "model.layers.2.mlp.up_proj.weight": torch.zeros(128, 128),
        "model.layers.2.enorm.weight": torch.zeros(128),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
    }
    write_official(tmp_path, plain, config_json(make_config(), quantization_config))
    assert set(SourceEncoder(HubSource(tmp_path), quantise=True).left_over(held)) == {
        "model.layers.2.mlp.up_proj.weight_scale_inv",
        "model.layers.2.enorm.weight",
        "model.layers.2.mlp.up_proj.weight",
    }


def test_int4_is_not_written(tmp_path):
    config = moe_config(hidden_size=192, moe_intermediate_size=64)
    write_official(tmp_path, plain_checkpoint(Qwen3MoeForCausalLM, config), config_json(config, INT4_CONFIG))
    source = HubSource(tmp_path)
    with pytest.raises(CheckpointFormatError, match="reads PackedInt4 checkpoints and does not write them; export in"):
        SourceEncoder(source, quantise=True)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert SourceEncoder(source, quantise=False).encode(name, torch.ones(64, 192))[name].dtype == torch.bfloat16


def test_not_a_number_is_named(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    name = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(ValueError, match=f"{name} cannot be quantised: the weight holds NaN or infinity"):
        SourceEncoder(HubSource(tmp_path), quantise=True).encode(name, torch.full((384, 256), float("nan")))
