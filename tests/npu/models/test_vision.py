"""Models that read images on the NPU: loss and every gradient equal the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.npu.kernels.pairs import DEVICE
from tests.vision import MODELS, ours, row, tiles

IDS = torch.tensor([row(5, -2, 9, -1, 6)])


def gradients(model: torch.nn.Module, device: torch.device | str) -> dict[str, torch.Tensor]:
    model = model.to(device).train()
    ids = IDS.to(device)
    loss = model(input_ids=ids, pixel_values=tiles(3).to(device), labels=ids, chunked_loss=True).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().cpu() for name, tensor in {"loss": loss, **found}.items()}


@pytest.mark.parametrize("name", MODELS)
def test_fp32_equals_the_cpu(name, calls):
    model = ours(name)
    expected = gradients(copy.deepcopy(model), "cpu")
    found = gradients(model, DEVICE)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # The bias of keys without positions has no gradient but rounding.
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5 * max(value.abs().max().item(), 1e-2), msg=key)
    assert calls["npu_fusion_attention_grad"]
