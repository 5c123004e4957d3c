"""Balance losses, counts and bias updates against references written out plainly over the whole batch."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.tiny import build, moe_config
from xtuner_hf import Qwen3MoeForCausalLM
from xtuner_hf.moe.balance import BalanceConfig, LoadBalancer
from xtuner_hf.moe.tokens import TokenLayout

CONFIG = BalanceConfig(aux_loss_coef=0.3, z_loss_coef=0.05, sequence_loss_coef=0.2)


def padded_batch() -> dict[str, torch.Tensor]:
    """Three rows of 13, 20 and 6 real tokens, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, 128, (3, 20), generator=generator)
    mask = torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate((13, 20, 6)):
        mask[row, :length] = 1
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[0, :8] = -100
    return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}


def packed_batch() -> dict[str, torch.Tensor]:
    """The documents of `padded_batch` in one row, and two tokens of padding behind them."""
    batch = padded_batch()
    keep = batch["attention_mask"].bool()
    positions = [torch.arange(int(length)) for length in keep.sum(1)]
    starts = torch.cat(positions) == 0
    pad = torch.zeros(2, dtype=torch.long)
    return {
        "input_ids": torch.cat([batch["input_ids"][keep], pad])[None],
        "labels": torch.cat([batch["labels"][keep].masked_fill(starts, -100), pad - 100])[None],
        "position_ids": torch.cat([*positions, pad])[None],
        "token_mask": torch.cat([torch.ones(int(keep.sum())), pad]).bool()[None],
    }


def reference_objective(batch: dict, top_k: int = 2) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """transformers' own model, losses written out document by document, autograd over all of it at once."""
    stock = build(transformers.Qwen3MoeForCausalLM, moe_config())
    stock.load_state_dict(build(Qwen3MoeForCausalLM, moe_config()).state_dict())
    out = stock(**batch, output_router_logits=True, use_cache=False)
    stock.config.output_router_logits = False
    loss = out.loss - stock.router_aux_loss_coef * out.aux_loss
    values = {"aux": 0.0, "z": 0.0, "sequence": 0.0}
    for logits in out.router_logits:
        documents = [
            logits.view(3, 20, -1)[row, : int(length)] for row, length in enumerate(batch["attention_mask"].sum(1))
        ]
        real = torch.cat(documents)
        aux, z = switch(real, top_k), real.logsumexp(-1).square().mean()
        sequence = torch.stack([switch(document, top_k) for document in documents]).mean()
        loss = loss + CONFIG.aux_loss_coef * aux + CONFIG.z_loss_coef * z + CONFIG.sequence_loss_coef * sequence
        for name, value in zip(values, (aux, z, sequence), strict=True):
            values[name] += value.item() / 2
    loss.backward()
    return values, {name: p.grad for name, p in stock.named_parameters()}


def switch(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    probs = logits.softmax(-1)
    chosen = torch.nn.functional.one_hot(probs.topk(top_k).indices, probs.shape[-1]).sum(1).float()
    return probs.shape[-1] * (chosen.mean(0) / top_k * probs.mean(0)).sum()


def our_step(model, batches: list[dict], num_labels: int, loss_scale: float = 1.0) -> LoadBalancer:
    """What the trainers do in an optimizer step, by hand."""
    balancer = LoadBalancer.attach(model, CONFIG)
    totals = sum(TokenLayout.of_batch(batch).totals() for batch in batches)
    balancer.start_step(totals[0], totals[1])
    model.train()
    with torch.no_grad(), balancer.recording():
        for batch in batches:
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    balancer.reduce()
    for batch in batches:
        loss = model(**batch, chunked_loss=True, num_items_in_batch=num_labels, use_cache=False).loss
        (balancer.watch(loss) * loss_scale).backward()
    return balancer


def num_labels(batch: dict) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def assert_close(grads: dict, expected: dict, scale: float = 1.0) -> None:
    for name, grad in expected.items():
        error = (grads[name] / scale - grad).abs().max() / grad.abs().max().clamp(min=1e-8)
        assert error < 2e-5, f"{name}: {error}"


@pytest.mark.parametrize("make_batch", [padded_batch, packed_batch])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
def test_gradients_and_values_equal_the_written_out_losses(make_batch, loss_scale, checkpointing):
    values, expected = reference_objective(padded_batch())
    model = build(Qwen3MoeForCausalLM, moe_config())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    batch = make_batch()
    balancer = our_step(model, [batch], num_labels(batch), loss_scale)
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected, loss_scale)
    metrics = balancer.metrics()
    assert metrics.aux_loss == pytest.approx(values["aux"], rel=1e-5)
    assert metrics.z_loss == pytest.approx(values["z"], rel=1e-5)
    assert metrics.sequence_loss == pytest.approx(values["sequence"], rel=1e-5)
    assert metrics.load_LE.sum(-1).tolist() == [39 * 2, 39 * 2]


