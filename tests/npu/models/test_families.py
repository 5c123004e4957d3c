"""Every family on the NPU against the same model on the CPU: loss, every gradient, and the weights after AdamW.

No operator falls back to the CPU (tests/npu/conftest.py makes it an error), and the fused ones are counted.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.families import ALL_FAMILIES, FAMILIES, tokens
from tests.npu.kernels.pairs import DEVICE
from xtuner_hf.kernels import device_operators
from xtuner_hf.moe.replay import RouteRecorder, RouteReplay, RouterMap
from xtuner_hf.moe.router import Router

LENGTHS = (9, 1, 14)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None].expand(2, -1)
STEPS = 2


def batch(device: torch.device | str) -> dict:
    ids = tokens().to(device)
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": POSITIONS.to(device)}


def train(model: torch.nn.Module, device: torch.device | str, routes: torch.Tensor | None = None) -> dict:
    """Loss and gradients of the first step, and the parameters after `STEPS`; `routes` [B, S, L, K] are replayed."""
    model = model.to(device).train()
    # An eps above rounding: AdamW divides gradients by their size, and would make steps of lr of errors.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    replay = {} if routes is None else {"routes": RouteReplay(RouterMap(model), routes.to(device))}
    result = {}
    for step in range(STEPS):
        loss = model(**batch(device), **replay, chunked_loss=True).loss
        loss.backward()
        if step == 0:
            result["loss"] = loss.detach()
            result |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    result |= {name: p.detach() for name, p in model.named_parameters()}
    return {name: tensor.float().cpu() for name, tensor in result.items()}


@torch.no_grad()
def routes_of(model: torch.nn.Module) -> torch.Tensor | None:
    """What its routers choose; None for a dense model."""
    if not any(isinstance(module, Router) for module in model.modules()):
        return None
    recorder = RouteRecorder(RouterMap(model))
    model.train()(**batch("cpu"), routes=recorder, chunked_loss=True)
    return recorder.ids_BSLK(num_rows=2)


def worst(found: dict, expected: dict) -> float:
    """Relative to each tensor's largest entry."""
    assert found.keys() == expected.keys()
    return max(((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1e-6)).item() for k in found)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_fp32_equals_the_cpu(name, calls):
    model = ALL_FAMILIES[name].ours()
    expected = train(copy.deepcopy(model), "cpu")
    assert not calls
    found = train(model, DEVICE)
    assert worst(found, expected) < 1e-5

    layers = model.config.num_hidden_layers
    sparse = sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    assert calls["npu_fusion_attention"] == calls["npu_fusion_attention_grad"] == STEPS * layers
    assert calls["npu_rotary_mul"] == calls["npu_rotary_mul_backward"] == STEPS * layers * 2
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert calls["npu_rms_norm"] == calls["npu_rms_norm_backward"] == STEPS * norms
    assert calls["npu_grouped_matmul"] == STEPS * sparse * 6
    assert calls["npu_moe_token_permute"] == calls["_npu_moe_token_unpermute"] == STEPS * sparse
    assert calls["npu_clipped_swiglu" if name == "gpt_oss" else "npu_swiglu"] == STEPS * sparse


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_bf16_is_as_near_to_fp32_as_on_the_cpu(name):
    """The mean error of the gradients, of the experts that fp32 chooses: rounding moves tokens to others."""
    model = ALL_FAMILIES[name].ours()
    routes = routes_of(model)
    exact = train(model, "cpu", routes)

    def error(device: torch.device | str) -> float:
        found = train(ALL_FAMILIES[name].ours(torch.bfloat16), device, routes)
        names = [key for key in exact if "gradient" in key]
        errors = [(found[key] - exact[key]).norm() / exact[key].norm().clamp(min=1e-6) for key in names]
        return torch.stack(errors).mean().item()

    assert error(DEVICE) < 1.25 * error("cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_of_fp32_weights(name):
    model = FAMILIES[name].ours().train()
    losses = {}
    for device in ("cpu", DEVICE):
        model.to(device)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(**batch(device), chunked_loss=True).loss
        loss.backward()
        losses[str(device)] = loss.item()
    assert losses["npu:0"] == pytest.approx(losses["cpu"], rel=2e-2)


def test_plain_torch_on_the_npu_gives_the_same(monkeypatch, calls):
    """What the fused operators replace, on the same device: the seam changes speed and not the model."""
    model = FAMILIES["qwen3_moe"].ours()
    found = train(copy.deepcopy(model), DEVICE)
    calls.clear()
    for room in ("attention.kernels", "kernels.experts", "moe.dispatcher", "moe.combine", "moe.experts"):
        monkeypatch.setattr(f"xtuner_hf.{room}.fused_on", lambda device: device_operators.FusedOperators())
    from xtuner_hf.attention import kernels

    kernels.choose.cache_clear()
    expected = train(model, DEVICE)
    kernels.choose.cache_clear()
    assert not calls["npu_grouped_matmul"]
    assert not calls["npu_moe_token_permute"]
    assert worst(found, expected) < 1e-4
