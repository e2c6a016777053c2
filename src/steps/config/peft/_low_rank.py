"""What the methods share that add B A to a weight."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from steps.config.peft import Kept, Peft, _only_torch
from steps.errors import Problem


class Ranked(Peft):
    """An update of rank dim in two factors, whatever these are made of."""

    dim: int = Field(32, ge=1, description="Rank of the update")

    def misfits(self, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
        yield from super().misfits(shapes)
        small = {name: shape for name, shape in shapes.items() if self.dim > min(shape)}
        if small:
            name, shape = min(small.items(), key=lambda entry: min(entry[1]))
            more = f" (and {len(small) - 1} more kinds of linear)" if len(small) > 1 else ""
            yield Problem(
                where="peft.dim",
                what=f"rank {self.dim} is above that of {name}, which is {list(shape)}{more}",
                allowed=f"1 to {min(shape)}",
            )


class LowRank(Ranked):
    """The two factors are what is trained; their product is scaled by alpha / dim."""

    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / dim")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of values dropped on the adapter's path while training")
    dropout_position: Literal["pre", "post"] = Field("pre", description="Drop before linear_in or after linear_out")
    lora_A_init_method: Literal["xavier", "uniform", "kaiming"] = Field(  # noqa: N815
        "xavier", description="Start of linear_in: xavier normal, xavier uniform, or kaiming uniform as peft has it"
    )
    lora_B_init_method: Literal["zero"] = Field(  # noqa: N815
        "zero", description="Start of linear_out: zero, so that training starts from the base model"
    )
    lora_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of the adapter's parameters (default float32; bfloat16 rounds away small updates)"
    )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / self.dim

    def trainable(self, out_features: int, in_features: int) -> int:
        return self.dim * (out_features + in_features)

    @property
    def kept_rank(self) -> int:
        """Rank of the product as it is computed."""
        return self.dim

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        factors = cast_bytes(self.kept_rank * (out_features + in_features), self.adapter_dtype, dtype)
        if not self.dropout:
            return Kept(self.kept_rank, fixed_bytes=factors)
        if self.dropout_position == "post":
            return Kept(self.kept_rank + out_features, fixed_bytes=factors)  # what is dropped of the output
        # The input without what is dropped, and (for its gradient) what that is.
        return Kept(self.kept_rank + in_features * (1 + has_gradient), input=False, fixed_bytes=factors)

    def only_torch(self) -> Iterator[Problem]:
        yield from super().only_torch()
        if self.lora_A_init_method == "uniform":
            yield _only_torch("lora_A_init_method", "Megatron-Bridge knows no 'uniform'", "xavier, kaiming")
        if self.lora_dtype is not None and "lora_dtype" not in self._in_bridge():
            yield _only_torch("lora_dtype", f"Megatron-Bridge's {self.type} has no such setting")

    def bridge_section(self) -> dict[str, Any] | None:
        if self.quantization is not None:
            return None
        own = ("dim", "alpha", "dropout", "dropout_position", "lora_A_init_method", "lora_B_init_method")
        return {name: getattr(self, name) for name in own}


def cast_bytes(values: int, trained: str, computed: str) -> int:
    """Bytes of a copy of that many trained values in the dtype of the computation; 0 where they are in it already."""
    return 0 if trained == computed else values * (2 if computed == "bfloat16" else 4)
