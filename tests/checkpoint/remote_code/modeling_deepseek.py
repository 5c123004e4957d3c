"""DeepSeek V3 as a Hub repository brings it along: no part of transformers' own implementation, and none of ours.

Written after the public modelling file, for a forward pass without a cache: the same modules, parameter names and keys
of the configuration (`rope_scaling["type"]`, `topk_method`, one module per expert, a parameter for the bias).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_deepseek import DeepseekV3Config


class DeepseekV3RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        hidden_states = hidden_states.float()
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def yarn_find_correction_dim(num_rotations, dim, base, max_position_embeddings):
    return (dim * math.log(max_position_embeddings / (num_rotations * 2 * math.pi))) / (2 * math.log(base))


def yarn_get_mscale(scale=1, mscale=1):
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def yarn_cos_sin(config, length):
    if config.rope_scaling["type"] != "yarn":
        raise ValueError(f"Unknown RoPE scaling type {config.rope_scaling['type']}")
    dim, base, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    original = scaling["original_max_position_embeddings"]
    extrapolated = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    low = math.floor(yarn_find_correction_dim(scaling["beta_fast"], dim, base, original))
    high = math.ceil(yarn_find_correction_dim(scaling["beta_slow"], dim, base, original))
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq = extrapolated / scaling["factor"] * ramp + extrapolated * (1 - ramp)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq)
    emb = torch.cat((angles, angles), dim=-1)
    mscale = yarn_get_mscale(scaling["factor"], scaling["mscale"])
    mscale /= yarn_get_mscale(scaling["factor"], scaling["mscale_all_dim"])
    return emb.cos() * mscale, emb.sin() * mscale


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary_pos_emb(x, cos, sin):
    b, h, s, d = x.shape
    x = x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    return (x * cos) + (rotate_half(x) * sin)


class DeepseekV3Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        self.q_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
        self.q_a_layernorm = DeepseekV3RMSNorm(config.q_lora_rank)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.q_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias=config.attention_bias
        )
        self.kv_a_layernorm = DeepseekV3RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=config.attention_bias)
        self.softmax_scale = self.q_head_dim ** (-0.5)
        mscale_all_dim = config.rope_scaling.get("mscale_all_dim", 0)
        if mscale_all_dim:
            self.softmax_scale *= yarn_get_mscale(config.rope_scaling["factor"], mscale_all_dim) ** 2

    def forward(self, hidden_states):
        config, (b, s, _) = self.config, hidden_states.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q = q.view(b, s, -1, self.q_head_dim).transpose(1, 2)
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        compressed_kv = self.kv_a_proj_with_mqa(hidden_states)
        compressed_kv, k_pe = compressed_kv.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(compressed_kv))
        kv = kv.view(b, s, -1, config.qk_nope_head_dim + config.v_head_dim).transpose(1, 2)
        k_nope, value = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        cos, sin = yarn_cos_sin(config, s)
        q_pe = apply_rotary_pos_emb(q_pe, cos, sin)
        k_pe = apply_rotary_pos_emb(k_pe.view(b, 1, s, -1), cos, sin).expand_as(q_pe)
        query, key = torch.cat([q_nope, q_pe], dim=-1), torch.cat([k_nope, k_pe], dim=-1)
        scores = query @ key.transpose(2, 3) * self.softmax_scale
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
        return self.o_proj((scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(b, s, -1))


class DeepseekV3MLP(nn.Module):
    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, hidden_states):
        config = self.config
        if config.scoring_func != "sigmoid" or config.topk_method != "noaux_tc":
            raise NotImplementedError(f"{config.scoring_func} {config.topk_method}")
        scores = F.linear(hidden_states.float(), self.weight.float()).sigmoid()
        scores_for_choice = (scores + self.e_score_correction_bias).view(
            -1, config.n_group, scores.shape[-1] // config.n_group
        )
        group_idx = scores_for_choice.topk(2, dim=-1)[0].sum(dim=-1).topk(config.topk_group, dim=-1)[1]
        group_mask = torch.zeros(scores_for_choice.shape[:2], dtype=torch.bool).scatter_(1, group_idx, True)
        scores_for_choice = scores_for_choice.masked_fill(~group_mask[..., None], float("-inf")).flatten(1)
        topk_idx = scores_for_choice.topk(config.num_experts_per_tok, dim=-1)[1]
        topk_weight = scores.gather(1, topk_idx)
        if config.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_idx, topk_weight * config.routed_scaling_factor


class DeepseekV3MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList(
            [DeepseekV3MLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        )
        self.gate = MoEGate(config)
        self.shared_experts = DeepseekV3MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states):
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        topk_idx, topk_weight = self.gate(tokens)
        rows = []
        for token, experts, weights in zip(tokens, topk_idx, topk_weight, strict=True):
            chosen = zip(experts, weights, strict=True)
            rows.append(sum(weight * self.experts[int(index)](token) for index, weight in chosen))
        return torch.stack(rows).view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekV3DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        is_sparse = layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0
        self.mlp = DeepseekV3MoE(config) if is_sparse else DeepseekV3MLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DeepseekV3PreTrainedModel(PreTrainedModel):
    config_class = DeepseekV3Config
    base_model_prefix = "model"


class DeepseekV3Model(DeepseekV3PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DeepseekV3DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids):
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids)))