def test_micro_batches_add_up_to_the_whole_batch():
    _, expected = reference_objective(padded_batch())
    model = build(Qwen3MoeForCausalLM, moe_config())
    batch = padded_batch()
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    our_step(model, rows, num_labels(batch))
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


def test_switch_loss_of_one_layer_is_transformers_divided_by_top_k():
    config = moe_config(num_hidden_layers=1)
    model = build(Qwen3MoeForCausalLM, config)
    batch = padded_batch()
    out = model.eval()(**batch, output_router_logits=True)
    expected = load_balancing_loss_func(out.router_logits, 8, 2, batch["attention_mask"])
    balancer = our_step(model, [batch], num_labels(batch))
    assert balancer.metrics().aux_loss == pytest.approx(expected.item() / 2, rel=1e-5)


def test_padding_is_never_counted():
    model = build(Qwen3MoeForCausalLM, moe_config())
    batch = padded_batch()
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    longer = {key: torch.nn.functional.pad(value, (0, 7), value=fill[key]) for key, value in batch.items()}
    first = our_step(model, [batch], num_labels(batch)).metrics()
    second = our_step(model, [longer], num_labels(batch)).metrics()
    assert torch.equal(first.load_LE, second.load_LE)
    assert first.sequence_loss == pytest.approx(second.sequence_loss, rel=1e-6)


def test_neither_evaluation_nor_recomputation_is_counted():
    model = build(Qwen3MoeForCausalLM, moe_config())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = padded_batch()
    balancer = our_step(model, [batch], num_labels(batch))
    before = balancer.metrics().load_LE
    with torch.no_grad():
        model(**batch)
        model.eval()(**batch)
    assert torch.equal(balancer.metrics().load_LE, before)
    assert before.sum().item() == 2 * 39 * 2


def test_bias_moves_towards_the_mean_load_and_changes_selection_only():
    model = build(Qwen3MoeForCausalLM, moe_config(router_correction_bias=True))
    batch = padded_batch()
    balancer = our_step(model, [batch], num_labels(batch))
    gate = model.model.layers[0].mlp.gate
    before, load = gate.e_score_correction_bias.clone(), balancer.metrics().load_LE[0].float()
    balancer.update_bias(0.25)
    assert torch.allclose(gate.e_score_correction_bias - before, 0.25 * torch.sign(load.mean() - load))
    hidden = torch.randn(6, 64)
    gate.e_score_correction_bias[:] = torch.tensor([9.0, 8.0, 0, 0, 0, 0, 0, 0])
    routing = gate(hidden)
    assert (routing.topk_ids_TK == torch.tensor([0, 1])).all()
    probs = routing.logits_TE.softmax(-1)[:, :2]
    assert torch.allclose(routing.weights_TK, probs / probs.sum(-1, keepdim=True))


def test_backward_without_reduced_counts_is_an_error():
    model = build(Qwen3MoeForCausalLM, moe_config()).train()
    balancer = LoadBalancer.attach(model, CONFIG)
    batch = padded_batch()
    totals = TokenLayout.of_batch(batch).totals()
    balancer.start_step(totals[0], totals[1])
    loss = balancer.watch(model(**batch, use_cache=False).loss)
    with pytest.raises(RuntimeError, match="reduce"):
        loss.backward()


def test_totals_of_padded_and_packed_batches():
    expected = [39, 3, 13 * 13 + 20 * 20 + 6 * 6]
    assert TokenLayout.of_batch(padded_batch()).totals().tolist() == expected
    assert TokenLayout.of_batch(packed_batch()).totals().tolist() == expected
