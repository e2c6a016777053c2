"""peft.type: dora."""

from typing import Literal

from pydantic import Field

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

    def untrained_bytes(self, out_features: int, in_features: int) -> int:
        return 4 * out_features  # the squared norm of each row of the base weight


SECTION = DoRA
