"""The value that a router hands on: which experts each token goes to, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """One layer's routing. T tokens, E experts, K experts per token.

    `logits_TE` comes first because transformers records a router's first output as `router_logits`.
    """

    logits_TE: torch.Tensor  # fp32
    weights_TK: torch.Tensor  # fp32, differentiable
    topk_ids_TK: torch.Tensor  # int64, in the router's order
