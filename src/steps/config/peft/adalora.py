"""peft.type: adalora."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from steps.config.peft import Kept
from steps.config.peft._low_rank import LowRank, cast_bytes
from steps.errors import Problem


class AdaLoRA(LowRank):
    """Low-rank adaptation that allots ranks to the linears while it trains, arXiv 2303.10512."""

    type: Literal["adalora"] = Field("adalora", description="Adapter method")
    dim: int = Field(12, ge=1, description="Rank of every linear at the start")
    dropout_position: Literal["pre"] = Field("pre", description="Drop before linear_in: the only place AdaLoRA has")
    lora_A_init_method: Literal["normal"] = Field(  # type: ignore[assignment]  # noqa: N815
        "normal", description="Start of linear_in: normal with deviation 0.02"
    )
    lora_B_init_method: Literal["normal"] = Field(  # type: ignore[assignment]  # noqa: N815
        "normal", description="Start of linear_out: the same; the singular values between them start at zero"
    )
    target_r: int = Field(8, ge=1, description="Average rank of a linear at the end")
    tinit: int | None = Field(
        None, ge=0, description="Optimizer steps before ranks shrink (default: a tenth of those that tfinal leaves)"
    )
    tfinal: int | None = Field(
        None, ge=0, description="Optimizer steps after the last pruning (default: 0.3 of those that tinit leaves)"
    )
    deltaT: int | None = Field(  # noqa: N815
        None, ge=1, description="Optimizer steps from one pruning to the next (default: 0.01 of train_iters, or 1)"
    )
    beta1: float = Field(0.85, gt=0, lt=1, description="How much of the smoothed sensitivity stays at each step")
    beta2: float = Field(0.85, gt=0, lt=1, description="How much of its smoothed uncertainty stays at each step")
    orth_reg_weight: float = Field(
        0.5, ge=0, description="Weight of the loss term that keeps the singular vectors orthonormal; 0: none"
    )

    def phases(self, train_iters: int) -> tuple[int, int, int]:
        """tinit, tfinal and deltaT of a run of train_iters optimizer steps: as given, or their share of it."""
        tinit = max(0, train_iters - (self.tfinal or 0)) // 10 if self.tinit is None else self.tinit
        tfinal = max(0, train_iters - tinit) * 3 // 10 if self.tfinal is None else self.tfinal
        return tinit, tfinal, self.deltaT or max(1, train_iters // 100)

    def budget(self, iteration: int, train_iters: int, linears: int) -> int:
        """Singular triplets of all linears together after optimizer step `iteration` (equation 12).

        It falls with the cube of the time that is left, from dim to target_r for each linear.
        """
        tinit, tfinal, _ = self.phases(train_iters)
        first, last = self.dim * linears, self.target_r * linears
        if iteration <= tinit:
            return first
        if iteration > train_iters - tfinal:
            return last
        left = 1 - (iteration - tinit) / (train_iters - tfinal - tinit)
        return int((first - last) * left**3 + last)

    def trainable(self, out_features: int, in_features: int) -> int:
        return super().trainable(out_features, in_features) + self.dim

    def untrained_bytes(self, out_features: int, in_features: int) -> int:
        # Two smoothed statistics for each parameter, float32, and which triplets are kept.
        return 8 * self.trainable(out_features, in_features) + self.dim

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        kept = super().kept(layer, out_features, in_features, dtype, has_gradient=has_gradient)
        # The singular values times linear_in are a new matrix, whatever the dtype; linear_out is copied like LoRA's.
        width = 2 if dtype == "bfloat16" else 4
        fixed = self.dim * in_features * width + cast_bytes(self.dim * out_features, self.adapter_dtype, dtype)
        return kept._replace(fixed_bytes=fixed)

    def check(self, train_iters: int) -> Iterator[Problem]:
        yield from super().check(train_iters)
        if self.target_r > self.dim:
            what = f"{self.target_r} is above dim ({self.dim}), the rank at the start: ranks only shrink"
            yield Problem(where="peft.target_r", what=what, allowed=f"1 to {self.dim}")
        tinit, tfinal, _ = self.phases(train_iters)
        if tinit + tfinal >= train_iters:
            yield Problem(
                where="peft.tfinal" if self.tinit is None else "peft.tinit",
                what=f"tinit ({tinit}) and tfinal ({tfinal}) leave no optimizer step to prune in",
                allowed=f"a sum below train_iters ({train_iters})",
                hint="Leave both out for shares of train_iters.",
            )

    def bridge_section(self) -> dict[str, Any] | None:
        return None


SECTION = AdaLoRA
