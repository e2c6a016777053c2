"""The modules of one transformer layer, named as Megatron-Core names them. Every weight is frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.engine.model.attention import attend
from steps.engine.model.pointwise import rms_norm, swiglu
from steps.engine.model.quantization import QuantizedWeight, Spec, product, quantize
from steps.engine.model.rotary import rotate
from steps.shapes.model_config import ModelConfig


@dataclass(frozen=True)
class Documents:
    """What the layers need to know of a packed row, worked out once for all of them.

    lengths: tokens of each document.  cos, sin: [tokens, 1, 1, D / 2], positions counted inside each document.
    """

    lengths: tuple[int, ...]
    cos: Tensor
    sin: Tensor

    def attend(self, layer: SelfAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each token of the row takes from the others, see `attention.attend`; [tokens, heads * D]."""
        return attend(query, key, value, self.lengths, layer.window)


def frozen(*shape: int) -> nn.Parameter:
    """A parameter without a gradient and, until a checkpoint fills it, without a meaning."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Weight(nn.Module):
    """A module that is one weight: a norm's scale, an embedding table, the output layer."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = frozen(*shape)


class Linear(nn.Module):
    """x W^T + b with W [out, in], as it is or in few bits, and a place for an adapter.

    An adapter is a child module named `adapter`, so that its tensors are called `<linear>.adapter.<name>`. It is called
    with the input and this module and returns the whole output: it asks `project` for the frozen part.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: nn.Parameter | QuantizedWeight = frozen(out_features, in_features)
        self.bias = frozen(out_features) if bias else None
        self.adapter: nn.Module | None = None

    def dense(self) -> Tensor:
        """The frozen weight [out, in] in the compute dtype, for methods that look at it. Not to be kept or changed.

        Of a quantized weight: what it dequantizes to, made anew.
        """
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.dequantize().to(self.weight.dtype)
        return self.weight

    def quantize(self, spec: Spec, compute_dtype: torch.dtype | None = None) -> None:
        """Hold the weight as `spec` says from now on. compute_dtype: of the products; None: the weight's own."""
        assert isinstance(self.weight, nn.Parameter), "it is quantized already"
        held = quantize(self.weight, spec, compute_dtype)
        del self.weight
        self.weight = held

    def project(self, x: Tensor, *, bias: bool = True) -> Tensor:
        """The frozen product. x: [tokens, in]; returns [tokens, out]. No gradient of the weight is ever computed.

        bias: False leaves the bias out.
        """
        added = self.bias if bias else None
        if isinstance(self.weight, QuantizedWeight):
            return product(x, self.weight, added)
        return F.linear(x, self.weight, added)

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return self.project(x)
        out: Tensor = self.adapter(x, self)
        return out


class LayerNormLinear(Linear):
    """RMSNorm and the linear behind it in one module, as Megatron-Core's TELayerNormColumnParallelLinear.

    An adapter sees the normalized input.
    """

    def __init__(self, in_features: int, out_features: int, epsilon: float, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.epsilon = epsilon
        self.layer_norm_weight = frozen(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rms_norm(x, self.layer_norm_weight, self.epsilon))


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, optional bias (Qwen2) and norms of query and key (Qwen3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups, self.channels = config.num_query_groups, config.kv_channels
        self.window, self.epsilon = config.window_size, config.layernorm_epsilon
        self.linear_qkv = LayerNormLinear(
            config.hidden_size, config.qkv_size, config.layernorm_epsilon, bias=config.add_qkv_bias
        )
        self.q_layernorm = Weight(config.kv_channels) if config.qk_layernorm else None
        self.k_layernorm = Weight(config.kv_channels) if config.qk_layernorm else None
        self.linear_proj = Linear(config.query_size, config.hidden_size)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        # Per group: its queries, then its key, then its value.
        mixed = self.linear_qkv(x).view(len(x), self.groups, -1, self.channels)
        turning, value = mixed[:, :, :-1], mixed[:, :, -1]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query = rms_norm(turning[:, :, :-1], self.q_layernorm.weight, self.epsilon)
            key = rms_norm(turning[:, :, -1:], self.k_layernorm.weight, self.epsilon)
            turning = torch.cat((query, key), dim=2)
        turned = rotate(turning, documents.cos, documents.sin)
        out = documents.attend(self, turned[:, :, :-1], turned[:, :, -1], value)
        projected: Tensor = self.linear_proj(out)
        return projected


class MLP(nn.Module):
    """SwiGLU: linear_fc1 makes gate and up in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_fc1 = LayerNormLinear(config.hidden_size, 2 * config.ffn_hidden_size, config.layernorm_epsilon)
        self.linear_fc2 = Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_fc2(swiglu(self.linear_fc1(x)))
        return out


class TransformerLayer(nn.Module):
    """Attention and MLP, each added to the residual stream. x: [tokens, hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        x = x + self.self_attention(x, documents)
        out: Tensor = x + self.mlp(x)
        return out
