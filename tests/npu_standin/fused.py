"""References for torch_npu's fused operators, on the CPU and in fp32: what kernels.cpp is for torch's own.

Registered for the NPU's dispatch key alone: schemas, defaults and autograd formulas stay torch_npu's. A backward
operator is the derivative of its forward's reference, by torch's autograd. Calls that Ascend documents as unsupported
raise `NpuRestriction`; `CALLS` counts the others.

Legend: T tokens, R rows, E experts or groups, K choices per token, N query heads, M key and value heads, D documents.
"""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)

CALLS: collections.Counter[str] = collections.Counter()
_KERNELS: dict[str, Callable] = {}
_libraries: list[torch.library.Library] = []


class NpuRestriction(RuntimeError):
    """A call outside what Ascend documents as supported."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise NpuRestriction(f"NPU restriction: {what}")


def kernel(function: Callable) -> Callable:
    """Decorator: the kernel of the operator of this name, called with CPU tensors."""
    name = function.__name__

    @functools.wraps(function)
    def on_npu(*arguments: Any, **options: Any) -> Any:
        CALLS[name] += 1
        tensors = [value for value in (*arguments, *options.values()) for value in _flat(value)]
        device = next(tensor.device for tensor in tensors if tensor.device.type == "npu")
        arguments, options = tree_map_only(torch.Tensor, _to_cpu, (arguments, options))
        # The operator's own autograd is at work around this and has switched autograd off; `derivative` wants it.
        included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        excluded = excluded.remove(torch._C.DispatchKey.AutogradCPU)
        with torch._C._ForceDispatchKeyGuard(included, excluded), torch.no_grad():
            result = function(*arguments, **options)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to(device), result)

    _KERNELS[name] = on_npu
    return function


def _flat(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, torch.Tensor)]


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    # With its strides, on which kernels have opinions, and whatever of its memory they share.
    tensor = tensor.detach()
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).cpu()
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def register() -> None:
    """Make these the NPU's kernels. torch_npu has its operators under `npu`, and older callers' under `aten`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        for space in ("npu", "aten"):
            library = torch.library.Library(space, "IMPL")
            for name, function in _KERNELS.items():
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"{space}::{name}", "PrivateUse1"):
                    library.impl(name, function, "PrivateUse1")
            _libraries.append(library)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def derivative(function: Callable, grad: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the inputs, each in its dtype."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        return list(torch.autograd.grad(output, leaves, grad.to(output.dtype)))


# ---- grouped matrix product


@kernel
def npu_grouped_matmul(
    x: Sequence, weight: Sequence, *, group_list=None, split_item=0, group_type=None, group_list_type=0, **unused: Any
):
    need(not any(value for value in unused.values() if value is not None), f"here for plain products, {unused} given")
    need(group_type in (0, 2), f"group_type {group_type}: pass 0 or 2")
    need(len(x) == len(weight) == 1 and split_item == (2 if group_type == 0 else 3), "here for one x and one weight")
    ((x,), (weight,)) = x, weight
    need(x.dtype in FLOATS and x.dtype == weight.dtype, f"x {x.dtype} and weight {weight.dtype}")
    need(group_list is not None and group_list.dtype == torch.int64, "group_list must be an int64 tensor")
    need(group_list.numel() > 1, "group_list of one group; use a plain matrix product")
    need(x.numel() > 0, "an empty x")
    counts = group_list if group_list_type == 1 else group_list.diff(prepend=torch.zeros(1, dtype=torch.int64))
    need(bool((counts >= 0).all()), "group_list must not fall")
    num_rows = x.shape[0] if group_type == 0 else x.shape[1]
    need(int(counts.sum()) == num_rows, f"group_list covers {int(counts.sum())} rows of {num_rows}")
    sizes = counts.tolist()
    if group_type == 0:  # rows grouped: y[g] = x[g] @ weight[g]
        need(weight.dim() == 3 and len(weight) == len(sizes) <= 1024, "one weight for each of at most 1024 groups")
        need(x.is_contiguous() and max(x.shape[1], weight.shape[2]) < 65536, "x contiguous, inner sizes below 65536")
        rows = [wide(part) @ wide(w) for part, w in zip(x.split(sizes), weight, strict=True)]
        return [torch.cat(rows).to(x.dtype)]
    # Columns grouped: y[g] = x[:, g] @ weight[g]
    need(weight.dim() == 2 and weight.is_contiguous(), "weight must be 2-d and contiguous")
    need(x.t().is_contiguous(), "x must be the transposed view of a contiguous tensor")
    parts = zip(x.split(sizes, dim=1), weight.split(sizes), strict=True)
    return [torch.stack([wide(a) @ wide(b) for a, b in parts]).to(x.dtype)]


# ---- tokens to expert order and back


@kernel
def npu_moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    need(not padded_mode and not num_out_tokens, "here without padding and dropping")
    need(tokens.dtype in FLOATS and tokens.dim() == 2 and tokens.numel() > 0, "tokens must be 2-d floats, not empty")
    need(tokens.is_contiguous() and indices.is_contiguous(), "contiguous inputs")
    need(indices.dtype in (torch.int32, torch.int64) and indices.dim() == 2, "indices must be 2-d integers")
    need(indices.shape[1] <= 512 and indices.numel() < 2**24 - 1, "at most 512 experts a token, fewer than 2^24-1 rows")
    order = indices.reshape(-1).sort(stable=True).indices
    return tokens[order // indices.shape[1]], order.argsort().int()


@kernel
def npu_moe_token_permute_grad_v2(grad, sorted_indices, num_tokens, tokens_dtype, num_topK, padded_mode=False):
    return wide(grad)[sorted_indices.long()].view(num_tokens, num_topK, -1).sum(1).to(tokens_dtype)


def _unpermute(rows, row_of_slot, probs):
    return (wide(rows)[row_of_slot.long()].view(*probs.shape, -1) * wide(probs)[..., None]).sum(1).to(rows.dtype)


@kernel
def _npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    need(
        permuted_tokens.dtype in FLOATS and permuted_tokens.is_contiguous(), "permuted_tokens must be contiguous floats"
    )
    need(sorted_indices.dtype == torch.int32 and permuted_tokens.numel() > 0, "int32 sorted_indices, not empty")
    need(probs is not None and probs.dtype in FLOATS and probs.is_contiguous(), "here with contiguous probs")
    return _unpermute(permuted_tokens, sorted_indices, probs), permuted_tokens.clone()


@kernel
def npu_moe_token_unpermute_grad_v2(
    grad, sorted_indices, num_rows, dtype, probs=None, padded_mode=False, restore_shape=None, permuted_tokens=None
):
    return derivative(lambda rows, p: _unpermute(rows, sorted_indices, p), grad, permuted_tokens, probs)


# ---- norm, rotary embedding, activations


def _rms_norm(x, gamma, epsilon):
    rstd = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + epsilon)
    return wide(x) * rstd * wide(gamma), rstd


@kernel
def npu_rms_norm(x, gamma, epsilon=1e-6):
    need(x.dtype in FLOATS and gamma.dtype in (x.dtype, torch.float32), f"x {x.dtype} with gamma {gamma.dtype}")
    y, rstd = _rms_norm(x, gamma, epsilon)
    return y.to(x.dtype), rstd


@kernel
def npu_rms_norm_backward(grad, x, gamma, rstd):
    def normed(x, gamma):  # the mean of squares is what rstd is made of; epsilon follows from both
        epsilon = rstd.pow(-2) - wide(x.detach()).pow(2).mean(-1, keepdim=True)
        return _rms_norm(x, gamma, epsilon)[0]

    grad_x, grad_gamma = derivative(normed, grad, wide(x), wide(gamma))
    return grad_x.to(x.dtype), grad_gamma  # that of gamma is fp32 whatever gamma is


def _rotary(x, cos, sin, mode):
    if mode == "half":
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return wide(x) * wide(cos) + wide(turned) * wide(sin)


@kernel
def npu_rotary_mul(x, r1, r2, rotary_mode="half", rotate=None):
    need(rotate is None and rotary_mode in ("half", "interleave"), "rotary_mode half or interleave")
    need(x.dim() == r1.dim() == r2.dim() == 4 and x.shape[-1] == r1.shape[-1] == r2.shape[-1], "4-d, one head size")
    need(x.shape[-1] % 2 == 0 and x.shape[-1] < 896, "head sizes are even and below 896")
    need(x.dtype in FLOATS and x.dtype == r1.dtype == r2.dtype, f"x {x.dtype}, cos {r1.dtype}, sin {r2.dtype}")
    return _rotary(x, r1, r2, rotary_mode).to(x.dtype)


@kernel
def npu_rotary_mul_backward(grad, x, r1, r2, rotary_mode="half"):
    return derivative(lambda x, cos, sin: _rotary(x, cos, sin, rotary_mode), grad, x, r1, r2)


def _check_gate(x):
    need(x.numel() > 0, "an empty input")
    need(x.is_contiguous(), "a non-contiguous input")
    need(x.dtype in FLOATS and x.shape[-1] % 2 == 0, "floats of an even number of features")


def _swiglu(x, dim=-1):
    gate, up = wide(x).chunk(2, dim=dim)
    return F.silu(gate) * up


@kernel
def npu_swiglu(x, dim=-1):
    _check_gate(x)
    return _swiglu(x, dim).to(x.dtype)


@kernel
def npu_swiglu_backward(grad, x, dim=-1):
    return derivative(lambda x: _swiglu(x, dim), grad, x)[0]


@kernel
def npu_clipped_swiglu(x, *, group_index=None, dim=-1, alpha=1.702, limit=7.0, bias=1.0, interleaved=True):
    _check_gate(x)
    need(group_index is None and dim == -1, "here along the last dimension, all rows")
    gate, up = (wide(x)[..., ::2], wide(x)[..., 1::2]) if interleaved else wide(x).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + bias)).to(x.dtype)


