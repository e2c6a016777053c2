"""peft.type: canonical_lora."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from steps.config.peft._low_rank import LowRank
from steps.errors import Problem


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

    def only_torch(self) -> Iterator[Problem]:
        yield from super().only_torch()
        hint = "Name what to adapt in peft.target_modules instead, or train with engine=torch."
        if self.exclude_modules:
            yield Problem("peft.exclude_modules", "Megatron-Bridge's canonical LoRA cannot exclude", hint=hint)
        if odd := [name for name in self.targets_asked if name.endswith("*")]:
            what = f"Megatron-Bridge's canonical LoRA wants the name of a part at the end, which {odd[0]!r} has not"
            yield Problem("peft.target_modules", what, hint="For example *.layers.0.*.linear_q.")


SECTION = CanonicalLoRA
