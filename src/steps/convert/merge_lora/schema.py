"""Configuration of convert/merge_lora."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from steps.artifacts.opening import Artifact
from steps.config.base import StepConfig
from steps.config.peft import names
from steps.errors import Problem


class Config(StepConfig):
    """The adapter, its base (in one of two forms), and where the merged model goes."""

    lora_checkpoint: str = Field(description="The checkpoint_lora, or one of its iter_NNNNNNN folders")
    base_megatron_path: str | None = Field(None, description="The base as checkpoint_megatron (or give base_hf_path)")
    base_hf_path: str | None = Field(None, description="The base as checkpoint_hf (or give base_megatron_path)")
    output_hf_path: str = Field(description="Where the merged checkpoint_hf goes")
    sample_prompt: str | None = Field(
        None, description="Ask the merged model this and show its answer; loads the whole model (default: do not)"
    )
    sample_tokens: int = Field(48, ge=1, description="Tokens of that answer at most")

    def check_values(self) -> Iterable[Problem]:
        """Exactly one base."""
        if self.base_megatron_path is None and self.base_hf_path is None:
            what = "no base model is given"
            hint = "Set base_megatron_path (the checkpoint that was trained on) or base_hf_path."
            return [Problem(where="base_megatron_path", what=what, hint=hint)]
        if self.base_megatron_path is not None and self.base_hf_path is not None:
            what = f"two base models are given: {self.base_megatron_path} and {self.base_hf_path}"
            return [Problem(where="base_hf_path", what=what, hint="Set one of the two to null.")]
        return []

    def check_inputs(self, inputs: Mapping[str, Artifact]) -> Iterable[Problem]:
        """Adapter and base by what their records say of the base's weights."""
        facts = inputs["lora_checkpoint"].facts
        if (method := facts.get("method")) is not None and method not in names():
            what = f"{self.lora_checkpoint} is an adapter of the method {method!r}, which this version does not know"
            yield Problem("lora_checkpoint", what, allowed=", ".join(names()), name="unsupported_method")
        adapter = facts.get("base_fingerprint")
        for key in ("base_megatron_path", "base_hf_path"):
            base = inputs[key].facts.get("base_fingerprint") if key in inputs else None
            if adapter and base and adapter != base:
                what = (
                    f"the adapter {self.lora_checkpoint} was trained on another base than {inputs[key].value} "
                    f"(fingerprints {adapter[:12]}… and {base[:12]}…)"
                )
                yield Problem(where=key, what=what, name="base_model_mismatch")

    def warnings(self, adapter: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Iterable[str]:
        """What is worth saying of an adapter (by its facts) before it is merged."""
        if not adapter:
            yield f"{self.lora_checkpoint} does not say which base it was trained on: the base is taken on trust"
        if adapter.get("finished") is False:
            yield f"{self.lora_checkpoint} is unfinished: training stopped at iteration {adapter.get('iteration')}"
        trained, here = adapter.get("chat_template_digest"), tokenizer.get("chat_template_digest")
        if trained and here and trained != here:
            yield "the adapter was trained with another chat template than the base's, which the merged model gets"
