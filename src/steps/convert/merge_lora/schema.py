"""Configuration of convert/merge_lora."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from steps.artifacts import bases
from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.config.one_base import one_base
from steps.config.peft import names, section_class
from steps.errors import Problem
from steps.shapes.targets import linear_names


class Config(StepConfig):
    """The adapter, its base (in one of two forms), and where the merged model goes."""

    lora_checkpoint: str = Field(description="The checkpoint_lora, or one of its iter_NNNNNNN folders")
    base_megatron_path: str | None = Field(None, description="The base as checkpoint_megatron (or give base_hf_path)")
    base_hf_path: str | None = Field(None, description="The base as checkpoint_hf (or give base_megatron_path)")
    output_hf_path: str = Field(description="Where the merged checkpoint_hf goes")
    merge_into: Literal["full", "dequantized"] = Field(
        "full",
        description="For an adapter trained on a quantized base: full merges into the original weights, dequantized "
        "into those that were trained on",
    )
    sample_prompt: str | None = Field(
        None, description="Ask the merged model this and show its answer; loads the whole model (default: do not)"
    )
    sample_tokens: int = Field(48, ge=1, description="Tokens of that answer at most")

    def check_values(self) -> Iterable[Problem]:
        """Exactly one base."""
        return one_base(self.base_megatron_path, self.base_hf_path)

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """Adapter and base by what their records say of the base's weights."""
        facts = inputs["lora_checkpoint"].facts
        if (method := facts.get("method")) is not None and method not in names():
            what = f"{self.lora_checkpoint} is an adapter of the method {method!r}, which this version does not know"
            yield Problem("lora_checkpoint", what, allowed=", ".join(names()), name="unsupported_method")
        for key in ("base_megatron_path", "base_hf_path"):
            if key in inputs:
                yield from bases.mismatch(inputs["lora_checkpoint"], inputs[key])
        section = inputs["lora_checkpoint"].facts.get("peft") or {}
        if section.get("type") in names():
            try:
                typed = section_class(section["type"]).model_validate(section)
            except ValidationError:  # of another version; the step names what it does not know
                return
            yield from self.check_base(typed.held(linear_names(1)[0]))

    def check_base(self, quantization: object) -> Iterable[Problem]:
        """merge_into against how the base was held in training; quantization: None for as it is."""
        if self.merge_into == "dequantized" and quantization is None:
            what = (
                f"the adapter {self.lora_checkpoint} was trained on the base as it is: there is nothing to dequantize"
            )
            yield Problem(
                where="merge_into", what=what, allowed="full", hint="Set merge_into=full.", name="base_not_quantized"
            )

    def told(self, code: str) -> str:
        """What merging means for an adapter trained on a base held in `code`."""
        if self.merge_into == "full":
            return (
                f"trained on a base held in {code}, merged into the original weights: a better base, but not the model "
                "that was trained, from which it differs by the quantization error (merge_into=dequantized is that one)"
            )
        return (
            f"trained on a base held in {code}, merged into what that dequantizes to: exactly the model that was "
            "trained, quantization error included, stored in the base's dtype (merge_into=full has the better base)"
        )

    def warnings(self, adapter: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Iterable[str]:
        """What is worth saying of an adapter (by its facts) before it is merged."""
        if not adapter:
            yield f"{self.lora_checkpoint} does not say which base it was trained on: the base is taken on trust"
        if adapter.get("finished") is False:
            yield f"{self.lora_checkpoint} is unfinished: training stopped at iteration {adapter.get('iteration')}"
        trained, here = adapter.get("chat_template_digest"), tokenizer.get("chat_template_digest")
        if trained and here and trained != here:
            yield "the adapter was trained with another chat template than the base's, which the merged model gets"
