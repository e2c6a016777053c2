"""A few linears twice: ours with adapters, and torch's under Hugging Face peft, of the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from steps.config.peft import Peft
from steps.engine.adapters import base
from steps.engine.checkpoint import hf, mapping
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.model.layers import Linear
from steps.shapes.targets import chosen
from support.models import save_hf
from support.packed import SHAPE

#: Name to (out, in): wide, tall and square; every size is a multiple of 16.
SHAPES = {"first": (64, 32), "second": (48, 64), "third": (48, 48)}
#: What the two names of the unfused linears are in transformers' Llama.
UNFUSED = {"linear_proj": "self_attn.o_proj", "linear_fc2": "mlp.down_proj"}


class Ours(nn.Module):
    """The linears in a row, with as much of a decoder as `attach` asks for."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, (out_features, in_features) in shapes.items():
            self.add_module(name, Linear(in_features, out_features, bias=True).to(dtype))

    def linears(self) -> dict[str, Linear]:
        return {name: module for name, module in self.named_children() if isinstance(module, Linear)}

    @property
    def output_weight(self) -> Tensor:
        return next(iter(self.linears().values())).weight

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears().values():
            x = linear(x).tanh()
        return x


class Theirs(nn.Module):
    """The same of torch's linears. Called with a target too, it returns `loss` beside `out`, as transformers does."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, (out_features, in_features) in shapes.items():
            self.add_module(name, nn.Linear(in_features, out_features).to(dtype))

    def forward(self, x: Tensor, target: Tensor) -> SimpleNamespace:
        for linear in self.children():
            x = linear(x).tanh()
        return SimpleNamespace(out=x, loss=loss(x, target))


def loss(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


class Pair:
    """Both, and data for them. Adapter tensors are not yet the same: how they correspond is the method's business.

    adapters, decoder: ours.   model: theirs, under peft.   x [10, in], target [10, out].
    """

    def __init__(
        self,
        section: Peft,
        settings: Any,
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, int]] = SHAPES,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        import peft

        generator = torch.Generator().manual_seed(0)
        self.decoder, theirs = Ours(shapes, dtype), Theirs(shapes, dtype)
        for name, linear in self.decoder.linears().items():
            other = theirs.get_submodule(name)
            for mine, copy in ((linear.weight, other.weight), (linear.bias, other.bias)):
                mine.data.copy_(0.2 * torch.randn(mine.shape, generator=generator))
                copy.data.copy_(mine.data)
        self.adapters = base.attach(self.decoder, base.create(section, SHAPE), list(shapes), 0)
        self.model = peft.get_peft_model(theirs, settings)
        if adapter_dtype is None:
            self.model.to(dtype)
            self.decoder.to(dtype)
        sizes = list(shapes.values())
        self.x = torch.randn(10, sizes[0][1], generator=generator).to(dtype)
        self.target = torch.randn(10, sizes[-1][0], generator=generator).to(dtype)

    def layers(self) -> Iterator[tuple[base.Adapter, Any]]:
        """Our adapter and peft's layer of each linear."""
        for name, module in self.adapters.modules.items():
            yield module, self.model.get_submodule(f"base_model.model.{name}")


def shaken(shape: torch.Size, generator: torch.Generator, size: float = 0.3) -> Tensor:
    return size * torch.randn(shape, generator=generator)


class LlamaPair:
    """A small random Llama twice: ours with adapters on linear_proj and linear_fc2, transformers' under peft."""

    def __init__(self, directory: Path, section: Peft, settings: Any, dtype: torch.dtype) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        save_hf(directory, "llama")
        source = hf.open_source(str(directory))
        config = replace(source.config, params_dtype=str(dtype).removeprefix("torch."))
        self.decoder = Decoder(config)
        load_weights(self.decoder, ((n, t.load()) for n, t in mapping.to_megatron(config, source.tensors).items()))
        self.adapters = base.attach(self.decoder, base.create(section, config), chosen(section, config.num_layers), 0)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        self.model = peft.get_peft_model(model, settings).to(dtype)
        for module in (self.adapters.shared, *self.adapters.modules.values()):
            if module is not None:
                module.to(dtype)
        self.ids = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))

    def layers(self) -> Iterator[tuple[base.Adapter, Any]]:
        """Our adapter and peft's layer of each linear."""
        for name, module in self.adapters.modules.items():
            layer, linear = name.split(".")[2], name.rpartition(".")[2]
            yield module, self.model.get_submodule(f"base_model.model.model.layers.{layer}.{UNFUSED[linear]}")

    def logits(self) -> tuple[Tensor, Tensor]:
        """Ours, over one packed row of two documents, and theirs: [2, tokens, vocabulary]."""
        rows, length = self.ids.shape
        self.decoder.eval()
        self.model.eval()
        with torch.no_grad():
            mine = self.decoder(self.ids.flatten(), [0, length, 2 * length])
            return mine.view(rows, length, -1), self.model(self.ids).logits


def off(mine: Tensor, theirs: Tensor) -> float:
    """The difference, relative to the whole tensor's size."""
    return float((mine.detach() - theirs.detach()).norm() / theirs.detach().norm())
