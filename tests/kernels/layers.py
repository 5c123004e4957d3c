"""Experts and routed tokens of odd sizes, shared by the tests of the kernels."""

from __future__ import annotations

import torch
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from xtuner_hf.moe.experts import GroupedExperts, run_experts

HIDDEN, INNER, EXPERTS = 24, 16, 5

# Experts of each token: even, with experts that get nothing, all to one, one token alone, more tokens than a block.
ROUTINGS = {
    "random": torch.rand(37, EXPERTS, generator=torch.Generator().manual_seed(1)).topk(2).indices,
    "empty experts": torch.tensor([[1, 4], [4, 1], [1, 4]]),
    "one takes all": torch.full((9, 1), 3),
    "one token": torch.tensor([[2, 0, 4]]),
    "many": torch.rand(700, EXPERTS, generator=torch.Generator().manual_seed(2)).topk(3).indices,
}


def make_experts(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """`kind` is "swiglu" (stored as transformers stores Qwen3-MoE's) or "gpt_oss" (transposed, biases, clamps)."""
    torch.manual_seed(0)
    if kind == "gpt_oss":
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
        experts: torch.nn.Module = GptOssExperts(GptOssConfig(**sizes, swiglu_limit=1.0))
    else:
        sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
        experts = GroupedExperts(Qwen3MoeConfig(**sizes))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts.to(dtype)


def step(kernel: str, experts: torch.nn.Module, topk_ids_TK: torch.Tensor, dtype=torch.float64) -> dict:
    """The output and all gradients of one forward and backward, on the device of the ids."""
    generator, (tokens, top_k) = torch.Generator().manual_seed(3), topk_ids_TK.shape

    def random(make, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return make(*shape, generator=generator, dtype=torch.float64).to(topk_ids_TK.device, dtype)

    hidden_TH = random(torch.randn, tokens, HIDDEN, dtype=dtype).requires_grad_()
    weights_TK = random(torch.rand, tokens, top_k, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    grad_TH = random(torch.randn, tokens, HIDDEN, dtype=dtype)
    experts.zero_grad()
    output_TH = run_experts(kernel, experts, hidden_TH, topk_ids_TK, weights_TK)
    output_TH.backward(grad_TH)
    grads = {name: parameter.grad for name, parameter in experts.named_parameters() if parameter.grad is not None}
    return {"output": output_TH.detach(), "hidden": hidden_TH.grad, "weights": weights_TK.grad, **grads}
