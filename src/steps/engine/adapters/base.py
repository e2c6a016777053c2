"""What an adapter method is, and the registry of methods.

A method is one file in this folder plus its typed section in `steps.config.peft`:

    @register("lora")
    class LoRAMethod(Method[LoRA]):
        def build(self, name, linear, generator): ...     # the trained module of one linear
        def merge(self, name, weight, tensors, shared): ...   # the adapted weight, a pure function

`build` returns an Adapter, which becomes the linear's child `adapter`: its parameters and buffers are, without further
ado, what is trained, saved as `<linear>.adapter.<tensor>` and loaded. Everything else has a default: what all linears
share (`shared`), learning rate and weight decay per parameter (`group`), a term of the loss (`penalty`), and something
to do after each optimizer step (`after_step`).
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from steps.config.peft import METHODS, Peft
from steps.engine.model.decoder import Decoder
from steps.engine.model.layers import Linear
from steps.engine.model_config import ModelConfig
from steps.errors import ConfigError, Problem, suggest

S = TypeVar("S", bound=Peft)


class Adapter(nn.Module):
    """The trained part of one linear. Its tensors are independent of the base: merging needs nothing else."""

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """The whole output of the adapted linear, base included.

        x: [tokens, in] in the base's compute dtype, normalized where the linear holds a norm; returns [tokens, out].
        The frozen part is `linear.project(x)`; a method that needs the weight itself reads `linear.weight`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Group:
    """How the optimizer treats a parameter, as factors of `optimizer.lr` and `optimizer.weight_decay`."""

    lr_mult: float = 1.0
    wd_mult: float = 1.0


class Method(ABC, Generic[S]):
    """One adapter method with its settings, for one model shape. Stateless: what is trained lives in the modules."""

    type: ClassVar[str]
    #: Megatron-Bridge's class of the same method, with the same fields as the section; '' where it has none.
    bridge_class: ClassVar[str] = ""

    def __init__(self, section: S, model: ModelConfig) -> None:
        self.section, self.model = section, model

    @abstractmethod
    def build(self, name: str, linear: Linear, generator: torch.Generator) -> Adapter:
        """The adapter of the linear called `name`, initialized, on the CPU.

        Draw from `generator` only: it is seeded by the run's seed and `name`, so the start depends neither on the order
        nor on the number of processes.
        """

    @abstractmethod
    def merge(self, name: str, weight: Tensor, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """The weight [out, in] float32 of a plain linear that does what base and adapter do together. Pure.

        name:    the linear's full name.   weight: its base weight [out, in], float32.
        tensors: the adapter's, by their names behind `.adapter.` (`linear_in.weight`), any dtype.
        shared:  those of `shared()`, by their own names; empty for most methods.
        """

    def shared(self, linears: Mapping[str, Linear], generator: torch.Generator) -> nn.Module | None:
        """Trained tensors that belong to no single linear (a bank of vectors); saved as `adapter.<tensor>`.

        Built before the adapters and handed to them by the method itself.
        """
        return None

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        """Megatron's rule: weight decay for matrices, none for vectors and scalars."""
        return Group(wd_mult=1.0 if parameter.ndim > 1 else 0.0)

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """A term added to the loss of every optimizer step (a scalar), or None."""
        return None

    def after_step(self, adapters: Adapters, iteration: int, train_iters: int) -> None:
        """Called on every process after optimizer step `iteration` (from 1), gradients still in place.

        Must come to the same result on every process and keep its state in buffers of the adapters, which are saved.
        """


_METHODS: dict[str, type[Method[Any]]] = {}


def register(name: str) -> Callable[[type[Method[Any]]], type[Method[Any]]]:
    """Class decorator: make a Method known as `peft.type` = name."""

    def add(method: type[Method[Any]]) -> type[Method[Any]]:
        assert name not in _METHODS, f"two methods named {name}"
        method.type = name
        _METHODS[name] = method
        return method

    return add


def methods() -> Mapping[str, type[Method[Any]]]:
    """Every method by `peft.type`. Imports all files of this folder the first time."""
    package = importlib.import_module("steps.engine.adapters")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


def create(section: Peft | Mapping[str, Any], model: ModelConfig) -> Method[Any]:
    """The method that a `peft` section (typed, or as it was recorded in a checkpoint) describes.

    Raises ConfigError for a type that is not registered.
    """
    type = section.type if isinstance(section, Peft) else str(section.get("type"))
    known = methods()
    if type not in known:
        problem = Problem(
            where="peft.type",
            what=f"{type!r} is no adapter method",
            allowed=", ".join(known),
            hint=suggest(type, known),
        )
        raise ConfigError(problem)
    if not isinstance(section, Peft):
        section = METHODS[type].model_validate(dict(section))
    return known[type](section, model)


@dataclass(frozen=True)
class Adapters:
    """A decoder with its adapters in place.

    modules: by the full name of the linear they sit on, in the order of computation.
    """

    decoder: Decoder
    method: Method[Any]
    modules: Mapping[str, Adapter]
    shared: nn.Module | None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by full name (`….linear_qkv.adapter.linear_in.weight`), in a fixed order."""
        return {name: value for name, value in self.decoder.named_parameters() if value.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: trained parameters and the adapters' buffers, by full name. Not copied."""
        return dict(self._state())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill every tensor of `tensors()`. Raises ValueError for one that is absent, left over or of another shape."""
        mine = dict(self._state())
        if odd := set(mine) ^ set(tensors):
            name = min(odd)
            raise ValueError(f"{name} is {'not in the checkpoint' if name in mine else 'in the checkpoint only'}")
        with torch.no_grad():
            for name, tensor in mine.items():
                if tensor.shape != tensors[name].shape:
                    raise ValueError(f"{name}: shape {list(tensors[name].shape)}, expected {list(tensor.shape)}")
                tensor.copy_(tensors[name])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        if self.shared is not None:
            yield from self.shared.state_dict(prefix="adapter.", keep_vars=True).items()
        for name, module in self.modules.items():
            yield from module.state_dict(prefix=f"{name}.adapter.", keep_vars=True).items()


def attach(decoder: Decoder, method: Method[Any], targets: Sequence[str], seed: int) -> Adapters:
    """Put an adapter on each of the linears named by `targets` (full names, see targets.py).

    After this exactly the adapters' parameters require gradients.
    """
    linears = {name: linear for name, linear in decoder.linears().items() if name in set(targets)}
    assert len(linears) == len(set(targets)), "targets must be names of the decoder's linears"
    device = decoder.output_weight.device
    shared = method.shared(linears, generator(seed, "adapter"))
    if shared is not None:
        decoder.add_module("adapter", shared.to(device))
    modules = {}
    for name, linear in linears.items():
        modules[name] = method.build(name, linear, generator(seed, name)).to(device)
        linear.adapter = modules[name]
    return Adapters(decoder, method, modules, shared)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
