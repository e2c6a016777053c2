"""What an adapter method is, and the registry of methods.

A method is one file in this folder plus its typed section, a file of the same name in `steps.config.peft`:

    @register("lora")
    class LoRAMethod(Method[LoRA]):
        def build(self, target): ...                          # the trained module of one linear
        def factors(self, name, tensors, shared): ...         # what it adds to the weight, as B and A: a pure function

`build` returns an Adapter, which becomes the linear's child `adapter`: its parameters and buffers are, without further
ado, what is trained, saved as `<linear>.adapter.<tensor>` and loaded. From `factors` follow merging and the export to
Hugging Face PEFT; a method without a factor form writes `merge` itself. Everything else has a default: what all linears
share (`shared`), a start that depends on data (`start`), learning rate and weight decay per parameter (`group`), a term
of the loss (`penalty`), something to do after each optimizer step (`after_step`), what a checkpoint holds if that is
not simply the module's state (`Adapter.saved`, `Adapter.memory`), settings that the method finds out by itself before
the base is built (`settle`), and what the run reports at its end (`report`, `summary`).
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from steps.config.peft import Peft, names, section_class
from steps.engine.checkpoint.adapter_config import adapter_run_config
from steps.engine.checkpoint.lazy import like
from steps.engine.checkpoint.mapping import part_view
from steps.engine.data.batches import MicroBatch
from steps.engine.model.decoder import Decoder
from steps.engine.model.layers import Linear
from steps.engine.progress import Progress
from steps.errors import ConfigError, Problem, suggest
from steps.shapes.model_config import ModelConfig
from steps.shapes.targets import PARTS, home

S = TypeVar("S", bound=Peft)
#: Settings of a method that stand in a record by themselves; all of them are in its `peft`.
_MAIN = ("dim", "alpha", "target_modules", "exclude_modules")
#: Rows that are merged at once.
MERGED_ROWS = 256


class Adapter(nn.Module):
    """The trained part of one linear. What it saves is all that merging needs besides the base weight."""

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """The whole output of the adapted linear, base included.

        x: [tokens, in] in the base's compute dtype, normalized where the linear holds a norm; returns [tokens, out].
        The frozen part is `linear.project(x)`; a method that needs the weight itself asks `linear.dense()`.
        """
        raise NotImplementedError

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name; of one shape for all layers. Not copied."""
        return self.state_dict(keep_vars=True)

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill from what `saved` returned: same names and shapes."""
        with torch.no_grad():
            for name, tensor in self.state_dict(keep_vars=True).items():
                tensor.copy_(tensors[name])

    def memory(self) -> dict[str, Tensor]:
        """What going on with the training needs beyond `saved`: smoothed statistics, for example. Not copied."""
        return {}

    def load_memory(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill from what `memory` returned; called after `load_saved`."""
        with torch.no_grad():
            for name, tensor in self.memory().items():
                tensor.copy_(tensors[name])


@dataclass(frozen=True)
class Target:
    """A linear that gets an adapter.

    name:  its full name.   parts: which parts of a fused linear are adapted, by canonical methods; () for all others.
    """

    name: str
    linear: Linear
    parts: tuple[str, ...]
    seed: int

    def generator(self, part: str = "") -> torch.Generator:
        """What to draw the start from: a CPU stream that depends on the run's seed, the linear and the part alone, so
        that a start depends neither on what else is adapted nor on the number of processes."""
        return generator(self.seed, f"{self.name}.{part}" if part else self.name)