@kernel
def npu_format_cast(x, acl_format, **unused):
    return x.clone()  # another order in memory, the same values: what convolutions want of their weights


# ---- attention


_TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def _hidden(num_queries, num_keys, mask, sparse_mode, before, after):
    """[queries, keys] bool: what the kernel leaves out; None for nothing."""
    if mask is None:  # without a mask the kernel does not look at sparse_mode
        return None
    if sparse_mode in (0, 1):
        return mask.bool()
    need(sparse_mode in (2, 3, 4), f"sparse_mode {sparse_mode} has no reference here")
    need(tuple(mask.shape) == (2048, 2048), f"the compressed mask of sparse_mode {sparse_mode} is 2048 x 2048")
    need(mask.bool().equal(_TRIANGLE), "the mask must be upper triangular")
    query = torch.arange(num_queries)[:, None] + (0 if sparse_mode == 2 else num_keys - num_queries)
    distance = query - torch.arange(num_keys)
    return distance < 0 if sparse_mode != 4 else (distance < -after) | (distance > before)


def _attend(q, k, v, sink, scale, hidden):
    """[N, S, K], [M, L, K] and [M, L, V] -> [N, S, V], and the maximum and the sum of each row's softmax [N, S, 1]."""
    repeats = q.shape[0] // k.shape[0]
    k, v = (tensor.repeat_interleave(repeats, dim=0) for tensor in (k, v))
    scores = wide(q) @ wide(k).transpose(1, 2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    if sink is not None:
        highest = highest.maximum(sink.detach()[:, None, None])
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink[:, None, None] - highest).exp()
    total = total.clamp(min=1e-30)  # of a row that sees nothing
    return weights / total @ wide(v), highest, total


