"""Both dispatchers on the ranks of an EP group, against all experts in one process: what each rank finds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig

from benchmarks.dispatch_traffic import WireCounter
from xtuner_hf import host_reads
from xtuner_hf._compat import EPImplementationInterface
from xtuner_hf.moe import ep_dispatcher
from xtuner_hf.moe.experts import GroupedExperts

HIDDEN, NUM_EXPERTS = 16, 16

# tokens on each rank, experts of a token, experts that the router may choose
CASES = {
    "unequal": ([7, 19, 3, 11], 6, range(16)),
    "top-1": ([7, 19, 3, 11], 1, range(16)),
    "more chosen than a rank has": ([7, 9, 3, 11], 12, range(16)),
    "a rank without tokens": ([0, 9, 5, 4], 4, range(16)),
    "only one rank with tokens": ([0, 0, 6, 0], 4, range(16)),
    "a rank whose experts are not chosen": ([7, 9, 5, 4], 4, range(4, 16)),
    "one rank has all that are chosen": ([7, 9, 5, 4], 3, range(8, 12)),
}


def full_experts(dtype: torch.dtype, kernel: str) -> GroupedExperts:
    config = Qwen3MoeConfig(
        num_experts=NUM_EXPERTS, num_experts_per_tok=4, hidden_size=HIDDEN, moe_intermediate_size=16
    )
    config._experts_implementation = kernel
    experts = GroupedExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
    return experts


def tokens_of(case: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Hidden states, expert ids, weights and the output's gradient of every rank."""
    sizes, top_k, choice = CASES[case]
    generator = torch.Generator().manual_seed(1)
    ranks = []
    for size in sizes:
        hidden_TH = torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        scores = torch.full((size, NUM_EXPERTS), -1.0)
        scores[:, list(choice)] = torch.rand(size, len(choice), generator=generator)
        weights_TK = torch.rand(size, top_k, generator=generator)
        grad_TH = torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        ranks.append((hidden_TH, scores.topk(top_k).indices, weights_TK, grad_TH))
    return ranks


def reference(case: str, dtype: torch.dtype) -> dict[str, list[torch.Tensor] | torch.Tensor]:
    """All experts and tokens in one process, in fp64, on values rounded to `dtype`."""
    experts = full_experts(dtype, "xtuner_reference").double()
    found: dict = {"output": [], "hidden": [], "weights": []}
    for hidden_TH, ids_TK, weights_TK, grad_TH in tokens_of(case, dtype):
        hidden_TH, weights_TK = hidden_TH.double().requires_grad_(), weights_TK.double().requires_grad_()
        output_TH = experts(hidden_TH, ids_TK, weights_TK)
        output_TH.backward(grad_TH.double())
        found["output"].append(output_TH.detach())
        found["hidden"].append(hidden_TH.grad)
        found["weights"].append(weights_TK.grad)
    return found | {name: parameter.grad for name, parameter in experts.named_parameters()}


# Operators that make the host wait for a device.
WAITING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "item")


class OperatorSpy(TorchDispatchMode):
    """Notes the operators of these names that run inside the `with`, and with "nonzero" the indices that are masks."""

    def __init__(self, watched: tuple[str, ...]):
        super().__init__()
        self.watched = watched
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.watched:
            self.found.append(name)
        if name.startswith("index") and "nonzero" in self.watched and any(map(_is_mask, args[1:2])):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def _is_mask(indices: object) -> bool:
    found = indices if isinstance(indices, list | tuple) else [indices]
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in found)


def run(dispatcher: str, case: str, dtype: torch.dtype, kernel: str = "xtuner_reference", mode: str = "plain") -> dict:
    """Relative errors of this rank against the reference, and what went over the wire."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("ep", "tp"))
    experts = full_experts(dtype, kernel)
    per_rank = NUM_EXPERTS // size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(parameter.data[mine].clone()))
    experts.num_experts = per_rank
    dispatch = EPImplementationInterface()[dispatcher](experts, mesh["ep"], mesh["tp"])
    hidden_TH, ids_TK, weights_TK, grad_TH = tokens_of(case, dtype)[rank]
    hidden_TH.requires_grad_()
    weights_TK.requires_grad_()
    with WireCounter(HIDDEN, rank, size) as wire, OperatorSpy(WAITING_OPERATORS) as syncs:
        if mode == "started early":
            dispatch.start(ids_TK)
        if mode in ("recompute", "reentrant recompute"):
            output_TH = checkpoint(dispatch, hidden_TH, ids_TK, weights_TK, use_reentrant=mode != "recompute")
        else:
            output_TH = dispatch(hidden_TH, ids_TK, weights_TK)
    with syncs:
        output_TH.backward(grad_TH.to(output_TH.dtype))
    expected = reference(case, dtype)
    found = {
        "output": (output_TH, expected["output"][rank]),
        "hidden": (hidden_TH.grad, expected["hidden"][rank]),
        "weights": (weights_TK.grad, expected["weights"][rank]),
        **{name: (p.grad, expected[name][mine]) for name, p in experts.named_parameters()},
    }
    errors = {name: relative_error(*pair) for name, pair in found.items()}
    return {
        "errors": errors,
        "rows": wire.rows,
        "output": output_TH.detach(),
        "hidden": hidden_TH.grad,
        "waiting operators": syncs.found,
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found is not None, "no gradient"
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return (found.double() - expected).abs().max().item() / max(scale, 1e-3) if expected.numel() else 0.0


def all_cases() -> dict:
    """Everything in one set of processes: starting them is what takes the time."""
    dist.init_process_group("gloo")
    ours = ep_dispatcher.IMPLEMENTATION_NAME
    results: dict = {}
    for case in CASES:
        for dispatcher in (ours, "all_to_all"):
            results[case, dispatcher] = run(dispatcher, case, torch.float64)
        results[case, "fp32"] = run(ours, case, torch.float32, "xtuner_grouped_mm")
    for mode in ("recompute", "reentrant recompute", "started early"):
        for case in ("unequal", "a rank without tokens", "a rank whose experts are not chosen"):
            results[case, mode] = run(ours, case, torch.float64, mode=mode)
    for dispatcher in (ours, "all_to_all"):
        results["bf16", dispatcher] = run(dispatcher, "unequal", torch.bfloat16, "xtuner_grouped_mm")
    results["waits"] = count_waits(ours)
    return results


def count_waits(dispatcher: str) -> int:
    """Times that a forward and backward waits for a copy to the host."""
    waits = []
    wait = host_reads.HostCopy.wait
    host_reads.HostCopy.wait = lambda self: waits.append(1) or wait(self)
    try:
        run(dispatcher, "unequal", torch.float32, "xtuner_grouped_mm")
    finally:
        host_reads.HostCopy.wait = wait
    return len(waits)
