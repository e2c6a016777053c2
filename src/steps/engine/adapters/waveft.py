"""WaveFT: a few coefficients of the weight's 2D Haar transform are trained (arXiv 2505.12532).

W' = W + scaling * R^T S C, with S a sparse matrix of the weight's shape holding the trained coefficients, and R and C
the orthonormal one-level Haar transforms of the output and the input features. Where the coefficients are follows from
a seed. Positions and the order of the four sub-bands are those of Hugging Face's peft; a side of odd length is
continued by one feature, which is cut off again.

The update is never built in training. y = W x + scaling * R^T (S (C x)): two cheap transforms of activations and, for
each coefficient, one multiplication per token. Activations lie as [features, tokens] in between, so that a coefficient
moves whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.config.peft.waveft import WaveFT
from steps.engine.adapters.base import Adapter, Group, Method, Target, register
from steps.engine.model.layers import Linear
from steps.shapes.model_config import ModelConfig


class Sparse(NamedTuple):
    """A sparse matrix without its values, in the order of its rows ("compressed rows"). All int64.

    order:   which coefficient each entry is.
    columns: the column of each entry.
    bounds:  [rows + 1]: the entries of row i are bounds[i] to bounds[i + 1].
    """

    order: Tensor
    columns: Tensor
    bounds: Tensor

    def product(self, values: Tensor, right: Tensor) -> Tensor:
        """This matrix with `values` [coefficients] times right [columns, tokens]: [rows, tokens].

        A weighted bag of rows for each row: each output is written once, by one thread, and summed in float32 or wider.
        """
        return F.embedding_bag(
            self.columns,
            right,
            self.bounds,
            mode="sum",
            per_sample_weights=values[self.order],
            include_last_offset=True,
        )


class Positions:
    """Where the coefficients of an [out, in] linear are, in the Haar domain with both sides even."""

    def __init__(self, out_features: int, in_features: int, count: int, seed: int) -> None:
        flat = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(seed))[:count]
        rows, columns = flat // in_features, flat % in_features
        half_out, half_in = (out_features + 1) // 2, (in_features + 1) // 2
        # peft lays horizontal details (differences between rows) to the right and vertical ones below.
        lower, right = rows >= half_out, columns >= half_in
        self.rows = rows % half_out + half_out * right
        self.columns = columns % half_in + half_in * lower
        self.height, self.width = 2 * half_out, 2 * half_in
        self._placed: dict[torch.device, tuple[Sparse, Sparse]] = {}

    def on(self, device: torch.device) -> tuple[Sparse, Sparse]:
        """The sparse matrix [height, width] and its transpose."""
        if device not in self._placed:
            rows, columns = self.rows.to(device), self.columns.to(device)
            self._placed[device] = _sorted(rows, columns, self.height), _sorted(columns, rows, self.width)
        return self._placed[device]


def _sorted(rows: Tensor, columns: Tensor, height: int) -> Sparse:
    order = torch.argsort(rows, stable=True)
    bounds = F.pad(torch.bincount(rows, minlength=height).cumsum(0), (1, 0))
    return Sparse(order, columns[order], bounds)


def analysis(x: Tensor) -> Tensor:
    """sqrt(2) times the Haar transform of the features of x [tokens, features], as [even features, tokens].

    Sums of neighbours first, then their differences.
    """
    turned = F.pad(x.T, (0, 0, 0, 1)) if x.shape[1] % 2 else x.T.contiguous()
    even, odd = turned[0::2], turned[1::2]
    out = torch.empty_like(turned)
    torch.add(even, odd, out=out[: len(even)])
    torch.sub(even, odd, out=out[len(even) :])
    return out


def synthesis(z: Tensor, features: int) -> Tensor:
    """sqrt(2) times the inverse: z [even features, tokens] as in `analysis`; returns [tokens, features]."""
    sums, differences = z.chunk(2)
    out = torch.empty_like(z)
    torch.add(sums, differences, out=out[0::2])
    torch.sub(sums, differences, out=out[1::2])
    return out[:features].T.contiguous()


class _Wavelet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, spectrum: Tensor, positions: Positions, scale: float) -> Tensor:
        matrix, _ = positions.on(x.device)
        # Two transforms, each sqrt(2) too large.
        values = (spectrum * (scale / 2)).to(x.dtype)
        moved = analysis(x)
        ctx.save_for_backward(moved, values)
        ctx.positions, ctx.scale, ctx.shape = positions, scale / 2, x.shape
        ctx.spectrum_dtype = spectrum.dtype
        ctx.mark_dirty(base)
        return base.add_(synthesis(matrix.product(values, moved), base.shape[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None, None]:
        moved, values = ctx.saved_tensors
        (grad,) = grads
        matrix, transposed = ctx.positions.on(grad.device)
        d_out = analysis(grad)
        # Of each coefficient: its row of d_out times its row of moved, which the bags' own gradient takes in one pass.
        # On CUDA there is none for bfloat16.
        wide = torch.float32 if grad.is_cuda and grad.dtype == torch.bfloat16 else grad.dtype
        with torch.enable_grad():
            leaf = values.detach().to(wide).requires_grad_()
            product = matrix.product(leaf, moved.to(wide))
        (d_values,) = torch.autograd.grad(product, leaf, d_out.to(wide))
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = synthesis(transposed.product(values, d_out), ctx.shape[1])
        d_spectrum = d_values.to(ctx.spectrum_dtype) * ctx.scale
        return grad if ctx.needs_input_grad[0] else None, d_x, d_spectrum, None, None


class WaveFTAdapter(Adapter):
    """spectrum [n_frequency], the coefficients; their positions belong to the shape and are shared."""

    def __init__(self, spectrum: Tensor, positions: Positions, scaling: float) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(spectrum)
        self.positions, self.scaling = positions, scaling

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        out: Tensor = _Wavelet.apply(linear.project(x), x, self.spectrum, self.positions, self.scaling)  # type: ignore[no-untyped-call]
        return out


@register("waveft")
class WaveFTMethod(Method[WaveFT]):
    """The method as such; see the module."""

    def __init__(self, section: WaveFT, model: ModelConfig) -> None:
        super().__init__(section, model)
        self._positions: dict[tuple[int, int], Positions] = {}

    def positions(self, out_features: int, in_features: int) -> Positions:
        """The positions for linears of that shape, drawn once."""
        shape = (out_features, in_features)
        if shape not in self._positions:
            self._positions[shape] = Positions(*shape, self.section.n_frequency, self.section.random_loc_seed)
        return self._positions[shape]

    def build(self, target: Target) -> WaveFTAdapter:
        positions = self.positions(target.linear.out_features, target.linear.in_features)
        return WaveFTAdapter(torch.zeros(self.section.n_frequency), positions, self.section.scaling)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        """Decayed like a matrix: the coefficients are one's, and only stored as a vector."""
        return Group()

    def merge(self, name: str, weight: Tensor, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        positions = self.positions(*weight.shape)
        dense = weight.new_zeros(positions.height, positions.width, dtype=torch.float32)
        dense[positions.rows.to(weight.device), positions.columns.to(weight.device)] = tensors["spectrum"].to(dense)
        update = synthesis(synthesis(dense, weight.shape[0]), weight.shape[1])
        return update.mul_(self.section.scaling / 2).add_(weight).to(weight.dtype)
