"""peft.type: dora."""

from typing import Literal

from pydantic import Field

from steps.config.peft import Kept
from steps.config.peft._low_rank import LowRank


class DoRA(LowRank):
    """Weight-decomposed low-rank adaptation, arXiv 2402.09353."""

    type: Literal["dora"] = Field("dora", description="Adapter method")
    alpha: float = Field(64, gt=0, description="The update is scaled by alpha / dim")
    dropout_position: Literal["pre"] = Field("pre", description="Drop before linear_in: the only place DoRA has")

    def trainable(self, out_features: int, in_features: int) -> int:
        return super().trainable(out_features, in_features) + out_features

    def wide_trainable(self, out_features: int, in_features: int) -> int:
        return out_features

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        kept = super().kept(layer, out_features, in_features, dtype, has_gradient=has_gradient)
        # The output before its gain; with dropout that of the base and the update apart.
        outputs = out_features * (2 if self.dropout else 1)
        gains = out_features * (4 + 1)  # the norms, float32, and which of them are not zero
        # The gain; with dropout, for the gradient of the base's output, that less 1 too.
        gains += out_features * (2 if dtype == "bfloat16" else 4) * (1 + bool(self.dropout and has_gradient))
        return kept._replace(values=kept.values + outputs, fixed_bytes=kept.fixed_bytes + gains)

    def untrained_bytes(self, out_features: int, in_features: int) -> int:
        return 4 * out_features  # the squared norm of each row of the base weight


SECTION = DoRA
