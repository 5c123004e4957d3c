"""Load balance over the global batch of an optimizer step: counts, auxiliary losses and the correction bias.

    trainer                      routers (one LayerLoad each)               all ranks
    -------                      ----------------------------               ---------
    start_step(totals)   ->      zero the counts
    with recording():    ->      forward adds counts and probabilities
    reduce()             ->      fraction of the step's load by expert  <-  one all-reduce [L, 2E+2]
    loss = watch(loss)
    backward             ->      the losses' gradient joins the router's logits
    update_bias(rate)    ->      bias += rate * sign(mean - count)

The losses enter as a gradient at the router and not through the model's output, so they reach it whatever head or loss
a trainer puts on top. Only what runs inside `recording()` counts: neither evaluation nor a recomputed forward does.

Legend: L MoE layers, T tokens of a micro-batch, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from .dispatcher import count_tokens
from .load_metrics import LoadMetrics
from .losses import sequence_loss, switch_loss, z_loss
from .router import Router
from .routing import Routing
from .tokens import TokenLayout


@dataclass(frozen=True)
class BalanceConfig:
    """Coefficients; 0 switches a term off. Each loss is summed over layers.

    Args:
        aux_loss_coef: of the Switch loss.
        z_loss_coef: of the z-loss.
        sequence_loss_coef: of the loss within each document.
    """

    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    sequence_loss_coef: float = 0.0

    @property
    def has_losses(self) -> bool:
        return any((self.aux_loss_coef, self.z_loss_coef, self.sequence_loss_coef))


@dataclass
class StepState:
    """What all layers share during one optimizer step."""

    recording: bool = False
    num_tokens: torch.Tensor = field(default_factory=lambda: torch.tensor(1))  # real ones of the step, all ranks
    num_documents: torch.Tensor = field(default_factory=lambda: torch.tensor(1))
    # d(what backward starts from) / d(this rank's share of the objective): set by the loss's own backward, which
    # runs before any router's, so that scaling by the trainer, a grad scaler or accelerate reaches both alike.
    grad_scale: torch.Tensor | None = None
    skip_losses: bool = False


class LayerLoad:
    """Counts of one layer, and the gradient of its balance losses."""

    def __init__(self, config: BalanceConfig, step: StepState, num_experts: int):
        self.config = config
        self.step = step
        self.num_experts = num_experts
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        self.count_E = torch.zeros(self.num_experts, dtype=torch.int64, device=device)  # (token, expert) pairs
        self.prob_sum_E = torch.zeros(self.num_experts, dtype=torch.float32, device=device)
        self.other_losses = torch.zeros(2, dtype=torch.float32, device=device)  # z and sequence loss, shares so far
        self.fraction_E: torch.Tensor | None = None  # fp32, load of the whole step; set by reduce()

    def observe(self, router: Router, routing: Routing, layout: TokenLayout) -> torch.Tensor:
        """Count a micro-batch if it is to be counted; returns the routing weights, tied to the balance losses."""
        if self.step.recording:
            self._record(router, routing, layout)
        if self.config.has_losses and torch.is_grad_enabled():
            logits_TE, weights_TK, topk_ids_TK = routing
            return _BalanceGradient.apply(weights_TK, logits_TE, topk_ids_TK, self, router, layout)
        return routing.weights_TK

    @torch.no_grad()
    def _record(self, router: Router, routing: Routing, layout: TokenLayout) -> None:
        real_T = layout.real_T
        counted_TK = real_T[:, None].expand_as(routing.topk_ids_TK)
        self.count_E += count_tokens(routing.topk_ids_TK, router.num_experts, counted_TK)
        probs_TE = router.probabilities(routing.logits_TE)
        self.prob_sum_E += (probs_TE * real_T[:, None]).sum(0)
        if self.config.z_loss_coef:
            self.other_losses[0] += z_loss(routing.logits_TE, real_T, self.step.num_tokens)
        if self.config.sequence_loss_coef:
            self.other_losses[1] += sequence_loss(probs_TE, routing.topk_ids_TK, layout, self.step.num_documents)

    def objective(self, logits_TE, topk_ids_TK, router: Router, layout: TokenLayout) -> torch.Tensor:
        """This micro-batch's share of the layer's weighted balance losses."""
        config, step = self.config, self.step
        probs_TE = router.probabilities(logits_TE)
        total = logits_TE.new_zeros(())
        if config.aux_loss_coef:
            if self.fraction_E is None:
                raise RuntimeError(
                    "Backward ran before the expert counts of this optimizer step were reduced: call "
                    "LoadBalancer.reduce() between the forward and the backward pass (the trainers of this package do)."
                )
            loss = switch_loss(probs_TE, layout.real_T, self.fraction_E, step.num_tokens)
            total = total + config.aux_loss_coef * loss
        if config.z_loss_coef:
            total = total + config.z_loss_coef * z_loss(logits_TE, layout.real_T, step.num_tokens)
        if config.sequence_loss_coef:
            loss = sequence_loss(probs_TE, topk_ids_TK, layout, step.num_documents)
            total = total + config.sequence_loss_coef * loss
        return total


class _BalanceGradient(torch.autograd.Function):
    """Identity on the routing weights; its backward adds the balance losses' gradient to the logits."""

    @staticmethod
    def forward(ctx, weights_TK, logits_TE, topk_ids_TK, load, router, layout):
        ctx.save_for_backward(logits_TE, topk_ids_TK)
        ctx.load, ctx.router, ctx.layout = load, router, layout
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx, grad_weights_TK):
        logits_TE, topk_ids_TK = ctx.saved_tensors
        scale = ctx.load.step.grad_scale
        if scale is None:  # a backward that no trainer watches, an inspection of gradients say
            return grad_weights_TK, None, None, None, None, None
        with torch.enable_grad():
            logits_TE = logits_TE.detach().requires_grad_()
            objective = ctx.load.objective(logits_TE, topk_ids_TK, ctx.router, ctx.layout)
            (grad_logits_TE,) = torch.autograd.grad(objective, logits_TE)
        return grad_weights_TK, grad_logits_TE * scale.to(grad_logits_TE), None, None, None, None


