"""Router replay: a forward that sends tokens to experts that were chosen before.

    R2   the ids that this trainer chose when it computed the old log-probabilities (GSPO, arXiv 2507.18071, sec. 5.3)
    R3   the ids that the inference engine chose while it sampled (arXiv 2510.11370)

Only the choice is replayed. Weights are gathered from the live scores of all experts, so that the router keeps its
gradient. Whoever calls the model hands it a `RouteRecorder` or a `RouteReplay` as `routes=`; it travels to the routers
in the `TokenLayout`, also into a recomputed forward, and comes before the dispatch, so that expert parallelism changes
nothing.

Legend: B rows, S positions, T = B*S tokens, L MoE layers, E experts, K experts per token, N tokens of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .router import Router

# In place of an expert's id: the router decides for this token.
NATIVE = -1

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class RouterMap:
    """The routers of a model's decoder layers, in order.

    Args:
        model: may be wrapped (PEFT).

    Raises:
        ValueError: for a model without routers.
    """

    def __init__(self, model: nn.Module):
        self.num_layers: int = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
        self.layers: list[int] = []
        self.position: dict[nn.Module, int] = {}
        self.num_experts = self.top_k = 0
        for name, module in model.named_modules():
            match = _LAYER.search(name)
            # Behind the last layer there may be others, of multi-token prediction, that no engine samples with.
            if isinstance(module, Router) and match and int(match[1]) < self.num_layers:
                self.position[module] = len(self.layers)
                self.layers.append(int(match[1]))
                self.num_experts, self.top_k = module.num_experts, module.top_k
        if not self.layers:
            raise ValueError("router_replay is set, but the model has no routers; set it to None for a dense model.")

    def of_moe_layers(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., layers, K] -> [..., L, K]: engines report MoE layers alone, or every decoder layer.

        Raises:
            ValueError: for another number of layers or of experts per token, an id out of range, or a token that is
                sent to one expert twice (the zeros of an engine that lost its routes).
        """
        num_layers, top_k = ids.shape[-2:]
        if num_layers not in (len(self.layers), self.num_layers) or top_k != self.top_k:
            raise ValueError(
                f"Routes have {num_layers} layers and {top_k} experts per token; this model has {len(self.layers)} MoE "
                f"layers of {self.num_layers} and {self.top_k} experts per token. Check that the engine serves it."
            )
        if num_layers != len(self.layers):
            ids = ids[..., self.layers, :]
        if ids.numel() and (ids.min() < NATIVE or ids.max() >= self.num_experts):
            raise ValueError(
                f"Routes name experts from {int(ids.min())} to {int(ids.max())}; there are {self.num_experts}, and "
                f"{NATIVE} stands for 'route natively'."
            )
        ordered = ids.sort(dim=-1).values
        repeated = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()
        if repeated:
            raise ValueError(
                "Routes send a token to one expert twice, as the zeros of lost routes do (prefix cache, preemption). "
                f"Let the engine client fill rows that the engine did not report with {NATIVE}."
            )
        return ids


class RouteRecorder:
    """Notes what the routers choose in one forward."""

    def __init__(self, routers: RouterMap):
        self._routers = routers
        self._ids: dict[int, torch.Tensor] = {}

    def choose(self, router: nn.Module, native_TK: torch.Tensor) -> torch.Tensor:
        position = self._routers.position.get(router)
        if position is not None:
            self._ids[position] = native_TK.to(torch.int16)
        return native_TK

    def ids_BSLK(self, num_rows: int) -> torch.Tensor:
        """[B, S, L, K] int16."""
        ids_LTK = torch.stack([self._ids[position] for position in range(len(self._routers.layers))])
        return ids_LTK.unflatten(1, (num_rows, -1)).permute(1, 2, 0, 3).contiguous()


class RouteReplay:
    """Makes the routers choose what is given.

    Args:
        ids_BSLK: [B, S, L, K] of an integer dtype; a token with any id of -1 in a layer is routed natively there.
    """

    def __init__(self, routers: RouterMap, ids_BSLK: torch.Tensor):
        self._routers = routers
        self._ids_BSLK = ids_BSLK
        self._used: set[int] = set()

    def choose(self, router: nn.Module, native_TK: torch.Tensor) -> torch.Tensor:
        """The ids of this router's layer, [T, K] int64.

        Raises:
            ValueError: the forward has another number of tokens.
        """
        position = self._routers.position.get(router)
        if position is None:
            return native_TK
        self._used.add(position)
        given_TK = self._ids_BSLK[:, :, position].flatten(0, 1).to(native_TK)
        if given_TK.shape != native_TK.shape:
            raise ValueError(
                f"Routes were given for {tuple(self._ids_BSLK.shape[:2])} tokens, the forward has {len(native_TK)}: "
                "routes must be padded, packed and cut exactly as input_ids are."
            )
        is_given_T1 = (given_TK >= 0).all(dim=-1, keepdim=True)
        return torch.where(is_given_T1, given_TK, native_TK)

    def check_used(self) -> None:
        """Raises a RuntimeError if a router never asked: the model does not hand `routes` on."""
        missing = len(self._routers.layers) - len(self._used)
        if missing:
            raise RuntimeError(f"{missing} of {len(self._routers.layers)} routers did not replay their routes.")


