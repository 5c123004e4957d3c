"""Multi-token prediction against the paper written out with transformers' decoder layer; loading, saving, refusing."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.glm4_moe import modeling_glm4_moe as glm

from tests.families import FAMILIES, cast, deepseek_config, tokens
from xtuner_hf import AutoModelForCausalLM, IncompleteCheckpointError
from xtuner_hf.models.mtp import same_document, shift_left
from xtuner_hf.moe.balance import BalanceConfig, LoadBalancer
from xtuner_hf.moe.tokens import TokenLayout

LENGTHS = (9, 1, 2, 14)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
ROW = tokens(1, sum(LENGTHS))
STOCK_LAYERS = {"deepseek_v3": deepseek.DeepseekV3DecoderLayer, "glm4_moe": glm.Glm4MoeDecoderLayer}


def model_with_mtp(name: str = "deepseek_v3", coef: float = 0.3, depths: int = 1, dtype=torch.float64, **changes):
    kernel = "xtuner_reference" if dtype == torch.float64 else "xtuner_grouped_mm"
    changes["num_nextn_predict_layers"] = depths
    return FAMILIES[name].ours(dtype, kernel, "eager", {"mtp_loss_coef": coef}, **changes).train()


def written_out(name: str, model, documents: list[torch.Tensor], labels: list[torch.Tensor]) -> torch.Tensor:
    """Summed loss of the trunk plus coefficient / D x summed losses of all depths, one document at a time."""
    config, total = model.config, 0.0
    depths = config.num_nextn_predict_layers
    for document, label in zip(documents, labels, strict=True):
        length = document.shape[1]
        hidden = model.eval().model(document, use_cache=False).last_hidden_state
        total = total + F.cross_entropy(model.lm_head(hidden)[0, :-1], label[0, 1:], reduction="sum")
        embeds = model.model.embed_tokens(document)
        for depth in range(1, depths + 1):
            kept = length - depth
            if kept < 1:
                break
            ours = model.model.layers[config.num_hidden_layers + depth - 1]
            layer = cast(STOCK_LAYERS[name](config, config.num_hidden_layers + depth - 1), torch.float64)
            state = {
                key: value for key, value in ours.named_parameters() if not key.startswith(("e", "hnorm", "shared"))
            }
            joined = torch.cat([ours.enorm(embeds[:, depth:]), ours.hnorm(hidden[:, :kept])], -1)
            mask = torch.full((1, 1, kept, kept), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
            arguments = {
                "attention_mask": mask,
                "position_embeddings": model.model.rotary_emb(joined, torch.arange(kept)[None]),
            }
            state |= {key: value for key, value in ours.named_buffers()}
            hidden = torch.func.functional_call(layer, state, (joined @ ours.eh_proj.weight.T,), arguments)
            logits = model.lm_head(ours.shared_head.norm(hidden))[0, : kept - 1]
            loss = F.cross_entropy(logits, label[0, depth + 1 :], reduction="sum") if kept > 1 else 0.0
            total = total + model.mtp_loss_coef / depths * loss
    model.train()
    return total


def compare(found, expected, found_grads, expected_grads) -> None:
    # The head's softmax is fp32.
    assert abs(found - expected) < 1e-5 * abs(expected)
    for name, grad in expected_grads.items():
        assert (found_grads[name] - grad).abs().max() < 2e-6 * grad.abs().max().clamp(min=1), name


@pytest.mark.parametrize(("name", "depths"), [("deepseek_v3", 1), ("deepseek_v3", 2), ("glm4_moe", 1)])
def test_loss_and_gradients_of_packed_documents_are_the_paper_s(name, depths):
    """Documents of 9, 1, 2 and 14 tokens: no token predicts into another document, and labels are left out as asked."""
    model = model_with_mtp(name, depths=depths)
    labels = ROW.clone()
    labels[:, 3:6] = -100
    expected = written_out(name, model, ROW.split(LENGTHS, 1), labels.split(LENGTHS, 1))
    grads = torch.autograd.grad(expected, list(model.parameters()))
    expected_grads = dict(zip(dict(model.named_parameters()), grads, strict=True))
    packed_labels = labels.masked_fill(POSITIONS == 0, -100)  # as packing collators do
    output = model(ROW, labels=packed_labels, position_ids=POSITIONS, chunked_loss=True, num_items_in_batch=1)
    output.loss.backward()
    compare(output.loss.item(), expected.item(), {n: p.grad for n, p in model.named_parameters()}, expected_grads)
    assert output.mtp_loss > 0
    assert model.model.layers[-1].eh_proj.weight.grad.abs().max() > 0


def test_the_boundary_mask_does_not_rest_on_the_labels():
    """The first token of a document keeps its label here: the trunk is trained to predict it, the MTP layer is not."""
    model = model_with_mtp()
    arguments = {"position_ids": POSITIONS, "chunked_loss": True, "num_items_in_batch": 1}
    labels = ROW.masked_fill(POSITIONS == 0, -100)
    expected = model(ROW, labels=labels, **arguments).mtp_loss
    assert torch.equal(model(ROW, labels=ROW, **arguments).mtp_loss, expected)


def test_rows_with_padding_and_recompute_give_the_same():
    model = model_with_mtp()
    rows = tokens(2, 12)
    attention_mask = torch.ones_like(rows)
    attention_mask[1, 7:] = 0
    labels = rows.masked_fill(attention_mask == 0, -100)
    model(rows, labels=labels, attention_mask=attention_mask, chunked_loss=True, num_items_in_batch=1).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    for row, label, length in zip(rows, labels, (12, 7), strict=True):
        arguments = {"labels": label[None, :length], "chunked_loss": True, "num_items_in_batch": 1}
        model(row[None, :length], **arguments).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() < 1e-6 * expected[name].abs().max().clamp(min=1), name


def test_evaluation_scores_the_next_token_alone():
    model = model_with_mtp().eval()
    plain = model_with_mtp(coef=0.0).eval()
    arguments = {"labels": ROW, "chunked_loss": True}
    assert torch.equal(model(ROW, **arguments).loss, plain(ROW, **arguments).loss)


def test_load_counts_tokens_that_have_a_next_one():
    model = model_with_mtp()
    balancer = LoadBalancer.attach(model, BalanceConfig(sequence_loss_coef=1.0))
    assert "model.layers.3.mlp.gate" in balancer.routers
    balancer.start_step(torch.tensor(26), torch.tensor(4))
    with balancer.recording(), torch.no_grad():  # a pass that only counts has no labels
        model(ROW, position_ids=POSITIONS)
    counts = {name: router.load.count_E.sum().item() / 4 for name, router in balancer.routers.items()}
    assert counts["model.layers.2.mlp.gate"] == 26
    assert counts["model.layers.3.mlp.gate"] == 26 - 4


def test_shift_and_documents():
    layout = TokenLayout(1, 6, torch.device("cpu"), position_ids=torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert same_document(layout, 1).tolist() == [[True, True, False, False, True, False]]
    assert same_document(layout, 2).tolist() == [[True, False, False, False, False, False]]
    assert same_document(layout, 9).tolist() == [[False] * 6]
    padded = TokenLayout(1, 4, torch.device("cpu"), attention_mask=torch.tensor([[0, 1, 1, 0]]))
    assert same_document(padded, 1).tolist() == [[False, True, False, False]]
    assert shift_left(torch.arange(4)[None], 3, -100).tolist() == [[3, -100, -100, -100]]
    assert shift_left(torch.arange(4)[None], 5, -100).tolist() == [[-100] * 4]


# ---- checkpoints ----


def hub_checkpoint(folder, **changes) -> dict[str, torch.Tensor]:
    """A checkpoint with a multi-token prediction layer under the Hub's names; returns its tensors."""
    model = model_with_mtp(dtype=torch.float32, **changes)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_names_on_disk_are_the_hub_s_own_and_copies_are_stored(tmp_path):
    tensors = hub_checkpoint(tmp_path)
    added = {name.removeprefix("model.layers.3.") for name in tensors if name.startswith("model.layers.3.")}
    special = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight"}
    block = {name.removeprefix("model.layers.2.") for name in tensors if name.startswith("model.layers.2.")}
    assert added == special | {"embed_tokens.weight"} | block
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_loaded_and_saved_unchanged_with_coefficient_0(tmp_path):
    tensors = hub_checkpoint(tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", mtp_loss_coef=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    model(ROW, labels=ROW, chunked_loss=True).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert after.keys() == tensors.keys()
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    for name, tensor in tensors.items():
        is_mtp = name.startswith("model.layers.3.") and not name.endswith(copies)
        has_gradient = "e_score_correction_bias" not in name
        assert torch.equal(after[name], tensor) == (is_mtp or not has_gradient), name


def test_left_out_by_default_with_one_clear_line_and_a_config_that_says_so(tmp_path, caplog):
    tensors = hub_checkpoint(tmp_path / "hub")
    with caplog.at_level(logging.WARNING, logger="xtuner_hf.models.mtp"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["unexpected_keys"] | info["missing_keys"]
    (record,) = caplog.records
    assert "without its 1 multi-token prediction layer(s)" in record.message
    assert "mtp_loss_coef=0 to keep them" in record.message
    model.save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert after.keys() == {name for name in tensors if not name.startswith("model.layers.3.")}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_transformers_loads_the_trunk_of_what_we_save_and_saves_no_copies(tmp_path):
    """Its class shares our conversions of embedding and head, and has no layer to copy them to."""
    hub_checkpoint(
        tmp_path / "hub", num_hidden_layers=61, intermediate_size=8, first_k_dense_replace=61, kv_lora_rank=4
    )
    stock, info = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["unexpected_keys"] | info["missing_keys"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert (stock.eval()(ROW).logits - ours.eval()(ROW).logits).abs().max() < 1e-3
    stock.save_pretrained(tmp_path / "stock")
    assert not any(".61." in name for name in load_file(tmp_path / "stock" / "model.safetensors"))


def test_a_checkpoint_without_the_promised_layers_is_refused_in_one_sentence(tmp_path):
    tensors = hub_checkpoint(tmp_path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.3.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = "multi-token prediction layers, though config.json promises 1: the checkpoint was saved without them"
    with pytest.raises(IncompleteCheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, mtp_loss_coef=0.1)


@pytest.mark.parametrize(("depths", "coef"), [(0, 0.3), (1, -1.0)])
def test_a_coefficient_that_cannot_be_is_refused(depths, coef):
    config = deepseek_config(num_nextn_predict_layers=depths)
    with pytest.raises(ValueError, match=rf"mtp_loss_coef is {coef} and the model has {depths} multi-token prediction"):
        AutoModelForCausalLM.from_config(config, mtp_loss_coef=coef)


@pytest.mark.parametrize("call", [lambda model: model.model(ROW), lambda model: model(ROW, labels=ROW)])
def test_a_loss_outside_of_the_model_does_not_drop_the_further_tokens_in_silence(call):
    model = model_with_mtp()
    with pytest.raises(RuntimeError, match="this forward goes past the loss that they are part of"):
        call(model)
    with torch.no_grad():
        call(model)
