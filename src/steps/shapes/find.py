"""The shape of a model that a person names: a shipped one, a directory, a config.json, a Hub id. No weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.artifacts import checkpoint, record
from steps.artifacts.opening import is_hub_id
from steps.config import yaml12
from steps.errors import ArtifactError, Problem, StepsError, UsageError, suggest
from steps.shapes import hf_config, run_config
from steps.shapes.model_config import ModelConfig
from steps.shapes.presets import preset, presets

_CONFIG, _RUN_CONFIG = "config.json", "run_config.yaml"


@dataclass(frozen=True)
class Found:
    """A shape, and where it was read ("the shipped shapes", a file)."""

    model: ModelConfig
    where: str


def find(name: str) -> Found:
    """The shape of the model called `name`: what is there under that path, else a preset, else a model on the Hub.

    Raises UsageError for a name that means nothing, ArtifactError for a model that is not there or not supported.
    """
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return _file(path)
        if path.is_dir():
            return _directory(path)
    except OSError as error:
        raise ArtifactError(f"{name} cannot be read: {(error.strerror or str(error)).lower()}") from error
    if (model := preset(name)) is not None:
        return Found(model, "the shipped shapes")
    if is_hub_id(name):
        return _hub(name)
    if "/" in name or path.suffix in (".json", ".gguf", ".yaml"):
        raise ArtifactError(f"there is no model at {name}", name="missing_checkpoint_hf")
    raise UsageError(
        Problem(
            where=name, what="is neither a path, nor a shipped shape, nor a Hub id (org/name)",
            allowed=", ".join(presets()), hint=suggest(name.lower(), presets()),
        )
    )  # fmt: skip


def _file(path: Path) -> Found:
    if path.suffix == ".gguf":
        hint = f"Convert it first: steps run convert/hf_to_megatron hf_model_id={path} megatron_path=…"
        raise _error(f"{path}: the shape of a .gguf file is not read here", hint)
    if path.suffix == ".json":
        return _hf(path, str(path))
    if path.name == _RUN_CONFIG:
        return _megatron(path)
    raise _error(f"{path} is neither a config.json nor a directory with a model")


def _directory(path: Path) -> Found:
    """A checkpoint_hf or a checkpoint_megatron, or an iter_NNNNNNN folder of one."""
    if (path / _CONFIG).is_file():
        return _hf(path / _CONFIG, str(path / _CONFIG))
    home = checkpoint.home(path)
    known = record.read(home)
    if (known is not None and known.type == "checkpoint_lora") or (path / "adapter_config.json").is_file():
        raise _error(f"{path} is an adapter", "Name the base model that it belongs to.")
    if known is not None and "num_layers" in (model := known.facts.get("model") or {}):
        return Found(_recorded(model, home), str(home / record.RECORD))
    folder = checkpoint.iteration_dir(path)
    if folder is not None and (folder / _RUN_CONFIG).is_file():
        return _megatron(folder / _RUN_CONFIG)
    raise _error(f"{path} holds neither {_CONFIG} nor a Megatron checkpoint with {_RUN_CONFIG}")


def _recorded(model: dict[str, Any], home: Path) -> ModelConfig:
    try:
        return ModelConfig(**model)
    except TypeError as error:
        raise _error(f"{home / record.RECORD}: facts.model is no shape: {error}") from error


def _hf(path: Path, where: str) -> Found:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON: {error}", name="damaged_artifact") from error
    if not isinstance(data, dict):
        raise _error(f"{path} holds no mapping")
    return Found(hf_config.model_config(data, where, hf_config.stated_dtype(data) or "float32"), where)


def _megatron(path: Path) -> Found:
    try:
        data = yaml12.load(path)[0]
    except StepsError as error:
        raise ArtifactError(error.problems) from error
    return Found(run_config.model_config(data, str(path)), str(path))


def _hub(name: str) -> Found:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        path = Path(hf_hub_download(name, _CONFIG))
    except RepositoryNotFoundError as error:
        what = f"the Hugging Face Hub has no model {name}, or it is private"
        hint = "Check the name; for a private or gated model set HF_TOKEN."
        raise ArtifactError(what, hint=hint, name="missing_checkpoint_hf") from error
    except Exception as error:  # network, authorization, offline mode, no such file: they have no common root
        what = f"{_CONFIG} of {name} is not in the local cache and cannot be fetched from the Hugging Face Hub"
        hint = f"Check the connection, or name a directory or a shipped shape: {', '.join(presets())}."
        raise ArtifactError(what, hint=hint, name="missing_checkpoint_hf") from error
    return _hf(path, f"{_CONFIG} of {name} on the Hugging Face Hub")


def _error(what: str, hint: str = "") -> ArtifactError:
    return ArtifactError(what, hint=hint, name="unsupported_model")
