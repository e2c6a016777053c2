"""Which model an evaluation looks at: a base, or an adapter on its base."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from steps.artifacts import bases
from steps.config.base import StepConfig
from steps.config.one_base import one_base
from steps.config.peft import names
from steps.config.training import Precision
from steps.errors import Problem

if TYPE_CHECKING:
    from steps.artifacts.opening import Artifact

ADAPTER, MEGATRON, HF = "lora_checkpoint", "base_megatron_path", "base_hf_path"


class EvaluatedModel(StepConfig):
    """A model, in the forms that other steps leave it in. A merged model is a base_hf_path."""

    lora_checkpoint: str | None = Field(
        None, description="The adapter (checkpoint_lora, or one of its iter_NNNNNNN folders); null: the base alone"
    )
    base_megatron_path: str | None = Field(None, description="The model as checkpoint_megatron (or give base_hf_path)")
    base_hf_path: str | None = Field(
        None, description="The model as checkpoint_hf, a merged one for example (or give base_megatron_path)"
    )
    precision: Precision = Field("auto", description="Dtype the model computes in, as train.precision")
    output_dir: str = Field(description="Where the eval_report goes")

    def check_values(self) -> Iterator[Problem]:
        yield from one_base(self.base_megatron_path, self.base_hf_path)

    def check_inputs(self, inputs: "Mapping[str, Artifact]") -> Iterator[Problem]:
        """The adapter by what the records say: a method that is known here, and this base."""
        adapter = inputs.get(ADAPTER)
        if adapter is None:
            return
        if (method := adapter.facts.get("method")) is not None and method not in names():
            what = f"{adapter.value} is an adapter of the method {method!r}, which this version does not know"
            yield Problem(ADAPTER, what, allowed=", ".join(names()), name="unsupported_method")
        yield from bases.mismatch(adapter, self.base(inputs))

    def base(self, inputs: "Mapping[str, Artifact]") -> "Artifact":
        """The base, opened."""
        return inputs[MEGATRON if self.base_megatron_path is not None else HF]

    def model_facts(self, inputs: "Mapping[str, Artifact]") -> dict[str, Any]:
        """What a report says of the model."""
        told: dict[str, Any] = {"base": self.base(inputs).value}
        if (adapter := inputs.get(ADAPTER)) is not None:
            told["adapter"] = adapter.value
            known = ("method", "dim", "alpha", "iteration", "trainable_parameters")
            told |= {name: adapter.facts[name] for name in known if name in adapter.facts}
        return told