class _WatchScale(torch.autograd.Function):
    """Identity on the loss; its backward notes the factor that the loss is scaled by."""

    @staticmethod
    def forward(ctx, loss, step):
        ctx.step = step
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        ctx.step.grad_scale = grad.detach()
        return grad, None


@dataclass
class LoadBalancer:
    """The balance of a model's MoE layers; made by `attach`, driven by a trainer as drawn on top of this file."""

    config: BalanceConfig
    routers: dict[str, Router]
    step: StepState = field(default_factory=StepState)

    @classmethod
    def attach(cls, model: nn.Module, config: BalanceConfig) -> LoadBalancer:
        """Give each router of `model` its LayerLoad. A dense model gets a balancer without layers."""
        routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        balancer = cls(config, routers)
        for router in routers.values():
            router.load = LayerLoad(config, balancer.step, router.num_experts)
        return balancer

    @property
    def loads(self) -> list[LayerLoad]:
        return [router.load for router in self.routers.values() if router.load is not None]

    def start_step(self, num_tokens: torch.Tensor, num_documents: torch.Tensor) -> None:
        """Begin an optimizer step over so many real tokens and documents, counted over all ranks (scalars, int64)."""
        self.step.num_tokens, self.step.num_documents = num_tokens.clamp(min=1), num_documents.clamp(min=1)
        self.step.grad_scale, self.step.skip_losses = None, False
        for load in self.loads:
            load.reset(num_tokens.device)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Forward passes inside are counted."""
        self.step.recording = True
        try:
            yield
        finally:
            self.step.recording = False

    @torch.no_grad()
    def reduce(self) -> None:
        """Add up the counts of all ranks; one collective for all layers. Every rank must call it."""
        if not self.loads:
            return
        if dist.is_available() and dist.is_initialized():
            # Counts are exact in int64; probabilities and losses are fp32 sums.
            counts = torch.stack([load.count_E for load in self.loads])
            sums = torch.stack([torch.cat([load.prob_sum_E, load.other_losses]) for load in self.loads])
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            for load, count_E, sum_X in zip(self.loads, counts, sums, strict=True):
                load.count_E, load.prob_sum_E, load.other_losses = count_E, sum_X[:-2], sum_X[-2:]
        for load in self.loads:
            load.fraction_E = load.count_E.float() / load.count_E.sum().clamp(min=1)

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """The same loss, through whose backward the balance losses learn their scale.

        Args:
            loss: this rank's share of the micro-batch's loss, in the units of the global one (gradients are summed
                over ranks). What scales it afterwards scales the balance losses too.
        """
        if self.step.skip_losses or not self.config.has_losses:
            return loss
        return _WatchScale.apply(loss, self.step)

    def skip_losses(self) -> None:
        """Leave the balance losses out of this optimizer step; the load is counted all the same."""
        self.step.skip_losses = True

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """Auxiliary-loss-free balancing (arXiv 2408.15664, alg. 1): bias += rate * sign(mean load - load)."""
        for router in self.routers.values():
            if router.load is None or router.e_score_correction_bias is None:
                continue
            load_E = router.load.count_E.float()
            router.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)

    @torch.no_grad()
    def metrics(self) -> LoadMetrics | None:
        """The load of the step just reduced; None for a dense model. Reads back to the host."""
        if not self.loads:
            return None
        aux = [switch_loss_value(load, self.step.num_tokens) for load in self.loads]
        others = torch.stack([load.other_losses for load in self.loads])
        return LoadMetrics(
            load_LE=torch.stack([load.count_E for load in self.loads]).cpu(),
            aux_loss=torch.stack(aux).mean().item(),
            z_loss=others[:, 0].mean().item() if self.config.z_loss_coef else None,
            sequence_loss=others[:, 1].mean().item() if self.config.sequence_loss_coef else None,
        )


def switch_loss_value(load: LayerLoad, num_tokens: torch.Tensor) -> torch.Tensor:
    """The Switch loss of the whole step, from its reduced sums."""
    if load.fraction_E is None:
        raise RuntimeError("The counts of this step are not reduced yet: call LoadBalancer.reduce() first.")
    return load.num_experts * (load.fraction_E * load.prob_sum_E).sum() / num_tokens
