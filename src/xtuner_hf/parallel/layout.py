"""`ParallelLayout`: which ranks share what, checked before anything is built, and drawn so that it can be read.

    dense parameters   sharded over fsdp_size ranks, dp_replicate_size copies         (dp_replicate, fsdp)
    experts            split over ep_size ranks, each part sharded over efsdp_size    (dp_replicate, efsdp, ep)
    sequences          split over sp_size ranks                                       (data, sp)

All three lie over the same ranks, the last axis over neighbours: EP and SP groups are consecutive ranks, so they stay
inside a node whenever their size divides the ranks of a node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers.distributed import DistributedConfig

# A picture of more nodes than this shows the first two and the last.
MAX_NODES_DRAWN = 4


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the groups of ranks; one that cannot be raises a ValueError that says what to change.

    Args:
        world_size: ranks of the job.
        ranks_per_node: ranks of each node; nodes are equal.
        ep_size: ranks that share the experts of a layer, each computing its own ones.
        sp_size: ranks that share a sequence.
        dp_replicate_size: copies of the parameters (HSDP); each copy is sharded over `world_size / dp_replicate_size`
            ranks, and only gradients travel between copies.
        ep_across_nodes: allow EP groups that reach over several nodes. Every MoE layer then waits for the network
            between nodes, twice forward and twice backward.
        sp_across_nodes: the same for SP groups and every attention layer.
    """

    world_size: int
    ranks_per_node: int
    ep_size: int = 1
    sp_size: int = 1
    dp_replicate_size: int = 1
    ep_across_nodes: bool = False
    sp_across_nodes: bool = False

    def __post_init__(self):
        for name in ("world_size", "ranks_per_node", "ep_size", "sp_size", "dp_replicate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        self._check_nodes()
        self._check_replicas()
        self._check_group("ep_size", "expert-parallel", self.ep_across_nodes, "ep_across_nodes")
        self._check_group("sp_size", "sequence-parallel", self.sp_across_nodes, "sp_across_nodes")

    def _check_nodes(self) -> None:
        if self.world_size % self.ranks_per_node:
            raise ValueError(
                f"{self.world_size} ranks do not make whole nodes of {self.ranks_per_node}; launch as many processes "
                "on every node."
            )

    def _check_replicas(self) -> None:
        if self.world_size % self.dp_replicate_size:
            raise ValueError(
                f"dp_replicate_size {self.dp_replicate_size} does not divide the {self.world_size} ranks of this job; "
                f"choose a divisor of {self.world_size}, the number of nodes ({self.num_nodes}) say."
            )

    def _check_group(self, name: str, kind: str, consent: bool, consent_name: str) -> None:
        size = getattr(self, name)
        if self.fsdp_size % size:
            copies = f" ({self.dp_replicate_size} copies of {self.fsdp_size})" if self.dp_replicate_size > 1 else ""
            raise ValueError(
                f"{name} {size} does not divide the {self.fsdp_size} ranks that hold one copy of the parameters"
                f"{copies}, so the sizes do not multiply to the {self.world_size} ranks of this job; choose a divisor "
                f"of {self.fsdp_size}, or launch another number of processes."
            )
        if consent:
            return
        if size > self.ranks_per_node:
            raise ValueError(
                f"{name} {size} is larger than a node, which has {self.ranks_per_node} ranks; choose a divisor of "
                f"{self.ranks_per_node}, or set {consent_name} if slow {kind} groups over several nodes are wanted."
            )
        if self.ranks_per_node % size:
            raise ValueError(
                f"{name} {size} does not divide the {self.ranks_per_node} ranks of a node, so some {kind} groups would "
                f"reach over two nodes; choose a divisor of {self.ranks_per_node}, or set {consent_name} if that is "
                "wanted."
            )

    def check_experts(self, num_experts: int | None) -> None:
        """Whether a model's experts can be split over the EP ranks.

        Args:
            num_experts: experts of each MoE layer, None for a dense model.
        """
        if self.ep_size == 1:
            return
        if num_experts is None:
            raise ValueError(f"ep_size is {self.ep_size}, but the model has no experts; leave ep_size at 1.")
        if num_experts % self.ep_size:
            raise ValueError(
                f"ep_size {self.ep_size} does not divide the model's {num_experts} experts; every rank must hold as "
                "many."
            )

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    @property
    def fsdp_size(self) -> int:
        """Ranks that one copy of the dense parameters is sharded over."""
        return self.world_size // self.dp_replicate_size

    @property
    def efsdp_size(self) -> int:
        """Ranks of one copy that hold the same experts, sharded between them."""
        return self.fsdp_size // self.ep_size

    @property
    def data_size(self) -> int:
        """Ranks, or SP groups, that each see their own batch."""
        return self.world_size // self.sp_size

    def distributed_config(self, *, bf16: bool = False, ep_implementation: str = "auto") -> DistributedConfig:
        """The same layout in transformers' words, for `from_pretrained(distributed_config=...)`.

        Args:
            bf16: compute in bf16 from the parameters' own dtype; gradients are reduced in fp32.
            ep_implementation: a name in transformers' `EPImplementationInterface`.
        """
        return DistributedConfig(
            fsdp_size=self.fsdp_size,
            dp_replicate_size=self.dp_replicate_size,
            ep_size=self.ep_size,
            ep_implementation=ep_implementation,
            fsdp_mixed_precision=bf16,
        )

    # ---- the picture ----

    def describe(self, num_experts: int | None = None) -> str:
        """One line: what each rank holds of the parameters."""
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes of {self.ranks_per_node}"
        copies = "1 copy" if self.dp_replicate_size == 1 else f"{self.dp_replicate_size} copies"
        parts = [f"{self.world_size} ranks on {nodes}", f"parameters: {copies} in {self.fsdp_size} shards"]
        if num_experts is not None:
            parts.append(
                f"experts: {num_experts // self.ep_size} of {num_experts} computed on a rank "
                f"(ep {self.ep_size}), stored in {self.efsdp_size} shards"
            )
        if self.sp_size > 1:
            parts.append(f"sequences: each on {self.sp_size} ranks")
        return "; ".join(parts)

    def picture(self) -> str:
        """The groups of ranks, node by node; ranks in the same brackets form a group.

        8 ranks, ep_size 4:

            node 0
              rank              0     1     2     3     4     5     6     7
              parameter shard [ 0     1     2     3     4     5     6     7 ]
              experts (ep)    [ 0     1     2     3 ] [ 0     1     2     3 ]
              expert shard      0     0     0     0     1     1     1     1
        """
        nodes = list(range(self.num_nodes))
        if self.num_nodes > MAX_NODES_DRAWN:
            nodes = [0, 1, self.num_nodes - 1]
        lines: list[str] = []
        for previous, node in zip([-1, *nodes], nodes, strict=False):
            if node > previous + 1:
                lines.append(f"nodes {previous + 1} to {node - 1} go on in the same way")
            lines += [f"node {node}", *self._draw_node(node)]
        return "\n".join(lines)

    def _draw_node(self, node: int) -> list[str]:
        ranks = range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)
        rows: list[tuple[str, Callable[[int], int], int]] = [("rank", lambda rank: rank, 1)]
        if self.dp_replicate_size > 1:
            rows.append(("copy", lambda rank: rank // self.fsdp_size, 1))
        rows.append(("parameter shard", lambda rank: rank % self.fsdp_size, self.fsdp_size))
        if self.ep_size > 1:
            rows.append(("experts (ep)", lambda rank: rank % self.ep_size, self.ep_size))
            rows.append(("expert shard", lambda rank: rank % self.fsdp_size // self.ep_size, 1))
        if self.sp_size > 1:
            rows.append(("sequence (sp)", lambda rank: rank % self.sp_size, self.sp_size))
        return [f"  {name:<16}" + _draw_row(ranks, index, group) for name, index, group in rows]


def _draw_row(ranks: range, index: Callable[[int], int], group_size: int) -> str:
    """Each rank's index in its group; brackets where groups of consecutive ranks begin and end."""
    cells = []
    for rank in ranks:
        opens = group_size > 1 and rank % group_size == 0
        closes = group_size > 1 and (rank + 1) % group_size == 0
        cells.append(f"{'[' if opens else ' '}{index(rank):>3} {']' if closes else ' '}")
    return "".join(cells).rstrip()
