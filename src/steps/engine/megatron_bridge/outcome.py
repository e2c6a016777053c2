"""What a finished Megatron-Bridge run says of itself, for the record of the checkpoint it wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from steps.artifacts.checkpoint import iteration_dir
from steps.errors import StepFailed

_METHODS = {"LoRA": "lora", "DoRA": "dora", "CanonicalLoRA": "canonical_lora"}


def facts(save: Path) -> dict[str, Any]:
    """method, dim, alpha, target_modules, exclude_modules, iteration and finished of the latest checkpoint in `save`.

    Read from the run_config.yaml that Megatron-Bridge writes beside the tensors: what was really trained, not what was
    asked for. Raises StepFailed when there is no checkpoint, or one of another kind.
    """
    folder = iteration_dir(save)
    if folder is None:
        raise StepFailed(f"Megatron-Bridge ended and left no checkpoint in {save}", hint="Its log tells why.")
    try:
        run_config = yaml.load((folder / "run_config.yaml").read_text(), Loader=_Plain)  # noqa: S506
        peft, train = run_config["peft"], run_config["train"]
        method = _METHODS[peft["_target_"].rpartition(".")[2]]
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StepFailed(f"{folder / 'run_config.yaml'} does not say which adapter was trained: {error!r}") from error
    iteration = int(re.sub(r"\D", "", folder.name))
    return {
        "method": method,
        **{key: peft.get(key) for key in ("dim", "alpha", "target_modules", "exclude_modules")},
        "iteration": iteration,
        "finished": iteration >= int(train["train_iters"]),
    }


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
