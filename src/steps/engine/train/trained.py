"""What a training run trains: adapters on a frozen base (adapters.base.Adapters), or the model itself (WholeModel).

Loop, optimizer and saver know this and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steps.engine.adapters.base import Group, check_fit
from steps.engine.model.decoder import Decoder
from steps.shapes.model_config import ModelConfig
from steps.shapes.run_config import run_config


class Trained(Protocol):
    """The parameters of a run, and what their checkpoint says of them. See Adapters for each of these."""

    @property
    def decoder(self) -> Decoder: ...

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...

    def memory(self) -> dict[str, Tensor]: ...

    def load_memory(self, tensors: Mapping[str, Tensor]) -> None: ...

    def group(self, name: str, parameter: nn.Parameter) -> Group: ...

    def penalty(self) -> Tensor | None: ...

    def after_step(self, iteration: int, train_iters: int) -> None: ...

    def run_config(self, base: Mapping[str, Any], base_dir: Path) -> dict[str, Any]: ...

    def report(self) -> dict[str, Any]: ...

    def summary(self) -> str: ...


@dataclass(frozen=True)
class WholeModel:
    """Every weight of a decoder.

    masters: where the decoder computes in less than float32, what the optimizer updates instead of its weights: the
             same values in float32, by the same names. An update below the weight's last bit is not lost, and
             gradients of micro-batches add up in float32. Empty where it computes in float32.
    """

    decoder: Decoder
    masters: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, decoder: Decoder) -> WholeModel:
        """Make all weights of a loaded, unquantized decoder trainable."""
        decoder.requires_grad_(True)
        weights = dict(decoder.named_parameters())
        if decoder.output_weight.dtype == torch.float32:
            return cls(decoder, {})
        masters = {name: nn.Parameter(weight.detach().float()) for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.register_post_accumulate_grad_hook(_moved_to(masters[name]))  # type: ignore[no-untyped-call]
        return cls(decoder, masters)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.masters or self.decoder.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.decoder.named_parameters())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        mine = self.tensors()
        check_fit(mine, tensors)
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])

    def memory(self) -> dict[str, Tensor]:
        return dict(self.masters)

    def load_memory(self, tensors: Mapping[str, Tensor]) -> None:
        if set(tensors) != set(self.masters):
            raise ValueError("the weights in float32 that go with it are those of another model")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        """Megatron's rule: weight decay for matrices, none for vectors."""
        return Group(wd_mult=1.0 if parameter.ndim > 1 else 0.0)

    def penalty(self) -> Tensor | None:
        return None

    def after_step(self, iteration: int, train_iters: int) -> None:
        """Round the updated masters to the weights that compute."""
        with torch.no_grad():
            for name, weight in self.decoder.named_parameters():
                if name in self.masters:
                    weight.copy_(self.masters[name])

    def run_config(self, base: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
        made = run_config(self._model())
        checkpoint = {**made["checkpoint"], "pretrained_checkpoint": str(base_dir.resolve())}
        return {**base, **made, "checkpoint": checkpoint}

    def report(self) -> dict[str, Any]:
        model = self._model()
        return {"method": "full", "family": model.family, "dtype": model.params_dtype, "model": model.to_dict()}

    def summary(self) -> str:
        return ""

    def _model(self) -> ModelConfig:
        """Its shape, in the dtype that it is trained and saved in."""
        dtype = str(self.decoder.output_weight.dtype).removeprefix("torch.")
        return replace(self.decoder.config, params_dtype=dtype)


def _moved_to(master: nn.Parameter) -> Any:
    """A hook that adds a weight's gradient to its master's as soon as it is there, and lets it go."""

    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        assert master.grad is not None, "the gradients' buffer stands before the first step"
        master.grad += weight.grad
        weight.grad = None

    return move
