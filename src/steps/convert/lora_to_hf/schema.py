"""Configuration of convert/lora_to_hf."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from steps.artifacts import bases
from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.config.peft import Peft, names, section_class
from steps.errors import Problem


def without_factors(section: type[Peft], where: str) -> Problem:
    """The fault of a method whose update is no product of two factors, which is all that the format can hold."""
    method = section.model_fields["type"].default
    return Problem(
        where=where,
        what=f"an adapter of type {method} has no two factors A and B, and Hugging Face's format holds nothing else",
        hint="Merge it instead: `steps run convert/merge_lora lora_checkpoint=… base_megatron_path=…`.",
        name="no_factor_form",
    )


class Config(StepConfig):
    """The adapter, its base (for the check and by name), and where the Hugging Face adapter goes."""

    lora_checkpoint: str = Field(description="The checkpoint_lora, or one of its iter_NNNNNNN folders")
    base_hf_path: str | None = Field(
        None,
        description="The base as checkpoint_hf: written as base_model_name_or_path; checked with where there is no "
        "base_megatron_path",
    )
    base_megatron_path: str | None = Field(None, description="The base as checkpoint_megatron, to check with")
    output_hf_path: str = Field(description="Where the checkpoint_hf_adapter goes")

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """Whether there is a form for the adapter, and whether it belongs to the base, by what the records say."""
        facts = inputs["lora_checkpoint"].facts
        if facts.get("method") in names() and not section_class(facts["method"]).has_factors:
            yield without_factors(section_class(facts["method"]), "lora_checkpoint")
        # Beside a base to check with, base_hf_path is only a name, and may be of other weights (cast, for example).
        key = "base_megatron_path" if "base_megatron_path" in inputs else "base_hf_path"
        if key in inputs:
            yield from bases.mismatch(inputs["lora_checkpoint"], inputs[key])

    def warnings(self, facts: Mapping[str, Any], codes: Iterable[str], use_dora: bool) -> Iterable[str]:
        """What is worth saying of an adapter (by its record's facts) to who serves it.

        codes: what its base was held in while it was trained; none for as it is.
        """
        if not facts:
            yield f"{self.lora_checkpoint} does not say which base it was trained on: the base is taken on trust"
        if facts.get("finished") is False:
            yield f"{self.lora_checkpoint} is unfinished: training stopped at iteration {facts.get('iteration')}"
        if use_dora:
            yield "vLLM refuses DoRA adapters: for vLLM merge it with convert/merge_lora"
        if held := " and ".join(sorted(codes)):
            yield f"it was trained on a base in {held}, and will be served on whatever base the server loads"
