"""AdaLoRA: ranks allotted among the linears while they are trained (arXiv 2303.10512).

W x + s P Λ Q x (equation 3), with Q linear_in.weight [r, in], Λ singular_values [r] and P linear_out.weight [out, r].
A triplet is one row of Q, one singular value and one column of P; a pruned one has the singular value 0 and keeps its
vectors, so that it can come back. How important a triplet is follows from the smoothed sensitivity |w dL/dw| of its
entries (equations 7 to 11); how many are kept, over all linears together, falls with a cubic schedule (equation 12).

s is alpha / dim, a constant. peft divides by `ranknum` + 1e-5 and, on a bfloat16 base, trains that number and does not
save it. The orthogonality term is peft's: the mean, over all P and Q, of the norm that equation 4 squares and sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.config.peft.adalora import AdaLoRA
from steps.engine.adapters.base import Adapter, Adapters, Factors, Method, Target, register
from steps.engine.adapters.lora import Factor, low_rank
from steps.engine.model.layers import Linear

#: Deviation of the normal distribution that the singular vectors start from.
INIT_STD = 0.02


class Importance(nn.Module):
    """Moving averages for every entry of a parameter, float32 or wider: its sensitivity |w dL/dw|, and how far that
    strays from its average."""

    sensitivity: Tensor
    uncertainty: Tensor

    def __init__(self, of: Tensor) -> None:
        super().__init__()
        start = torch.zeros(of.shape, dtype=torch.promote_types(of.dtype, torch.float32))
        self.register_buffer("sensitivity", start, persistent=False)
        self.register_buffer("uncertainty", start.clone(), persistent=False)

    def update(self, parameter: nn.Parameter, beta1: float, beta2: float) -> None:
        """Take in the gradient of one optimizer step (equations 8 to 10)."""
        assert parameter.grad is not None
        now = (parameter * parameter.grad).abs().to(self.sensitivity.dtype)
        self.sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
        self.uncertainty.mul_(beta2).add_((now - self.sensitivity).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Of the parameter's shape (equation 11)."""
        return self.sensitivity * self.uncertainty


class AdaLoRAAdapter(Adapter):
    """linear_in.weight Q [r, in], singular_values Λ [r], linear_out.weight P [out, r].

    kept: [r] bool, the triplets that the last pruning left.
    """

    kept: Tensor

    def __init__(self, linear_in: Tensor, linear_out: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.linear_in, self.linear_out = Factor(linear_in), Factor(linear_out)
        self.singular_values = nn.Parameter(torch.zeros(len(linear_in), dtype=linear_in.dtype))
        self.scale, self.dropout = scale, dropout
        for name, parameter in self._parts():
            self.add_module(f"{name}_importance", Importance(parameter))
        self.register_buffer("kept", torch.ones(len(linear_in), dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        wide = torch.promote_types(self.linear_in.weight.dtype, x.dtype)  # merging rounds no product either
        a = (self.singular_values[:, None].to(wide) * self.linear_in.weight.to(wide)).to(x.dtype)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        return low_rank(linear.project(x), dropped, a, self.linear_out.weight.to(x.dtype), self.scale)

    def memory(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())

    def update(self, beta1: float, beta2: float) -> None:
        """Take in the gradients of one optimizer step."""
        for name, parameter in self._parts():
            self._importance(name).update(parameter, beta1, beta2)

    def scores(self) -> Tensor:
        """The importance of each triplet, [r]: its value's, plus the means over its two vectors (equation 7)."""
        value, right, left = (self._importance(name).scores() for name, _ in self._parts())
        return value + right.mean(1) + left.mean(0)

    def _parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "singular_values", self.singular_values
        yield "linear_in", self.linear_in.weight
        yield "linear_out", self.linear_out.weight

    def _importance(self, name: str) -> Importance:
        module = self.get_submodule(f"{name}_importance")
        assert isinstance(module, Importance)
        return module


@register("adalora")
class AdaLoRAMethod(Method[AdaLoRA]):
    """The method as such; see the module."""

    def build(self, target: Target) -> AdaLoRAAdapter:
        section, linear, generator = self.section, target.linear, target.generator()
        dtype = getattr(torch, section.lora_dtype or "float32")
        right = INIT_STD * torch.randn(section.dim, linear.in_features, generator=generator)
        left = INIT_STD * torch.randn(linear.out_features, section.dim, generator=generator)
        return AdaLoRAAdapter(right.to(dtype), left.to(dtype), section.scale, section.dropout)

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """How far the singular vectors are from orthonormal: the mean Frobenius norm of Q Q^T - I and P^T P - I."""
        if not self.section.orth_reg_weight:
            return None
        sides = [
            side for module in _modules(adapters) for side in (module.linear_in.weight, module.linear_out.weight.T)
        ]
        return self.section.orth_reg_weight * torch.stack([_skew(side) for side in sides]).mean()

    @torch.no_grad()
    def after_step(self, adapters: Adapters, iteration: int, train_iters: int) -> None:
        """Look at the gradients; prune when it is time. Once the ranks are final, what is pruned stays so."""
        section, modules = self.section, _modules(adapters)
        tinit, tfinal, interval = section.phases(train_iters)
        final = train_iters - tfinal
        if iteration < final:
            for module in modules:
                module.update(section.beta1, section.beta2)
        if iteration == final or (tinit < iteration < final and iteration % interval == 0):
            kept = largest(
                [module.scores() for module in modules], section.budget(iteration, train_iters, len(modules))
            )
            for module, mask in zip(modules, kept, strict=True):
                module.kept.copy_(mask)
        elif iteration < final:
            return
        for module in modules:
            module.singular_values.masked_fill_(~module.kept, 0)

    def factors(self, name: str, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        """All dim triplets, those that were pruned too; the export drops them with `Factors.compact`."""
        a = tensors["linear_in.weight"].float() * tensors["singular_values"].float()[:, None]
        return {"": Factors(a, tensors["linear_out.weight"].float(), self.section.scale)}

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """ranks: of each linear, by its full name: singular values that are not zero."""
        ranks = {name: module.singular_values.count_nonzero() for name, module in _named(adapters)}
        return {"ranks": {name: int(rank) for name, rank in ranks.items()}}

    def summary(self, adapters: Adapters) -> str:
        by_kind: dict[str, list[int]] = {}
        for name, rank in self.report(adapters)["ranks"].items():
            by_kind.setdefault(name.rpartition(".")[2], []).append(rank)
        told = ", ".join(f"{kind} {sum(ranks) / len(ranks):.1f}" for kind, ranks in by_kind.items())
        total = sum(map(sum, by_kind.values()))
        return f"{total} of {self.section.dim * len(adapters.modules)} triplets kept; mean ranks: {told}"


def largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Which entries are among the `count` largest of all the score vectors together, as masks of their shapes.

    Exactly `count` are; of equal scores the earlier one is.
    """
    flat = torch.cat(scores)
    kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    kept[flat.argsort(descending=True, stable=True)[:count]] = True
    return list(torch.split(kept, [len(vector) for vector in scores]))


def _skew(rows: Tensor) -> Tensor:
    """||R R^T - I|| of rows [r, n], in float32 or wider."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm: Tensor = torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return norm


def _named(adapters: Adapters) -> Iterator[tuple[str, AdaLoRAAdapter]]:
    for name, module in adapters.modules.items():
        assert isinstance(module, AdaLoRAAdapter)
        yield name, module


def _modules(adapters: Adapters) -> list[AdaLoRAAdapter]:
    return [module for _, module in _named(adapters)]
