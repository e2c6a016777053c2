"""AdamW over what is trained: gradients in one flat buffer, parameter groups, clipping, and state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steps.config.training import Optimizer
from steps.engine.adapters.base import Group
from steps.engine.train.trained import Trained


class Gradients:
    """The gradients of all parameters as views into one buffer per dtype: one all-reduce, one norm, one scaling."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.buffers: list[Tensor] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters.values()):
            members = [parameter for parameter in parameters.values() if parameter.dtype == dtype]
            buffer = torch.zeros(sum(member.numel() for member in members), dtype=dtype, device=members[0].device)
            views = torch.split(buffer, [member.numel() for member in members])
            for member, view in zip(members, views, strict=True):
                member.grad = view.view_as(member)
            self.buffers.append(buffer)

    def zero(self) -> None:
        """Begin a new optimizer step."""
        for buffer in self.buffers:
            buffer.zero_()

    def scale(self, factor: float) -> None:
        """Multiply every gradient."""
        for buffer in self.buffers:
            buffer.mul_(factor)

    def norm(self) -> float:
        """The Euclidean norm of all gradients together."""
        squares = [buffer.float().norm().double().square() for buffer in self.buffers]
        return float(torch.stack(squares).sum().sqrt())


def clip(gradients: Gradients, norm: float, limit: float) -> None:
    """Scale gradients of norm `norm` down to `limit`; 0: never. Megatron's formula, with its epsilon."""
    if limit and (factor := limit / (norm + 1e-6)) < 1:
        gradients.scale(factor)


class AdamW:
    """torch.optim.AdamW with one group for each way that parameters want to be treated."""

    def __init__(self, trained: Trained, settings: Optimizer, *, offload: bool = False) -> None:
        """offload: keep the state on the CPU and make the update there, on copies of parameters and gradients."""
        self._parameters = trained.parameters()
        self._updated = {name: _host_copy(value) if offload else value for name, value in self._parameters.items()}
        self._moved = [(value, self._updated[name]) for name, value in self._parameters.items()] if offload else []
        groups: dict[Group, list[nn.Parameter]] = {}
        for name, parameter in self._updated.items():
            groups.setdefault(trained.group(name, parameter), []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [
                {"params": members, "weight_decay": settings.weight_decay * group.wd_mult, "lr_mult": group.lr_mult}
                for group, members in groups.items()
            ],
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
        )

    def step(self, lr: float) -> None:
        """One update with learning rate `lr` (times each group's factor). Gradients stay in place."""
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_mult"]
        with torch.no_grad():
            for parameter, copy in self._moved:
                assert parameter.grad is not None
                assert copy.grad is not None
                copy.copy_(parameter, non_blocking=True)
                copy.grad.copy_(parameter.grad, non_blocking=True)
            if self._moved and self._moved[0][0].is_cuda:
                torch.cuda.current_stream().synchronize()  # the copies have arrived
            self._adamw.step()
            for parameter, copy in self._moved:
                parameter.copy_(copy, non_blocking=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """By parameter name: step, exp_avg, exp_avg_sq. Empty before the first step."""
        states = self._adamw.state
        return {name: dict(states[value]) for name, value in self._updated.items() if value in states}

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` returned. Raises ValueError when it belongs to other parameters."""
        if set(state) != set(self._parameters):
            raise ValueError("the optimizer state belongs to other parameters")
        for name, parameter in self._updated.items():
            mine = self._adamw.state[parameter]
            for key, value in state[name].items():
                # AdamW keeps its step counter on the CPU.
                mine[key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Room on the CPU for a parameter and its gradient, pinned where they come from a GPU: copies do not wait then."""
    pinned = parameter.is_cuda
    copy = nn.Parameter(torch.empty_like(parameter, device="cpu", pin_memory=pinned))
    copy.grad = torch.empty_like(copy, pin_memory=pinned)
    return copy