@dataclass(frozen=True)
class Factors:
    """scale * b @ a, the update of a linear or of one part of it.

    a: [r, in], b: [out, r], float32.   magnitude: [out], DoRA's; None for plain low-rank updates.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def delta(self) -> Tensor:
        """The update [out, in], float32: the product first, then the scale, as peft rounds it."""
        return (self.b @ self.a).mul_(self.scale)

    def compact(self) -> Factors:
        """The same update without the triplets that add nothing to it: those whose row of a is zero. r may become 0."""
        kept = self.a.any(1)
        return replace(self, a=self.a[kept], b=self.b[:, kept])


@dataclass(frozen=True)
class Group:
    """How the optimizer treats a parameter, as factors of `optimizer.lr` and `optimizer.weight_decay`."""

    lr_mult: float = 1.0
    wd_mult: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """What a method may look at before it settles.

    decoder:  loads the base anew: frozen, without adapters, not quantized, in the dtype and on the device of the run.
    batches:  the first packed rows of the run, that many or all there are, one a batch, on the decoder's device.
    loss:     the sum over a batch's trained tokens, a scalar.
    seed:     of the run.
    """

    decoder: Callable[[], Decoder]
    batches: Callable[[int], Sequence[MicroBatch]]
    loss: Callable[[Decoder, MicroBatch], Tensor]
    seed: int
    progress: Progress


@dataclass(frozen=True)
class Settled:
    """A section in which nothing is open any more, and how it came about.

    documents: text by file name, to stand in the checkpoint beside the iterations. Names: `Method.documents`.
    """

    section: Peft
    documents: Mapping[str, str]


class Method(ABC, Generic[S]):
    """One adapter method with its settings, for one model shape. What is trained lives in the modules, not here."""

    type: ClassVar[str]
    #: Megatron-Bridge's class of the same method; '' where it has none. Its fields: `section.bridge_section()`.
    bridge_class: ClassVar[str] = ""
    #: Files that `settle` writes about its work.
    documents: ClassVar[Sequence[str]] = ()

    def __init__(self, section: S, model: ModelConfig) -> None:
        self.section, self.model = section, model

    @abstractmethod
    def build(self, target: Target) -> Adapter:
        """The adapter of one linear, initialized, on the CPU."""

    def factors(self, name: str, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        """What the adapter adds to the weight, by part of a fused linear ("linear_q"), or under '' for the whole. Pure.

        name:    the linear's full name.
        tensors: what `Adapter.saved` returned, any dtype.
        shared:  the same of `shared()`, by their own names; empty for most methods.
        """
        raise NotImplementedError

    def merge(self, name: str, weight: Tensor, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """The weight [out, in] of a plain linear that does what base and adapter do together. Pure.

        weight: the linear's base weight [out, in]; what is returned has its dtype, is computed in float32 and rounded
        once. The rest as for `factors`.
        """
        found, linear = self.factors(name, tensors, shared), name.rpartition(".")[2]
        merged = like(weight)
        if "" not in found and len(found) < len(PARTS.get(linear, ())):
            merged.copy_(weight)  # some part is not adapted
        places = torch.arange(len(weight))
        for part, factors in found.items():
            for mine, theirs in _row_blocks(part_view(self.model, part, places).reshape(-1)):
                update = replace(factors, b=factors.b[mine]).delta()
                merged[theirs] = update.add_(weight[theirs])
        return merged

    def settle(self, calibration: Calibration) -> Settled:
        """Choose what the section leaves open; asked where a fresh run begins and `section.open` says so.

        The run trains with the section returned, and goes on with it, without asking again, after a resume. Called on
        every process at once; what process 0 comes to holds for all.
        """
        raise NotImplementedError

    def shared(self, targets: Sequence[Target], generator: torch.Generator) -> nn.Module | None:
        """Trained tensors that belong to no single linear (a bank of vectors); saved as `adapter.<tensor>`.

        Built before the adapters and handed to them by the method itself.
        """
        return None

    @property
    def calibration_rows(self) -> int:
        """Packed rows of the train split that `start` wants to see."""
        return 0

    def start(self, adapters: Adapters, batches: Sequence[MicroBatch]) -> None:
        """Called once, on every process, when a fresh run begins (never on a resume), with all adapters in place.

        For a start that depends on data. batches: `calibration_rows` packed rows, one each, on the decoder's device.
        Must come to the same result on every process.
        """

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        """Megatron's rule: weight decay for matrices, none for vectors and scalars."""
        return Group(wd_mult=1.0 if parameter.ndim > 1 else 0.0)

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """A term added to the loss of every optimizer step (a scalar), or None."""
        return None

    def after_step(self, adapters: Adapters, iteration: int, train_iters: int) -> None:
        """Called on every process after optimizer step `iteration` (from 1), gradients still in place.

        Must come to the same result on every process and keep its state where `Adapter.saved` or `memory` finds it.
        """

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """What the record of the checkpoint says of the result beyond the settings: final ranks, for example."""
        return {}

    def summary(self, adapters: Adapters) -> str:
        """The same in one line for the log of the run; '' where there is nothing to tell."""
        return ""


_METHODS: dict[str, type[Method[Any]]] = {}


def register(name: str) -> Callable[[type[Method[Any]]], type[Method[Any]]]:
    """Class decorator: make a Method known as `peft.type` = name."""

    def add(method: type[Method[Any]]) -> type[Method[Any]]:
        assert name not in _METHODS, f"two methods named {name}"
        assert name in names(), f"{name} has no section in steps.config.peft"
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
    if type not in names():
        problem = Problem(
            where="peft.type",
            what=f"{type!r} is no adapter method",
            allowed=", ".join(names()),
            hint=suggest(type, names()),
        )
        raise ConfigError(problem)
    importlib.import_module(f"steps.engine.adapters.{type}")
    if not isinstance(section, Peft):
        section = section_class(type).model_validate(dict(section))
    return _METHODS[type](section, model)


