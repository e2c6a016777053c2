"""peft.type: canonical_lora."""

from typing import ClassVar, Literal

from pydantic import Field

from steps.config.peft._low_rank import LowRank


class CanonicalLoRA(LowRank):
    """LoRA on q, k, v, gate and up each by itself, as Hugging Face models have them."""

    canonical: ClassVar[bool] = True

    type: Literal["canonical_lora"] = Field("canonical_lora", description="Adapter method")
    target_modules: list[str] = Field(
        default=[
            "linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2",
        ],
        description="Parts of linears to adapt: names, or full names with wildcards (*.layers.0.*.linear_q)",
    )  # fmt: skip


SECTION = CanonicalLoRA
