"""The attention modules of our families: transformers' parameters, and a forward with the device's rotary embedding.

transformers calls its rotary function by a global name within each forward. Here it is a step of its own, `rotate`,
which a device's fused operator takes over.

Legend: B rows, S positions, H hidden size, N query heads, M key and value heads, D head size, P rotated part of it, L
rank of MLA's compressed keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from ..kernels.device_operators import fused_on

# A mixin: the attention class that it stands in front of is its base for the type checker alone.
if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class AttentionMixin(_Base):
    """What the kinds of attention share.

    Attributes:
        plain_rotary: the family's (q, k, cos, sin) -> (q, k).
        eager: the family's attention for `attn_implementation="eager"`.
    """

    plain_rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    eager: Callable[..., Any]

    def rotate(self, q_BNSD: torch.Tensor, k_BMSD: torch.Tensor, cos_BSP: torch.Tensor, sin_BSP: torch.Tensor):
        """Queries and keys turned by their positions."""
        rotary = fused_on(q_BNSD.device).rotary
        if rotary is None:
            return self.plain_rotary(q_BNSD, k_BMSD, cos_BSP, sin_BSP)
        cos_BSP, sin_BSP = self.whole_angles(cos_BSP), self.whole_angles(sin_BSP)
        return tuple(rotary(self.in_halves(x), cos_BSP, sin_BSP) for x in (q_BNSD, k_BMSD))

    def whole_angles(self, angles_BSP: torch.Tensor) -> torch.Tensor:
        """The cosine or sine of each rotated number of a head."""
        return angles_BSP

    def in_halves(self, x_BNSP: torch.Tensor) -> torch.Tensor:
        """The numbers that are turned together, half a head apart."""
        return x_BNSP

    def attend(self, q_BNSD, k_BMSD, v_BMSD, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, H] and, eager, the weights."""
        function = AttentionInterface().get_interface(self.config._attn_implementation, self.eager)
        dropout = self.attention_dropout if self.training else 0.0
        output_BSND, weights = function(
            self, q_BNSD, k_BMSD, v_BMSD, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output_BSND.flatten(2)), weights


class GroupedQueryAttention(AttentionMixin):
    """In front of an attention with grouped key and value heads, and norms of queries and keys if it has them."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        """As in transformers."""
        q_BSND, k_BSMD, v_BSMD = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q_BSND, k_BSMD = self.q_norm(q_BSND), self.k_norm(k_BSMD)
        q_BNSD, k_BMSD, v_BMSD = (tensor.transpose(1, 2) for tensor in (q_BSND, k_BSMD, v_BSMD))
        q_BNSD, k_BMSD = self.rotate(q_BNSD, k_BMSD, *position_embeddings)
        if past_key_values is not None:
            k_BMSD, v_BMSD = past_key_values.update(k_BMSD, v_BMSD, self.layer_idx)
        options = {"sliding_window": getattr(self, "sliding_window", None), "s_aux": getattr(self, "sinks", None)}
        options = {name: value for name, value in options.items() if value is not None}
        return self.attend(q_BNSD, k_BMSD, v_BMSD, attention_mask, **options, **kwargs)


class LatentAttention(AttentionMixin):
    """In front of DeepSeek-V3's attention (MLA, arXiv 2412.19437, section 2.1.1)."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        """As in transformers: a cache holds the latents and the rotated part of the keys."""
        q_BSF = hidden_states if self.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(hidden_states))
        q_BSF = (self.q_proj if self.q_lora_rank is None else self.q_b_proj)(q_BSF)
        q_BNSD = q_BSF.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        q_still, q_turned = q_BNSD.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        sizes = [self.kv_lora_rank, self.qk_rope_head_dim]
        latent_BSL, k_turned = self.kv_a_proj_with_mqa(hidden_states).split(sizes, dim=-1)
        latent_B1SL, k_turned = self.kv_a_layernorm(latent_BSL)[:, None], k_turned[:, None]
        q_turned, k_turned = self.rotate(q_turned, k_turned, *position_embeddings)
        if past_key_values is not None:
            latent_B1SL, k_turned = past_key_values.update(latent_B1SL, k_turned, self.layer_idx)
        k_BNSD, v_BNSV = self.expand_kv(latent_B1SL, k_turned)
        return self.attend(torch.cat([q_still, q_turned], dim=-1), k_BNSD, v_BNSV, attention_mask, **kwargs)

    def in_halves(self, x_BNSP: torch.Tensor) -> torch.Tensor:
        # Stored in pairs; transformers gives them back in halves.
        return x_BNSP.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.config.rope_interleave else x_BNSP
