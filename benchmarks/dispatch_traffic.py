"""What expert parallelism puts on the wire: token copies and bytes of one MoE layer, for each dispatcher.

    python -m benchmarks.dispatch_traffic                       # top-8 of 128 experts over EP 8, even routing
    python -m benchmarks.dispatch_traffic --ep_size 4 --top_k 4

Runs the real dispatchers on CPU processes over gloo and counts what they hand to all-to-all, so the figures hold for
any device. Experts are tiny (their size does not matter); the hidden size and the dtype are those of a real model.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig

from xtuner_hf._compat import EPImplementationInterface
from xtuner_hf.moe.ep_dispatcher import IMPLEMENTATION_NAME
from xtuner_hf.moe.experts import GroupedExperts

RESULTS = Path(__file__).parent / "results" / "dispatch_traffic.json"


class WireCounter(TorchDispatchMode):
    """Counts what this rank sends to others in all-to-alls: rows of `hidden_size` columns, and all bytes.

    Attributes:
        rows: token rows sent, one's own share included.
        rows_away: those that leave the rank.
        bytes_away: bytes that leave the rank, ids, weights and counts included.
    """

    def __init__(self, hidden_size: int, rank: int, num_ranks: int):
        super().__init__()
        self.hidden_size, self.rank, self.num_ranks = hidden_size, rank, num_ranks
        self.rows = self.rows_away = self.bytes_away = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_to_all_single" in func.name():  # functional: (input, output sizes, input sizes, group)
            self._count(args[0], args[2])
        elif "alltoall_base_" in func.name():  # in place: (output, input, group, output sizes, input sizes, ...)
            self._count(args[1], args[4])
        return func(*args, **(kwargs or {}))

    def _count(self, sent: torch.Tensor, sizes) -> None:
        sizes = list(sizes) or [sent.shape[0] // self.num_ranks] * self.num_ranks
        away = sum(sizes) - sizes[self.rank]
        self.bytes_away += away * sent[0:1].numel() * sent.element_size() if sent.shape[0] else 0
        if sent.dim() == 2 and sent.shape[1] == self.hidden_size:
            self.rows += sum(sizes)
            self.rows_away += away


def make_experts(name: str, mesh, num_experts: int, hidden_size: int, dtype: torch.dtype, top_k: int):
    """This rank's experts behind the dispatcher of that name, called like an experts module."""
    config = Qwen3MoeConfig(
        num_experts=num_experts // mesh["ep"].size(),
        num_experts_per_tok=top_k,
        hidden_size=hidden_size,
        moe_intermediate_size=16,
    )
    config._experts_implementation = "xtuner_grouped_mm"
    experts = GroupedExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return EPImplementationInterface()[name](experts, mesh["ep"], mesh["tp"])


def measure(rank: int, port: int, options: dict, results) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ep_size, num_experts, top_k = options["ep_size"], options["num_experts"], options["top_k"]
    dist.init_process_group("gloo", rank=rank, world_size=ep_size)
    mesh = init_device_mesh("cpu", (ep_size, 1), mesh_dim_names=("ep", "tp"))
    torch.manual_seed(rank)
    shape = options["tokens"], options["hidden_size"]
    ids_TK = torch.rand(options["tokens"], num_experts).topk(top_k).indices  # every set of K experts as likely
    weights_TK = torch.rand(options["tokens"], top_k).softmax(-1)
    for name in ("all_to_all", IMPLEMENTATION_NAME):
        dispatch = make_experts(name, mesh, num_experts, options["hidden_size"], torch.bfloat16, top_k)
        hidden_TH = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        weights_TK.requires_grad_()
        with WireCounter(options["hidden_size"], rank, ep_size) as forward:
            output_TH = dispatch(hidden_TH, ids_TK, weights_TK)
        with WireCounter(options["hidden_size"], rank, ep_size) as backward:
            output_TH.sum().backward()
        total = torch.tensor([[c.rows, c.rows_away, c.bytes_away] for c in (forward, backward)])
        dist.all_reduce(total)
        if rank == 0:
            results[name] = total.tolist()
    dist.destroy_process_group()


def expected_ranks(num_experts: int, ep_size: int, top_k: int) -> float:
    """Ranks that a token needs on average when every set of K experts is as likely: P * (1 - C(E-L, K) / C(E, K))."""
    missed = 1.0
    for i in range(top_k):
        missed *= max(num_experts - num_experts // ep_size - i, 0) / (num_experts - i)
    return ep_size * (1 - missed)


def report(options: dict, raw: dict) -> dict:
    tokens = options["tokens"] * options["ep_size"]
    figures: dict = {"options": options, "expected_copies_once_per_rank": expected_ranks(**_routing(options))}
    for name, (forward, backward) in raw.items():
        # Rows travel there and back in forward: copies of a token are counted one way.
        figures["all_to_all" if name == "all_to_all" else "ours"] = {
            "copies_per_token": forward[0] / 2 / tokens,
            "copies_per_token_that_leave_the_rank": forward[1] / 2 / tokens,
            "bytes_per_token_forward": forward[2] / tokens,
            "bytes_per_token_backward": backward[2] / tokens,
        }
    stock, ours = figures["all_to_all"], figures["ours"]
    figures["ours_over_all_to_all"] = {key: ours[key] / stock[key] for key in stock}
    return figures


def _routing(options: dict) -> dict:
    return {key: options[key] for key in ("num_experts", "ep_size", "top_k")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("ep_size", 8), ("num_experts", 128), ("top_k", 8), ("hidden_size", 2048), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    options = {key: value for key, value in vars(arguments).items() if key != "output"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(measure, (port, options, results), nprocs=options["ep_size"])
        figures = report(options, dict(results))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
