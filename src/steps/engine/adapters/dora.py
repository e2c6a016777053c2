"""DoRA: the weight split into magnitude and direction (arXiv 2402.09353, equation 5).

W' = m (W + s B A) / ||W + s B A||, with one magnitude m and one norm for each output row. The norm is a constant to the
gradient (section 4.3). It is never taken of a matrix B A: for a row w of W and b of B

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b^T

which costs as much as r more tokens. A row of W + s B A that is zero has no direction, and is zero whatever its
magnitude: its factor is taken as 1, so that B still learns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.config.peft.dora import DoRA
from steps.engine.adapters.base import Adapter, Factors, Method, Target, register
from steps.engine.adapters.lora import Factor, low_rank
from steps.engine.adapters.starts import matrix
from steps.engine.model.layers import Linear


class DoRAAdapter(Adapter):
    """linear_in.weight A [r, in], linear_out.weight B [out, r], weight_magnitude m [out] (float32 or wider)."""

    weight_squares: Tensor

    def __init__(
        self, linear_in: Tensor, linear_out: Tensor, weight_squares: Tensor, scale: float, dropout: float
    ) -> None:
        """weight_squares: ||w||^2 of each row of the base weight, [out] float32."""
        super().__init__()
        self.linear_in, self.linear_out = Factor(linear_in), Factor(linear_out)
        # Rounded to bfloat16 it would be up to 0.4 % off the norm, and training would not start from the base.
        self.weight_magnitude = nn.Parameter(weight_squares.sqrt())
        self.register_buffer("weight_squares", weight_squares, persistent=False)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        a, b = self.linear_in.weight.to(x.dtype), self.linear_out.weight.to(x.dtype)
        gain = self.gain(linear, a, b).to(x.dtype)
        if self.dropout and self.training:
            # What is dropped is missing in the adapted part alone: W x + (gain - 1) W d(x) + gain s B A d(x).
            dropped = F.dropout(x, self.dropout)
            base = linear.project(dropped, bias=False)
            update = low_rank(x.new_zeros(base.shape), dropped, a, b, self.scale)
            return linear.project(x) + (gain - 1) * base + gain * update
        out = low_rank(linear.project(x, bias=False), x, a, b, self.scale) * gain
        return out if linear.bias is None else out + linear.bias

    def gain(self, linear: Linear, a: Tensor, b: Tensor) -> Tensor:
        """m / ||W + s B A|| of each row, [out], float32 or wider; 1 where the norm is zero. m alone has a gradient."""
        with torch.no_grad():
            wide = torch.promote_types(a.dtype, torch.float32)
            crossed = F.linear(linear.dense(), a).to(wide)  # W A^T [out, r]
            a, b = a.to(wide), b.to(wide)
            squares = self.weight_squares.to(wide) + self.scale * (
                b * (2 * crossed + self.scale * (b @ (a @ a.T)))
            ).sum(1)
            norm = squares.clamp_min(0).sqrt()
        return torch.where(norm > 0, self.weight_magnitude.to(wide) / norm.where(norm > 0, 1), 1)


@register("dora")
class DoRAMethod(Method[DoRA]):
    """The method as such; see the module."""

    bridge_class = "megatron.bridge.peft.dora.DoRA"

    def build(self, target: Target) -> DoRAAdapter:
        section, linear = self.section, target.linear
        dtype = getattr(torch, section.lora_dtype or "float32")
        a = matrix(section.lora_A_init_method, section.dim, linear.in_features, target.generator()).to(dtype)
        b = torch.zeros(linear.out_features, section.dim, dtype=dtype)
        weight = linear.dense()
        squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1).cpu()
        return DoRAAdapter(a, b, squares, section.scale, section.dropout)

    def factors(self, name: str, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        a, b = tensors["linear_in.weight"].float(), tensors["linear_out.weight"].float()
        return {"": Factors(a, b, self.section.scale, tensors["weight_magnitude"].float())}

    def merge(self, name: str, weight: Tensor, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        (factors,) = self.factors(name, tensors, shared).values()
        assert factors.magnitude is not None
        merged = factors.delta().add_(weight)
        norm = torch.linalg.vector_norm(merged, dim=1)
        gain = torch.where(norm > 0, factors.magnitude / norm.where(norm > 0, 1), 1)
        return merged.mul_(gain[:, None]).to(weight.dtype)
