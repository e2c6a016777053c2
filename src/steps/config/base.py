"""What every typed section and every step's Config stands on.

No `from __future__ import annotations` where sections are defined: pydantic would compile each annotation anew from its
text, a tenth of a dry run's CPU time.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, field_validator
from pydantic_core import InitErrorDetails

if TYPE_CHECKING:
    from steps.artifacts.opening import Artifact
    from steps.errors import Problem
    from steps.shapes.account import Account


class Section(BaseModel):
    """A mapping of the YAML with known, typed keys.

    Strict: "16" is no integer (1 is a float, though). Unknown keys are let in here and reported by `validate`, which
    knows where they came from and whether an engine takes them.
    """

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, defer_build=True, protected_namespaces=()
    )

    @classmethod
    def kinds(cls) -> Sequence[str]:
        """For a section of several kinds: the values of its key `type`. Every other section has none."""
        return ()

    @classmethod
    def classes(cls) -> "Mapping[str, type[Section]]":
        """The class of each kind."""
        return {kind: cls.variant({"type": kind}) for kind in cls.kinds()}

    @classmethod
    def variant(cls, data: Any) -> "type[Section]":
        """The class that `data` is to be read as; the class itself where it is the only one."""
        return cls


def of_its_kind(section: type[Section]) -> Any:
    """Annotation of a field that holds a section of several kinds: each value is read as its `type` says."""

    def chosen(value: Any) -> Any:
        if isinstance(value, section):
            return value
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind is not None and kind not in section.kinds():
            expected = ", ".join(section.kinds())
            fault = InitErrorDetails(type="literal_error", loc=("type",), input=kind, ctx={"expected": expected})  # type: ignore[typeddict-item]
            raise ValidationError.from_exception_data(section.__name__, [fault])
        return section.variant(value).model_validate(value)

    return Annotated[section, PlainValidator(chosen)]


def section(description: str) -> Any:
    """A field whose default is the section's own defaults.

    Given as an empty mapping to validate: a class as default_factory would make pydantic build a validator for that
    class beside the one of the whole configuration, 3 ms of a dry run for each.
    """
    return Field(default_factory=dict, validate_default=True, description=description)


def _as_text(value: Any) -> Any:
    """true, 8 and 0.5 as a shell would have them: an environment holds only text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


EnvVar = Annotated[str, BeforeValidator(_as_text)]


def _as_number_text(value: Any) -> Any:
    """8 for "8": fields that a cluster reads as text (mem, time) are often written as plain numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


#: Text that people also write as a plain integer.
Text = Annotated[str, BeforeValidator(_as_number_text)]


class RunEnv(Section):
    """Where and how the job runs: a profile fills it, `run.env.KEY=…` overrides it.

    These are the fields that every executor knows. An executor adds its own in a subclass, which the dispatcher checks;
    here, and inside the job, further keys are nobody's business.
    """

    executor: str = Field("local", description="Who runs the job: local, slurm or lepton")
    container_image: str | None = Field(
        None, description="Container image the job runs in (default: the step's own; '' for none)"
    )
    nodes: int | None = Field(None, ge=1, description="Number of nodes")
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs on each node")
    nprocs_per_node: int | None = Field(
        None, ge=1, description="Processes that torchrun starts on each node (default: gpus_per_node, or 1)"
    )
    ntasks_per_node: int | None = Field(None, ge=1, description="The same in Slurm's word")
    env_vars: dict[str, EnvVar] = Field(default_factory=dict, description="Environment variables of the job")
    mounts: list[Any] = Field(default_factory=list, description="What the container sees: host:container")
    startup_commands: list[str] = Field(
        default_factory=list, description="Shell commands before the step, on every node, where the step runs"
    )
    pip_extras: list[str] = Field(default_factory=list, description="Packages that pip installs before the step")

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.nprocs_per_node or self.ntasks_per_node or self.gpus_per_node or 1

    @field_validator("env_vars")
    @classmethod
    def _names(cls, variables: dict[str, str]) -> dict[str, str]:
        if odd := [name for name in variables if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]:
            raise ValueError(f"{odd[0]!r} is no name of an environment variable (letters, digits and _)")
        return variables


class Run(Section):
    """Everything that is about running the job, not about what it computes. Never part of the config digest."""

    env: RunEnv = section("The environment, filled by a profile")


@dataclass(frozen=True)
class Adopted:
    """A configuration with what it says in another program's words put into the step's own.

    data, sources: the step's own keys only: what is typed, shown and written down.
    written:  own dotted key -> the dotted key that the user wrote instead, for the messages.
    unread:   dotted keys of which nothing is used; what does not resolve below them is nobody's business.
    notes:    a line for everything that has no effect here.
    problems: what is wrong with it; to be told together with whatever else is wrong.
    """

    data: Mapping[str, Any]
    sources: Mapping[str, str]
    written: Mapping[str, str] = field(default_factory=dict)
    unread: Sequence[str] = ()
    notes: Sequence[str] = ()
    problems: "Sequence[Problem]" = ()


class StepConfig(Section):
    """The root of a step's configuration. A step subclasses it in its `schema.py` as `Config`."""

    run: Run = section("Where and how the job runs")

    @classmethod
    def adopt(cls, data: Mapping[str, Any], sources: Mapping[str, str]) -> Adopted:
        """Read what a user brings along in another program's sections. Pure; called on the resolved configuration,
        before it is typed. A stronger layer's keys come later in `sources`."""
        return Adopted(data, sources)

    def accepts_unknown(self, key: str) -> str:
        """Why an unknown dotted key is let through ("passed to Megatron-Bridge"), '' to refuse it."""
        return ""

    def check_values(self) -> "Iterable[Problem]":
        """Faults that need more than one key to see. Torch-free, no file is read."""
        return ()

    def check_inputs(self, inputs: "Mapping[str, Artifact]") -> "Iterable[Problem]":
        """Faults between the configuration and the opened input artifacts, by config key. Torch-free.

        Absent keys: inputs that are optional and not given. A Problem's `name` is the manifest error it stands for.
        """
        return ()

    def accounts(self, inputs: "Mapping[str, Artifact]") -> "Mapping[str, Account]":
        """What the step's models come to, each by its name, for the sheet of a dry run; "" names an only one.

        Empty where nothing is known. Torch-free.
        """
        return {}

    def unprobed(self) -> str:
        """Why `steps run --probe` has nothing to try in this step, for a message; '' where it has.

        A step that can be probed does so where its `job.probe` says: it measures a little of its work, writes nothing
        but its summary, and ends.
        """
        return "it has no part that could be tried by itself"

    def path_keys(self) -> Sequence[str]:
        """Dotted keys, beside those of the manifest's artifacts, whose value is a path on the machine of the job."""
        return ()

    def name_keys(self) -> Sequence[str]:
        """Dotted keys whose value is such a path or something else: a Hub id, a text."""
        return ()

    def launch_here(self) -> "Iterable[Problem]":
        """Faults of running on this machine (a package that is not installed, …). Not asked for remote jobs."""
        return ()

    def wants_torchrun(self) -> bool:
        """Whether even a single process must be started by torchrun (only for steps with launch = "torchrun")."""
        return False


def lookup(config: Any, key: str) -> Any:
    """The value at a dotted key of a typed config or a plain mapping; None where any part is absent."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
        if config is None:
            return None
    return config