class RearrangedRoutes:
    """The routes of a batch, for a forward that has its tokens in another order, or some of them.

    Args:
        routes: a `RouteRecorder`, a `RouteReplay` or another of these. What it records of tokens that this forward does
            not have is `NATIVE`.
        put: [t, K] of the forward's tokens -> [T, K] of the batch's.
        take: the way back; `NATIVE` for tokens that are not the batch's.
    """

    def __init__(
        self,
        routes: Routes,
        put: Callable[[torch.Tensor], torch.Tensor],
        take: Callable[[torch.Tensor], torch.Tensor],
    ):
        self._routes, self._put, self._take = routes, put, take

    def choose(self, router: nn.Module, native_TK: torch.Tensor) -> torch.Tensor:
        given_TK = self._take(self._routes.choose(router, self._put(native_TK)))
        return torch.where(given_TK == NATIVE, native_TK, given_TK)


class Routes(Protocol):
    """What a forward is handed as `routes=`."""

    def choose(self, router: nn.Module, native_TK: torch.Tensor) -> torch.Tensor:
        """The ids of this router's layer [T, K] in place of those that it would choose."""


class RecordingModel:
    """Calls a model and notes its routes, over several calls with some rows each."""

    def __init__(self, model: Any, routers: RouterMap):
        self._model, self._routers = model, routers
        self._chunks: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        recorder = RouteRecorder(self._routers)
        output = self._model(input_ids=input_ids, routes=recorder, **kwargs)
        self._chunks.append(recorder.ids_BSLK(len(input_ids)))
        return output

    @property
    def ids_BSLK(self) -> torch.Tensor:
        return torch.cat(self._chunks)


class ReplayingModel:
    """Calls a model so that it follows `ids_BSLK`, over several calls with the next rows each."""

    def __init__(self, model: Any, routers: RouterMap, ids_BSLK: torch.Tensor):
        self._model, self._routers, self._ids_BSLK = model, routers, ids_BSLK
        self._row = 0

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        rows = slice(self._row, self._row + len(input_ids))
        self._row = rows.stop
        replay = RouteReplay(self._routers, self._ids_BSLK[rows])
        output = self._model(input_ids=input_ids, routes=replay, **kwargs)
        replay.check_used()
        return output


def align_routes(
    routers: RouterMap, routes: Sequence[Any], lengths: Sequence[tuple[int, int]], prompt_width: int, width: int
) -> torch.Tensor:
    """Routes of single samples -> [B, S, L, K] int16 for prompts padded on the left and completions on the right.

    Args:
        routes: of each sample [N - 1, layers, K] (the last token was sampled and never fed) or [N, layers, K], as a
            tensor, array or nested list; None routes the sample natively.
        lengths: tokens of each sample's prompt and completion.
        prompt_width: P, positions of the padded prompts.
        width: S, positions of prompts and completions.

    Raises:
        ValueError: for another number of samples or tokens, and what `RouterMap.of_moe_layers` refuses.
    """
    if len(routes) != len(lengths):
        raise ValueError(f"There are routes for {len(routes)} samples, and {len(lengths)} samples.")
    shape = (len(routes), width, len(routers.layers), routers.top_k)
    aligned_BSLK = torch.full(shape, NATIVE, dtype=torch.int16)
    for row, (given, (num_prompt, num_completion)) in enumerate(zip(routes, lengths, strict=True)):
        if given is None:
            continue
        ids = torch.as_tensor(given)
        num_tokens = num_prompt + num_completion
        if ids.dim() != 3 or len(ids) not in (num_tokens - 1, num_tokens):
            raise ValueError(
                f"Sample {row} has {num_tokens} tokens and routes of shape {tuple(ids.shape)}; they must be "
                "[tokens - 1, layers, experts per token]."
            )
        start = prompt_width - num_prompt
        aligned_BSLK[row, start : start + len(ids)] = routers.of_moe_layers(ids).to(torch.int16)
    return aligned_BSLK


def freeze_routers(model: nn.Module) -> int:
    """Stop training the routers; returns how many there are. Call it before an optimizer is made."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.requires_grad_(False)
    return len(routers)