# Arguments of npu_fusion_attention and its backward behind the layout, in the order of the schema.
_OPTIONS = (
    *("pse", "padding_mask", "atten_mask", "scale", "keep_prob", "pre_tockens", "next_tockens", "inner_precise"),
    *("prefix", "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode", "gen_mask_parallel", "sync", "softmax_layout"),
    "sink",
)


class _Attention:
    """One call: checks it, and cuts it into documents (layout TND) or rows (BNSD)."""

    def __init__(self, query, key, value, heads, layout, *positional, scale_value=1.0, **keywords):
        options = {"scale": scale_value} | dict(zip(_OPTIONS, positional, strict=False)) | keywords
        unsupported = [options.get(name) for name in ("pse", "padding_mask", "prefix")]
        need(unsupported == [None] * 3 and options.get("keep_prob", 1) == 1, "no reference here for these options")
        self.inputs = (query, key, value)
        self.sink = options.get("sink")
        self.mask = options.get("atten_mask")
        self.scale = options["scale"]
        self.sparsity = (
            options.get("sparse_mode", 0),
            options.get("pre_tockens", 2**31 - 1),
            options.get("next_tockens", 2**31 - 1),
        )
        self._check(heads, layout)
        self.is_packed = layout == "TND"
        if self.is_packed:
            self.q_lengths = _lengths(options.get("actual_seq_qlen"), len(query))
            self.kv_lengths = _lengths(options.get("actual_seq_kvlen"), len(key))

    def _check(self, heads, layout):
        query, key, value = self.inputs
        need(layout in ("TND", "BNSD"), f"layout {layout} has no reference here")
        need(query.dtype in FLOATS and query.dtype == key.dtype == value.dtype, "one dtype of floats")
        need(self.mask is None or self.mask.dtype in (torch.bool, torch.uint8), "the mask is bool or uint8, True hides")
        need(
            self.sink is None or (self.sink.dtype == torch.float32 and len(self.sink) == heads),
            "fp32 sinks, one a head",
        )
        need(query.shape[1] == heads <= 256 and heads % key.shape[1] == 0, f"head_num {heads}")
        sizes = [tensor.shape[-1] for tensor in self.inputs]
        need(sizes[0] == sizes[1] >= sizes[2] and sizes[0] <= 768, f"head sizes {sizes}: Dq = Dk >= Dv, at most 768")

    def outputs(self):
        """What the forward operator returns before its numbers."""
        output, highest, total = self._attend(*self.inputs, self.sink)
        statistics = (tensor.expand(*tensor.shape[:-1], 8).contiguous() for tensor in (highest, total))
        query = self.inputs[0]
        return output.to(query.dtype).contiguous(), *statistics, query.new_empty(0)

    def gradients(self, grad):
        """What the backward operator returns: of query, key, value, pse and sink."""
        inputs = [*self.inputs, *([] if self.sink is None else [self.sink])]

        def output(query, key, value, sink=None):
            return self._attend(query, key, value, sink)[0]

        grads = [tensor.contiguous() for tensor in derivative(output, grad, *inputs)]
        nothing = self.inputs[0].new_empty(0)
        return *grads[:3], nothing, grads[3] if len(grads) > 3 else nothing

    def _attend(self, query, key, value, sink):
        if self.is_packed:
            split = (query.split(self.q_lengths), key.split(self.kv_lengths), value.split(self.kv_lengths))
            parts = [[tensor.transpose(0, 1) for tensor in part] for part in zip(*split, strict=True)]
        else:
            parts = list(zip(query, key, value, strict=True))
        results = []
        for number, (q, k, v) in enumerate(parts):
            mask = self.mask
            if mask is not None and mask.dim() == 4:  # [1 or rows, 1 or heads, queries, keys]
                mask = mask[number if mask.shape[0] > 1 else 0]
            hidden = _hidden(q.shape[1], k.shape[1], mask, *self.sparsity)
            results.append(_attend(q, k, v, sink, self.scale, hidden))
        joined = zip(*results, strict=True)
        if self.is_packed:
            return tuple(torch.cat([part.transpose(0, 1) for part in parts]) for parts in joined)
        return tuple(torch.stack(parts) for parts in joined)


def _lengths(ends, total):
    need(ends is not None and 0 < len(ends) <= 1024, "TND takes 1 to 1024 cumulative lengths")
    need(ends[-1] == total, f"cumulative lengths end at {ends[-1]} of {total} tokens")
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    need(min(lengths) > 0, "a document without tokens")
    return lengths


@kernel
def npu_fusion_attention(*arguments, **options):
    return *_Attention(*arguments, **options).outputs(), 0, 0, 0


@kernel
def npu_fusion_attention_grad(query, key, value, dy, *arguments, **options):
    return _Attention(query, key, value, *arguments, **options).gradients(dy)


@kernel
def npu_fusion_attention_v3(*arguments, **options):  # what scaled_dot_product_attention calls
    return *_Attention(*arguments, **options).outputs(), torch.tensor([0]), torch.tensor([0])


@kernel
def npu_fusion_attention_grad_v3(query, key, value, dy, *arguments, **options):
    return _Attention(query, key, value, *arguments, **options).gradients(dy)
