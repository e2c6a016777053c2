"""peft.type: lora."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from steps.config.peft import Kept, _only_torch
from steps.config.peft._low_rank import LowRank
from steps.errors import Problem


class LoRA(LowRank):
    """Low-rank adaptation, arXiv 2106.09685, and its variants that differ in scale, learning rates or start."""

    type: Literal["lora"] = Field("lora", description="Adapter method")
    use_rslora: bool = Field(
        False, description="Scale by alpha / sqrt(dim) instead of alpha / dim (rsLoRA, arXiv 2312.03732)"
    )
    lora_plus_ratio: float = Field(
        1.0, ge=1, description="Learning rate of linear_out over that of linear_in (LoRA+, arXiv 2402.12354: 16)"
    )
    init_lora_weights: Literal["pissa", "olora", "eva"] | None = Field(
        None,
        description="Start of both factors from the weight's principal vectors (pissa, arXiv 2404.02948) or its QR "
        "(olora, 2406.01775), of linear_in from activations (eva, 2410.07170); null: as lora_A_init_method says",
    )
    calibration_rows: int = Field(8, ge=1, description="Packed rows that eva looks at before training")

    @property
    def scale(self) -> float:
        return self.alpha / (self.dim**0.5 if self.use_rslora else self.dim)

    @property
    def moves_the_start(self) -> bool:
        """Whether both factors start away from zero, and their start is subtracted (see engine/adapters/lora.py)."""
        return self.init_lora_weights in ("pissa", "olora")

    def untrained_bytes(self, out_features: int, in_features: int) -> int:
        width = 2 if self.adapter_dtype == "bfloat16" else 4
        return self.trainable(out_features, in_features) * width if self.moves_the_start else 0

    @property
    def kept_rank(self) -> int:
        return 2 * self.dim if self.moves_the_start else self.dim

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        kept = super().kept(layer, out_features, in_features, dtype, has_gradient=has_gradient)
        if not self.moves_the_start:
            return kept
        # The factors and their start one after the other are a copy, whatever the dtype.
        width = 2 if dtype == "bfloat16" else 4
        return kept._replace(fixed_bytes=self.kept_rank * (out_features + in_features) * width)

    def check(self, train_iters: int) -> Iterator[Problem]:
        yield from super().check(train_iters)
        if self.init_lora_weights is not None and "lora_A_init_method" in self.model_fields_set:
            yield Problem(
                where="peft.lora_A_init_method",
                what=f"has no meaning beside init_lora_weights={self.init_lora_weights}, which starts linear_in",
                hint="Leave one of the two out.",
            )

    def only_torch(self) -> Iterator[Problem]:
        yield from super().only_torch()
        if self.lora_plus_ratio != 1:
            yield _only_torch("lora_plus_ratio", "Megatron-Bridge trains both factors at one learning rate")
        if self.init_lora_weights is not None:
            yield _only_torch("init_lora_weights", f"Megatron-Bridge has no start called {self.init_lora_weights!r}")

    def bridge_section(self) -> dict[str, Any] | None:
        section = super().bridge_section()
        if section is None or self.moves_the_start:
            return None
        # Megatron-Bridge divides by dim.
        alpha = self.alpha * self.dim**0.5 if self.use_rslora else self.alpha
        return {**section, "alpha": alpha, "lora_dtype": self.lora_dtype}


SECTION = LoRA
