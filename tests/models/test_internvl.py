"""InternVL and Intern-S1 against transformers' own eager InternVL, or parts of it put together here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import DeepseekV3Config
from transformers.models.internvl import modeling_internvl as hf

from tests import vision
from tests.families import FAMILIES, cast
from tests.models.test_families import assert_same, logits_and_grads
from tests.vision import MODELS, row, tiles
from xtuner_hf import AutoModelForCausalLM, AutoModelForImageTextToText
from xtuner_hf.memory.recompute import set_recompute
from xtuner_hf.models.auto import UnknownFamilyError

everywhere = pytest.mark.parametrize("name", MODELS)
INTERNVL = [name for name in MODELS if name.startswith("internvl")]

# Two rows with different numbers of images: three tiles in two images, and one tile.
ROWS = torch.tensor([row(5, -2, 9, -1, 3), row(12, -1, 13, seed=2)])
TILES = 4


def exact(name: str) -> torch.nn.Module:
    """In fp64, eager where transformers' eager softmax is fp32 (not GPT-OSS's)."""
    attention = None if MODELS[name][1] == "gpt_oss" else "eager"
    return vision.ours(name, torch.float64, "xtuner_reference", attention)


class Composed(torch.nn.Module):
    """A tower and a language model of transformers with the projector between them written out."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        config = vision.config("internvl_moe" if vision.text_of(model) == "moe" else "internvl_dense")
        config._attn_implementation = config._experts_implementation = "eager"
        text_class = {"moe": transformers.Qwen3MoeForCausalLM, "dense": transformers.Qwen3ForCausalLM}
        self.tower = hf.InternVLVisionModel(config.vision_config)
        self.text = text_class[vision.text_of(model)](config.text_config)
        self.projector = torch.nn.ParameterDict()
        weights = model.state_dict()
        self.names = {}
        for name, tensor in weights.items():
            if name.startswith("model.multi_modal_projector."):
                key = name.removeprefix("model.multi_modal_projector.").replace(".", "_")
                self.projector[key] = torch.nn.Parameter(tensor.clone())
                self.names[f"projector.{key}"] = name
            else:
                inner = name.replace("model.vision_tower.", "tower.").replace("model.language_model.", "text.model.")
                self.names[inner.replace("lm_head", "text.lm_head")] = name
        cast(self, torch.float64)
        state = {inner: weights[name] for inner, name in self.names.items() if not inner.startswith("projector")}
        assert not self.load_state_dict(state, strict=False).unexpected_keys

    def forward(self, input_ids, pixel_values, **kwargs):
        patches = self.tower(pixel_values).last_hidden_state[:, 1:]
        # [N, 2, 2, 2, 2, C]: rows of squares, row in the square, columns of squares, column in the square.
        squares = patches.unflatten(1, (2, 2, 2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        p = self.projector
        normed = F.layer_norm(squares, squares.shape[-1:], p["layer_norm_weight"], p["layer_norm_bias"])
        hidden = F.gelu(normed @ p["linear_1_weight"].T + p["linear_1_bias"])
        features = (hidden @ p["linear_2_weight"].T + p["linear_2_bias"]).flatten(0, 1)
        embeds = self.text.model.embed_tokens(input_ids).clone()
        embeds[input_ids == vision.IMAGE_TOKEN] = features
        return self.text(inputs_embeds=embeds, **kwargs)


@everywhere
def test_fp64_logits_and_gradients_equal_stock_parts(name):
    ours = exact(name)
    stock = vision.stock(ours) if name in INTERNVL else Composed(ours)
    pixels = tiles(TILES, dtype=torch.float64)
    expected, expected_grads = logits_and_grads(stock, ROWS, pixel_values=pixels)
    found, found_grads = logits_and_grads(ours, ROWS, pixel_values=pixels)
    assert (found - expected).abs().max() < 1e-10
    if name not in INTERNVL:
        expected_grads = {stock.names[inner]: grad for inner, grad in expected_grads.items()}
    for parameter, grad in expected_grads.items():
        if "k_proj.bias" not in parameter:  # the softmax does not see it
            assert grad.abs().max() > 1e-9, f"{parameter} has no gradient: the case says nothing of it"
    assert_same(found_grads, expected_grads, 1e-10)


@everywhere
def test_packed_documents_equal_separate_ones(name):
    """Three documents in a row, one of them without an image; logits and gradients."""
    ours = vision.ours(name, torch.float64, "xtuner_reference")
    documents = [(row(5, -2, 3), 2), (row(9, seed=1), 0), (row(2, -1, 4, -1, seed=2), 2)]
    pixels = tiles(4, dtype=torch.float64)
    logits, start = [], 0
    for ids, number in documents:
        own = pixels[start : start + number] if number else None
        logits.append(ours(torch.tensor([ids]), pixel_values=own, use_cache=False).logits)
        start += number
    expected = torch.cat(logits, 1)
    expected.square().mean().backward()
    expected_grads = {parameter: p.grad.clone() for parameter, p in ours.named_parameters()}
    ours.zero_grad()
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None]
    whole = torch.tensor([[token for ids, _ in documents for token in ids]])
    packed = ours(whole, pixel_values=pixels, position_ids=positions).logits
    packed.square().mean().backward()
    assert (packed - expected).abs().max() < 1e-5  # attention is fp32 inside where transformers' is
    assert_same({parameter: p.grad for parameter, p in ours.named_parameters()}, expected_grads, 1e-6)


@everywhere
def test_rows_without_an_image_leave_exactly_zero_gradients_of_the_tower(name):
    """And all else as the language model alone has it."""
    ours = vision.ours(name).train()
    text = AutoModelForCausalLM.from_config(ours.config.text_config)
    text.load_state_dict(
        {n.replace("model.language_model.", "model."): p for n, p in ours.state_dict().items() if "vision" not in n},
        strict=False,
    )
    text.set_experts_implementation("xtuner_grouped_mm")
    ids = torch.tensor([row(20)])
    expected = text.train()(ids, labels=ids, chunked_loss=True)
    expected.loss.backward()
    for pixels in (None, tiles(0)):
        ours.zero_grad(set_to_none=True)
        found = ours(ids, pixel_values=pixels, labels=ids, chunked_loss=True)
        assert torch.equal(found.loss, expected.loss)
        found.loss.backward()
        for parameter in (*ours.model.vision_tower.parameters(), *ours.model.multi_modal_projector.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() == 0
    assert_same(
        {n: p.grad for n, p in ours.model.language_model.named_parameters()},
        {n: p.grad for n, p in text.model.named_parameters()},
        1e-6,
    )


def test_rows_without_an_image_cost_inference_no_tile():
    ours = vision.ours("internvl_dense").eval()
    ours.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    ours(torch.tensor([row(20)]))


@pytest.mark.parametrize(
    ("ids", "number", "message"),
    [
        (row(4, -2, 4), None, r"hold 8 image tokens .* there are no pixel_values"),
        (row(12), 1, r"hold 0 image tokens .* 1 tiles of 4 tokens each: 4"),
        (row(4, -2, 4), 3, r"hold 8 image tokens .* 3 tiles of 4 tokens each: 12"),
        (row(4, -2, 4)[:9], 2, r"do not cut rows within an image"),
    ],
)
def test_images_and_their_tokens_must_match(ids, number, message):
    ours = vision.ours("internvl_dense")
    with pytest.raises(ValueError, match=message):
        ours(torch.tensor([ids]), pixel_values=None if number is None else tiles(number))


def test_stochastic_depth_rises_with_the_layer_and_keeps_the_mean():
    tower = vision.ours("interns1", drop_path_rate=0.4, num_hidden_layers=5).model.vision_tower
    layers = tower.encoder.layer
    assert [layer.stochastic_depth.rate for layer in layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    branch = torch.ones(4000, 2, 3)
    dropped = layers[-1].stochastic_depth.train()(branch)
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))  # whole tiles
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert dropped.mean() == pytest.approx(1, abs=0.06)  # 4.6 standard deviations
    assert torch.equal(layers[-1].stochastic_depth.eval()(branch), branch)
    with pytest.raises(ValueError, match="drop_path_rate is 1"):
        tower.set_drop_path_rate(1)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recompute_of_the_tower_alone_changes_no_gradient(policy):
    """With stochastic depth, whose choices must be the same again; and the language model does not recompute."""
    ours = vision.ours("internvl_moe", drop_path_rate=0.3, num_hidden_layers=3).train()

    def gradients() -> dict[str, torch.Tensor]:
        ours.zero_grad()
        torch.manual_seed(1)
        ours(ROWS, pixel_values=tiles(TILES), labels=ROWS, chunked_loss=True).loss.backward()
        return {name: p.grad.clone() for name, p in ours.named_parameters()}

    expected = gradients()
    tower, runs = ours.model.vision_tower, []
    # Recompute ends with the last tensor that is wanted, so that the layer's last module would not be seen.
    tower.encoder.layer[1].attention.register_forward_hook(lambda *_: runs.append("vision"))
    ours.model.language_model.layers[1].self_attn.register_forward_hook(lambda *_: runs.append("language"))
    set_recompute(ours, "full")
    set_recompute(tower, policy)
    ours.vision_recompute = policy
    tower.activation_checkpointing_enable()
    found = gradients()
    assert (runs.count("vision"), runs.count("language")) == (2, 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours.activation_checkpointing_enable()
    ours.vision_recompute = "none"
    ours.activation_checkpointing_enable()
    runs.clear()
    gradients()
    assert (runs.count("vision"), runs.count("language")) == (1, 2)


@everywhere
def test_chunked_loss_equals_the_loss_over_full_logits(name):
    ours = vision.ours(name).train()
    labels = ROWS.masked_fill(ROWS == vision.IMAGE_TOKEN, -100)
    ours(ROWS, pixel_values=tiles(TILES), labels=labels).loss.backward()
    expected = {parameter: p.grad.clone() for parameter, p in ours.named_parameters()}
    ours.zero_grad()
    ours(ROWS, pixel_values=tiles(TILES), labels=labels, chunked_loss=True).loss.backward()
    assert_same({parameter: p.grad for parameter, p in ours.named_parameters()}, expected, 1e-5)


@pytest.mark.parametrize("name", INTERNVL)
def test_greedy_tokens_equal_stock(name):
    ours = vision.ours(name).eval()
    prompt = torch.tensor([row(4, -1, 3)])
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    arguments["suppress_tokens"] = [vision.IMAGE_TOKEN]
    expected = vision.stock(ours).generate(prompt, pixel_values=tiles(1), **arguments)
    assert torch.equal(ours.generate(prompt, pixel_values=tiles(1), **arguments), expected)


@pytest.mark.parametrize("name", INTERNVL)
def test_checkpoints_go_both_ways(name, tmp_path):
    """Ours -> transformers: equal logits. transformers -> ours -> disk: the same tensors again."""
    ours = vision.ours(name).eval()
    ours.save_pretrained(tmp_path / "ours")
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(stock) is transformers.InternVLForConditionalGeneration
    expected = ours(ROWS, pixel_values=tiles(TILES)).logits
    assert (stock.eval()(ROWS, pixel_values=tiles(TILES)).logits - expected).abs().max() < 2e-5
    stock.save_pretrained(tmp_path / "stock")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock")
    assert type(again) is type(ours)
    again.save_pretrained(tmp_path / "again")
    tensors = [load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "stock", "again")]
    assert tensors[0].keys() == tensors[1].keys() == tensors[2].keys()
    assert "vision_tower.encoder.layer.1.attention.projection_layer.bias" in tensors[0]
    assert "language_model.model.layers.1.self_attn.q_proj.weight" in tensors[0]
    assert "language_model.lm_head.weight" in tensors[0]
    for tensor_name, tensor in tensors[0].items():
        assert torch.equal(tensors[1][tensor_name], tensor)
        assert torch.equal(tensors[2][tensor_name], tensor)


def test_tied_embeddings_stay_tied(tmp_path):
    """As those of the smallest InternVL3.5: one tensor on disk, for transformers too."""
    ours = vision.ours("internvl_dense", tied=True).eval()
    assert ours.lm_head.weight is ours.model.language_model.embed_tokens.weight
    ours.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    expected = ours(ROWS, pixel_values=tiles(TILES)).logits
    for auto in (AutoModelForImageTextToText, transformers.AutoModelForImageTextToText):
        again = auto.from_pretrained(tmp_path).eval()
        assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
        assert (again(ROWS, pixel_values=tiles(TILES)).logits - expected).abs().max() < 2e-5


READ_BY_ITS_OWN_CODE = """
import sys, torch, transformers
folder = sys.argv[1]
model = transformers.{auto}.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
assert "transformers_modules" in type(model).__module__, type(model)
assert "xtuner_hf" not in sys.modules
inputs = torch.load(f"{{folder}}/inputs.pt")
torch.save(model(**inputs).logits, f"{{folder}}/logits.pt")
model.save_pretrained(f"{{folder}}/again")
"""


@pytest.mark.parametrize(
    ("name", "auto"), [("interns1", "AutoModelForImageTextToText"), ("interns1_mini", "AutoModelForCausalLM")]
)
def test_intern_s1_is_read_by_the_code_that_travels_with_it(name, auto, tmp_path):
    """A clean process, transformers alone: equal logits, and the same tensors when it saves."""
    ours = vision.ours(name).eval()
    ours.save_pretrained(tmp_path)
    torch.save({"input_ids": ROWS, "pixel_values": tiles(TILES)}, tmp_path / "inputs.pt")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    code = READ_BY_ITS_OWN_CODE.format(auto=auto)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = ours(ROWS, pixel_values=tiles(TILES)).logits
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() < 2e-5
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.vision_tower.encoder.layer.1.attention.projection_layer.bias" in tensors
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in tensors
    assert "lm_head.weight" in tensors
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@everywhere
def test_a_saved_model_is_read_again_with_all_of_its_configuration(name, tmp_path):
    ours = vision.ours(name, drop_path_rate=0.2).eval()
    ours.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is type(ours)
    assert again.model.vision_tower.encoder.layer[-1].stochastic_depth.rate == 0.2
    assert again.config.architectures == [type(ours).__name__]
    assert again.config.text_config.architectures == ours.config.text_config.architectures
    assert not again.config.tie_word_embeddings
    assert torch.equal(again(ROWS, pixel_values=tiles(TILES)).logits, ours(ROWS, pixel_values=tiles(TILES)).logits)


def test_images_do_not_go_to_language_models():
    with pytest.raises(UnknownFamilyError, match="no causal language model of model_type 'internvl'"):
        AutoModelForCausalLM.from_config(vision.config("internvl_dense"))
    with pytest.raises(UnknownFamilyError, match=r"no model of images and text .* interns1, internvl"):
        AutoModelForImageTextToText.from_config(FAMILIES["qwen3_moe"].make_config())


def test_further_tokens_are_refused():
    """Multi-token prediction is DeepSeek's and GLM's, and none of them has eyes."""
    with pytest.raises(ValueError, match="internvl has no multi-token prediction layers"):
        AutoModelForImageTextToText.from_config(vision.config("internvl_moe"), mtp_loss_coef=0.3)


def test_a_language_model_that_we_do_not_have_is_named():
    config = vision.config("internvl_dense")
    config.text_config = transformers.Qwen2Config(vocab_size=128, hidden_size=32)
    with pytest.raises(UnknownFamilyError, match="model_type 'qwen2'; it has"):
        AutoModelForImageTextToText.from_config(config)


def test_any_language_model_of_ours_fits_in():
    text = FAMILIES["deepseek_v3"].make_config()
    assert isinstance(text, DeepseekV3Config)
    config = vision.config("internvl_dense")
    config.text_config = text
    model = AutoModelForImageTextToText.from_config(config)
    assert model.balance_defaults.bias_update_rate == 1e-3
    logits = model(ROWS, pixel_values=tiles(TILES)).logits
    assert logits.isfinite().all()
