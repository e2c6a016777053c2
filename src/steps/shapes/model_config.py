"""The shape of a decoder, in Megatron's TransformerConfig names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    family:          the Hugging Face `model_type` it came from (llama, mistral, qwen2, qwen3): decides the export.
    kv_channels:     channels of one attention head (D); not always hidden_size / num_attention_heads (Qwen3).
    rope_scaling:    Llama-3 scaling as in config.json: factor, low_freq_factor, high_freq_factor,
                     original_max_position_embeddings; None for plain RoPE.
    window_size:     sliding-window attention: a token sees itself and the window_size - 1 before it
                     (transformers' `sliding_window`); None for full attention.
    params_dtype:    "float32" | "bfloat16" | "float16", the dtype of the stored weights.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    share_embeddings_and_output_weights: bool = False
    window_size: int | None = None
    params_dtype: str = "float32"

    @property
    def qkv_size(self) -> int:
        """Rows of linear_qkv: (heads + 2 * groups) * D."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def query_size(self) -> int:
        """Columns of linear_proj: heads * D."""
        return self.num_attention_heads * self.kv_channels

    @property
    def norm_parameters(self) -> int:
        """Scales of all norms: two in a layer (Qwen3: of query and key too), one at the end."""
        layer = 2 * self.hidden_size + 2 * self.kv_channels * self.qk_layernorm
        return self.num_layers * layer + self.hidden_size

    @property
    def bias_parameters(self) -> int:
        """Biases of all linears."""
        return self.num_layers * self.qkv_size * self.add_qkv_bias

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied output layer counts once."""
        hidden = self.hidden_size
        layer = self.qkv_size * hidden + hidden * self.query_size + 3 * self.ffn_hidden_size * hidden
        tables = 1 if self.share_embeddings_and_output_weights else 2
        fixed = tables * self.vocab_size * hidden + self.norm_parameters + self.bias_parameters
        return fixed + self.num_layers * layer

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run_config.yaml and artifact records."""
        return asdict(self)
