"""What a finished Megatron-Bridge run says of itself, for the record of the checkpoint it wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from steps.artifacts.checkpoint import iteration_dir
from steps.errors import ArtifactError, StepFailed

_METHODS = {"LoRA": "lora", "DoRA": "dora", "CanonicalLoRA": "canonical_lora"}


def facts(save: Path, *, adapts: bool = True) -> dict[str, Any]:
    """What the record of the latest checkpoint in `save` says of it.

    iteration and finished; of adapters method, dim, alpha, target_modules and exclude_modules; of a whole model what a
    converter says of one that it wrote: shape, dtype, fingerprint. Read from the run_config.yaml and the weights that
    Megatron-Bridge wrote: what was really trained, not what was asked for. Raises StepFailed when there is no
    checkpoint, or one of another kind.
    """
    folder = iteration_dir(save)
    if folder is None:
        raise StepFailed(f"Megatron-Bridge ended and left no checkpoint in {save}", hint="Its log tells why.")
    try:
        run_config = yaml.load((folder / "run_config.yaml").read_text(), Loader=_Plain)  # noqa: S506
        peft, train_iters = run_config.get("peft"), int(run_config["train"]["train_iters"])
        trained = _adapter(peft) if adapts else {}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
        what = "which adapter was trained" if adapts else "how long it was trained"
        raise StepFailed(f"{folder / 'run_config.yaml'} does not say {what}: {error!r}") from error
    if not adapts:
        if peft is not None:
            raise StepFailed(f"{folder} holds an adapter, not a model")
        trained = _model(save)
    iteration = int(re.sub(r"\D", "", folder.name))
    return {**trained, "iteration": iteration, "finished": iteration >= train_iters}


def _adapter(peft: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: peft.get(key) for key in ("dim", "alpha", "target_modules", "exclude_modules")}
    return {"method": _METHODS[peft["_target_"].rpartition(".")[2]], **kept}


def _model(save: Path) -> dict[str, Any]:
    """The account of the weights; empty for a family that only Megatron-Bridge reads."""
    from steps.engine.checkpoint import convert
    from steps.engine.checkpoint.fingerprint import fingerprint

    try:
        source = convert.megatron_source(save)
    except ArtifactError:
        return {}
    return convert.converted(source.config, source.tensors, fingerprint(source.tensors)).facts()


class _Plain(yaml.SafeLoader):
    """Reads what Megatron-Bridge dumps without making its objects: a tagged value becomes plain data."""


def _untag(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_Plain.add_multi_constructor("!", _untag)
_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _untag)
