"""The configuration as a Hub repository of the DeepSeek V3 family brings it along."""

from transformers import PretrainedConfig


class DeepseekV3Config(PretrainedConfig):
    model_type = "kimi_k2"

    def __init__(
        self,
        vocab_size=129280,
        hidden_size=7168,
        max_position_embeddings=4096,
        moe_layer_freq=1,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.moe_layer_freq = moe_layer_freq
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.attention_bias = attention_bias
        super().__init__(**kwargs)
