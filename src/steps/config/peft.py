"""The `peft` section: one class per adapter method, in Megatron-Bridge's names and with its defaults."""

from typing import Literal

from pydantic import Field

from steps.config.base import Section


class Peft(Section):
    """What every adapter method has."""

    type: str = Field(description="Adapter method")
    target_modules: list[str] = Field(
        default=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        description="Linears to adapt: module names, or full names with wildcards (*.layers.0.*.linear_qkv)",
    )
    exclude_modules: list[str] = Field(
        default=[], description="Linears to leave alone, named the same way; wins over target_modules"
    )


class LoRA(Peft):
    """Low-rank adaptation, arXiv 2106.09685."""

    type: Literal["lora"] = Field("lora", description="Adapter method")
    dim: int = Field(32, ge=1, description="Rank of the update")
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


#: By `peft.type`. A new method adds its class here and its file in engine/adapters.
METHODS: dict[str, type[Peft]] = {"lora": LoRA}
