"""The `peft` section. One file per adapter method, called as `peft.type` calls it, holding its class as `SECTION`.

A file is imported when its method is asked for: a dry run pays for one method only. What a method trains is arithmetic
on shapes and stands here too (`trainable`, `untrained_bytes`, …), so that it can be told without torch; the tests hold
the engine to it.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from steps.config.base import Section
from steps.errors import Problem

DEFAULT = "lora"


class Quantization(Section):
    """The frozen base in few bits (QLoRA, arXiv 2305.14314): dequantized where it is used, never kept wide."""

    type: Literal["nf4", "int8"] = Field("nf4", description="nf4: 4-bit NormalFloat; int8: symmetric 8 bits")
    double_quant: bool = Field(True, description="Quantize the scales too (blocks of 256 of them, 8 bits)")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="Values that share one scale")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype that weights are dequantized to for the products (default: as train.precision says)"
    )


class Layer(NamedTuple):
    """One decoder layer's linears, each as (out, in): all of them, and those (or parts of them) that are adapted."""

    linears: Sequence[tuple[int, int]]
    adapted: Sequence[tuple[int, int]]


class Kept(NamedTuple):
    """What an adapter keeps of the forward for the backward pass, on one linear (or part of one).

    values:      of the compute dtype, for each token, beside the input of the linear.
    input:       whether that input itself is kept, which all parts of a fused linear share.
    fixed_bytes: whatever the tokens: factors in another dtype than they are trained in, for example.
    """

    values: int
    input: bool = True
    fixed_bytes: int = 0


class Peft(Section):
    """What every adapter method has."""

    #: Whether the method adapts q, k, v, gate and up by themselves (`linear_q`, …) instead of Megatron's fused linears.
    canonical: ClassVar[bool] = False
    #: Whether its tensors are two factors A and B for each linear, so that they can go to Hugging Face's PEFT format.
    has_factors: ClassVar[bool] = True

    type: str = Field(description="Adapter method")
    target_modules: list[str] = Field(
        default=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        description="Linears to adapt: module names, or full names with wildcards (*.layers.0.*.linear_qkv)",
    )
    exclude_modules: list[str] = Field(
        default=[], description="Adapt every linear but these, named the same way; instead of target_modules"
    )
    match_all_linear: bool = Field(False, description="Adapt every linear, whatever target_modules says")
    quantization: Quantization | None = Field(
        None, description="Hold the frozen base in few bits (QLoRA); null: as it is"
    )

    @classmethod
    def kinds(cls) -> Sequence[str]:
        return names() if cls is Peft else ()

    @classmethod
    def variant(cls, data: Any) -> Any:
        if cls is not Peft:
            return cls
        method = data.get("type", DEFAULT) if isinstance(data, Mapping) else DEFAULT
        return section_class(method if method in names() else DEFAULT)

    def trainable(self, out_features: int, in_features: int) -> int:
        """Parameters that the method trains on one linear (or part of one) of that shape."""
        raise NotImplementedError

    def trainable_at(self, layer: int, out_features: int, in_features: int) -> int:
        """The same in one layer, for methods that treat layers differently."""
        return self.trainable(out_features, in_features)

    @property
    def open(self) -> bool:
        """Whether the method chooses some of its settings itself when a run starts (`Method.settle`)."""
        return False

    def shared_trainable(self) -> int:
        """Parameters that belong to no single linear."""
        return 0

    def untrained_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of what the method holds for such a linear beside its parameters: the start it moves away from,
        statistics of gradients, positions, …"""
        return 0

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        """What the adapter of a linear of that shape keeps for the backward pass.

        dtype: of the computation. has_gradient: whether the linear's input has a gradient.
        """
        raise NotImplementedError

    def wide_trainable(self, out_features: int, in_features: int) -> int:
        """How many of `trainable` stay float32 when `adapter_dtype` is narrower."""
        return 0

    @property
    def adapter_dtype(self) -> str:
        """Dtype of the trained parameters: `lora_dtype` where the method has it and it is given, else float32."""
        return getattr(self, "lora_dtype", None) or "float32"

    def misfits(self, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
        """What does not fit a model. shapes: (out, in) of each kind of target ("linear_qkv")."""
        return iter(())

    def layer_misfits(self, layers: Sequence[Layer]) -> Iterator[Problem]:
        """What does not fit a model, of the settings that are about its layers."""
        return iter(())

    def check(self, train_iters: int) -> Iterator[Problem]:
        """What is wrong between the section's own keys, and with the length of the run."""
        given = "target_modules" in self.model_fields_set and self.target_modules and not self.match_all_linear
        if self.exclude_modules and given:
            yield Problem(
                where="peft.exclude_modules",
                what="target_modules and exclude_modules are both given",
                hint="Leave one of the two out; peft.target_modules=[] adapts every linear but the excluded ones.",
            )

    def only_torch(self) -> Iterator[Problem]:
        """What of this only the torch engine can do: the method itself, or settings as they stand."""
        if not self._in_bridge():
            also = ", ".join(name for name in names() if section_class(name)._in_bridge())
            what = f"Megatron-Bridge has no method {self.type!r}"
            yield Problem(where="peft.type", what=what, allowed=also, hint="Or train with engine=torch.")
        if self.quantization is not None:
            yield _only_torch("quantization", "Megatron-Bridge holds the base as it is stored")

    @classmethod
    def _in_bridge(cls) -> Mapping[str, Any]:
        """The fields that Megatron-Bridge's class of the method takes; none where it has no such class."""
        return cls.model_validate({}).bridge_section() or {}

    def bridge_section(self) -> dict[str, Any] | None:
        """The settings, but for the targets, as the fields of Megatron-Bridge's class of the method; None where it has
        no such method, or no such setting of it."""
        return None

    def held(self, linear: str) -> Quantization | None:
        """How the frozen weight of a linear is held, by its full name; None: as it is. Adapted or not."""
        return self.quantization

    @property
    def targets_asked(self) -> Sequence[str]:
        """target_modules as they take effect: none of them (every linear) beside exclude_modules."""
        return [] if self.match_all_linear or self.exclude_modules else self.target_modules


def _only_torch(key: str, what: str, allowed: str = "") -> Problem:
    return Problem(f"peft.{key}", what, allowed=allowed, hint="Leave it out, or train with engine=torch.")


@cache
def names() -> list[str]:
    """Every `peft.type`, in order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@cache
def section_class(method: str) -> type[Peft]:
    """The section of a method. `method` must be one of `names()`."""
    section: type[Peft] = importlib.import_module(f"{__name__}.{method}").SECTION
    return section