def check_fit(mine: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor of a checkpoint that is absent, left over or of another shape than mine."""
    if odd := set(mine) ^ set(tensors):
        name = min(odd)
        raise ValueError(f"{name} is {'not in the checkpoint' if name in mine else 'in the checkpoint only'}")
    for name, tensor in mine.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name}: shape {list(tensors[name].shape)}, expected {list(tensor.shape)}")


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
        """What a checkpoint holds, by full name: the trained parameters, or what stands for them. Not copied."""
        own = {} if self.shared is None else self.shared.state_dict(prefix="adapter.", keep_vars=True)
        return {**own, **self._named(lambda module: module.saved())}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill from what `tensors` returned. Raises ValueError for one absent, left over or of another shape."""
        check_fit(self.tensors(), tensors)
        if self.shared is not None:
            self.shared.load_state_dict({name: tensors[f"adapter.{name}"] for name in self.shared.state_dict()})
        for name, module in self.modules.items():
            module.load_saved({key: tensors[f"{name}.adapter.{key}"] for key in module.saved()})

    def memory(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond `tensors`, by full name. Not copied."""
        return self._named(lambda module: module.memory())

    def load_memory(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill from what `memory` returned; after `load`. Raises ValueError when it belongs to another adapter."""
        if set(tensors) != set(self.memory()):
            raise ValueError("what the adapter method remembers belongs to other linears")
        for name, module in self.modules.items():
            module.load_memory({key: tensors[f"{name}.adapter.{key}"] for key in module.memory()})

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        """How the optimizer treats a parameter."""
        return self.method.group(name, parameter)

    def penalty(self) -> Tensor | None:
        """A term added to the loss of every optimizer step, or None."""
        return self.method.penalty(self)

    def after_step(self, iteration: int, train_iters: int) -> None:
        """Called after optimizer step `iteration`, gradients still in place."""
        self.method.after_step(self, iteration, train_iters)

    def run_config(self, base: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
        """run_config.yaml of a checkpoint of it. base: that of the base at base_dir."""
        return adapter_run_config(base, self.method.section, self.method.bridge_class, base_dir)

    def report(self) -> dict[str, Any]:
        """What the record of the checkpoint says of what was trained."""
        section = self.method.section.model_dump()
        main = {name: value for name, value in section.items() if name in _MAIN}
        return {"method": self.method.type, **main, "peft": section, **self.method.report(self)}

    def summary(self) -> str:
        """A line for the log of the run at its end, or ''."""
        told = self.method.summary(self)
        return told and f"{self.method.type}: {told}"

    def _named(self, of: Callable[[Adapter], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            f"{name}.adapter.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in of(module).items()
        }


def attach(decoder: Decoder, method: Method[Any], names: Sequence[str], seed: int) -> Adapters:
    """Put adapters on the linears, or parts of linears, called `names` (full names, see shapes/targets.py).

    After this exactly the adapters' parameters require gradients.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        linear, part = home(name)
        wanted.setdefault(linear, []).extend([part] if part else [])
    linears = decoder.linears()
    assert set(wanted) <= set(linears), "targets must be names of the decoder's linears"
    targets = [Target(name, linears[name], tuple(wanted[name]), seed) for name in linears if name in wanted]
    device = decoder.output_weight.device
    shared = method.shared(targets, generator(seed, "adapter"))
    if shared is not None:
        decoder.add_module("adapter", shared.to(device))
    modules = {}
    for target in targets:
        modules[target.name] = method.build(target).to(device)
        target.linear.adapter = modules[target.name]
    return Adapters(decoder, method, modules, shared)


def _row_blocks(places: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of a part and where these lie in the fused weight: runs of neighbours, MERGED_ROWS at most.

    places: the row of the fused weight for each row of the part. Blocks stay in the cache: on a linear_fc1 of
    [11264, 2048] in bf16 a merge by blocks took 21 to 28 ms, as a whole 181 to 255 ms (one thread).
    """
    breaks = (places.diff() != 1).nonzero().flatten() + 1
    for first, last in pairwise((0, *breaks.tolist(), len(places))):
        for start in range(first, last, MERGED_ROWS):
            end, at = min(start + MERGED_ROWS, last), int(places[start])
            yield slice(start, end), slice(at, at + end - start)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
