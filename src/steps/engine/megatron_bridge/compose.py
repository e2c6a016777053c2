"""A step's configuration as Megatron-Bridge's ConfigContainer: pure, no file is written and nothing is started."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from steps.artifacts.checkpoint import iteration_dir
from steps.engine.megatron_bridge import adapter, data, recipe
from steps.engine.megatron_bridge.findings import Findings
from steps.engine.megatron_bridge.release import Release
from steps.engine.megatron_bridge.sections import derive, relocate
from steps.engine.megatron_bridge.values import Misfit, assign, construct, fit, names

#: Sections that are no section of the container: what they say is turned into something else, or is not for it.
_OURS = frozenset({"engine", "run", "recipe", "dataset", "peft"})
#: A model of another shape cannot load the base. Names of TransformerConfig, as run_config.yaml has them.
_SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size",
)  # fmt: skip


def compose(
    resolved: Mapping[str, Any],
    packed_dir: Path,
    base: Path,
    release: Release,
    where: data.HandOver,
    log: Callable[[str], None] = lambda message: None,
    *,
    adapts: bool = True,
) -> Any:
    """The ConfigContainer of a run.

    resolved: the step's resolved configuration.
    release:  release.load(), or anything with its fields.
    where:    data.plan(packed_dir, …): where the rows will be when training starts.
    log:      gets a line for every setting that takes effect elsewhere than its name says, or not at all.
    adapts:   whether adapters are trained, as the section `peft` says; False: all weights.

    Raises ConfigError with every setting that does not fit, StepFailed for a missing package.
    """
    findings = Findings()
    sections = {key: value for key, value in resolved.items() if key not in _OURS}
    section = dict(resolved.get("recipe") or {})
    peft = dict(resolved.get("peft") or {}) if adapts else None
    seq_length = data.sequence_length(resolved, packed_dir, findings)
    _check_recipe(section, peft, findings)

    function = recipe.find(str(section.get("_target_") or recipe.default(adapts=adapts)), findings, adapts=adapts)
    scheme = None if peft is None else "dora" if adapter.scheme(peft) == "dora" else "lora"
    container = recipe.call(function, {**section, "seq_length": seq_length}, scheme, str(base), findings)

    _apply_recipe(container, {**section, "seq_length": seq_length}, recipe.accepts(function), findings)
    for name, values in relocate(derive(sections, base, findings), container, findings).items():
        _apply_section(container, name, values, findings)
    _adopt_base(container, base, sections, findings)
    if peft is None:
        container.peft = None
    elif (made := adapter.build(peft, release.adapters, getattr(container, "peft", None), findings)) is not None:
        container.peft = made
        adapter.check_layers(made, container.model, findings)
    if seq_length is not None:
        container.dataset = data.dataset(
            container.dataset,
            resolved.get("dataset") or {},
            where,
            release,
            findings,
            seq_length=seq_length,
            context_parallel_size=int(getattr(container.model, "context_parallel_size", 1) or 1),
            seed=(resolved.get("rng") or {}).get("seed"),
        )
    _check_container(container, sections, findings)
    for message in findings.notes:
        log(message)
    findings.raise_if_any()
    return container


def _check_recipe(section: Mapping[str, Any], peft: Mapping[str, Any] | None, findings: Findings) -> None:
    """Keys that documents of older releases put into `recipe`, against what this step always does."""
    if section.get("packed_sequence") is False:
        findings.problem("recipe.packed_sequence", "this step trains packed rows", hint="Remove it, or set it to true.")
    for key in ("peft", "peft_scheme"):
        said = section.get(key)
        if said is None:
            continue
        if peft is None:
            findings.problem(f"recipe.{key}", f"is {said!r}, but all weights are trained", hint="Remove it.")
        elif said != adapter.scheme(peft):
            findings.problem(f"recipe.{key}", f"is {said!r}, but peft.type is {adapter.scheme(peft)!r}")


def _apply_recipe(container: Any, section: Mapping[str, Any], accepted: set[str] | None, findings: Findings) -> None:
    """What the recipe section says of the model, which is what most of it is about: set on the container's model.

    Also where the function took it as an argument: a recipe may round or forget it.
    """
    skip = {"_target_", "peft", "peft_scheme", "packed_sequence"}
    model_settings = names(container.model)
    values = {key: value for key, value in section.items() if key not in skip and value is not None}
    for key, value in values.items():
        if key in model_settings:
            assign(container.model, {key: value}, "recipe", findings)
        elif accepted is not None and key not in accepted:
            findings.no_counterpart(f"recipe.{key}", value, "the recipe", model_settings | accepted)


def _apply_section(container: Any, name: str, values: Any, findings: Findings) -> None:
    """One section of the configuration onto the container's own of that name."""
    if name not in names(container):
        findings.no_counterpart(name, values, "Megatron-Bridge", names(container) - {"dataset", "peft"})
        return
    current = getattr(container, name)
    hint = _hint(type(container), name)
    if values is None and type(None) not in typing.get_args(hint):
        return  # an empty section; where the container may go without (comm_overlap), null takes it out
    if not isinstance(values, Mapping):
        try:
            setattr(container, name, fit(hint, values))
        except Misfit as error:
            findings.problem(name, f"{values!r} does not fit", allowed=str(error))
        return
    if isinstance(current, str):  # mixed_precision: the name of a preset
        current = _preset(current, findings)
        setattr(container, name, current)
    if current is not None:
        assign(current, values, name, findings)
        return
    options = [option for option in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(option)]
    made = construct(options[0], values, name, findings) if len(options) == 1 else None  # type: ignore[arg-type]
    if made is not None:
        setattr(container, name, made)
    elif len(options) != 1:
        findings.problem(name, "the recipe sets none, and steps cannot tell which kind to make")


def _preset(name: str, findings: Findings) -> Any:
    from steps.engine.megatron_bridge.release import import_module

    findings.note(f"mixed_precision: your keys are set on the recipe's {name}")
    return import_module("megatron.bridge.training.mixed_precision").get_mixed_precision_config(name)


def _hint(cls: type, name: str) -> Any:
    try:
        return typing.get_type_hints(cls).get(name, Any)
    except (NameError, TypeError, AttributeError):
        return Any


def _adopt_base(container: Any, base: Path, sections: Mapping[str, Any], findings: Findings) -> None:
    """Tokenizer and vocabulary of the base, and a refusal where the recipe builds a model of another shape."""
    folder = iteration_dir(base)
    if folder is None:
        return
    tokenizer = next((path for path in (folder / "tokenizer", base / "tokenizer") if path.is_dir()), None)
    said = sections.get("tokenizer") or {}
    if tokenizer is not None and "tokenizer_model" not in said:
        # The recipe's is a name on the Hub; the base carries the one its data was packed with.
        values = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer), **said}
        assign(container.tokenizer, values, "tokenizer", findings)
        findings.note(f"tokenizer: the base's own, {tokenizer}")
    try:
        run_config = yaml.safe_load((folder / "run_config.yaml").read_text())
        stored = dict(run_config["model"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return  # a base without one is another tool's: Megatron-Bridge will judge it
    if getattr(container.model, "vocab_size", None) is None and not stored.get("should_pad_vocab"):
        container.model.vocab_size = stored.get("vocab_size")
    differ = [
        f"{key} {getattr(container.model, key)} (base: {stored[key]})"
        for key in _SHAPE
        if stored.get(key) is not None
        and getattr(container.model, key, None) is not None
        and getattr(container.model, key) != stored[key]
    ]
    if differ:
        findings.problem(
            "recipe._target_",
            f"builds another model than the base {base}: {', '.join(differ)}",
            hint="Take the recipe of the base's family (megatron.bridge.recipes), or set the shape in `model`.",
            name="base_model_mismatch",
        )


def _check_container(container: Any, sections: Mapping[str, Any], findings: Findings) -> None:
    """What Megatron-Bridge itself would refuse, told in our keys and before any process group stands."""
    if getattr(container.train, "micro_batch_size", 1) != 1:
        findings.problem(
            "train.micro_batch_size",
            f"Megatron-Bridge trains packed rows one at a time, not {container.train.micro_batch_size}",
            allowed="1",
            hint="Pack into longer rows (pack_size) to fill the GPU.",
        )
    if not (sections.get("checkpoint") or {}).get("save"):
        findings.problem("checkpoint.save", "missing", hint="Set where the checkpoint goes.")
