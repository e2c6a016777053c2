"""The engine `megatron_bridge`: hand a run over to NVIDIA's Megatron-Bridge.

    missing_packages()          why it cannot run here, without importing it
    build(…)                    the ConfigContainer of a run (pure)
    finetune(…)                 build, write the data it needs, train
    facts(save)                 what was trained, for the checkpoint's record

Adapters are trained, or with `adapts=False` the model itself.

Nothing of Megatron is imported before `build` or `finetune` is called.

`release` knows the installed Megatron-Bridge, `recipe` calls the recipe function, `values` sets plain values on its
dataclasses, `sections` arranges ours as there, `adapter` and `data` make the parts that are ours, `compose` puts all
together, `outcome` reads what a run left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steps.engine.megatron_bridge import data
from steps.engine.megatron_bridge import release as _release
from steps.engine.megatron_bridge.compose import compose
from steps.engine.megatron_bridge.outcome import facts
from steps.engine.megatron_bridge.release import missing_packages
from steps.engine.progress import Progress
from steps.errors import ConfigError

__all__ = ["build", "facts", "finetune", "missing_packages"]


def build(
    resolved: Mapping[str, Any],
    packed_dir: Path,
    base: Path,
    *,
    adapts: bool = True,
    scratch: Path | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Any:
    """The ConfigContainer that `finetune` would hand over. Writes nothing; see `compose` for the errors."""
    installed = _release.load()
    where = data.plan(packed_dir, scratch or _scratch(resolved), reads_parquet=installed.reads_parquet)
    return compose(resolved, packed_dir, base, installed, where, log, adapts=adapts)


def finetune(
    resolved: Mapping[str, Any],
    *,
    packed_dir: Path,
    base: Path,
    progress: Progress,
    adapts: bool = True,
    scratch: Path | None = None,
) -> None:
    """Train with Megatron-Bridge; it saves to `checkpoint.save`, and resumes from there or from `checkpoint.load`.

    Call it in every process that torchrun starts. Process 0 writes what Megatron-Bridge needs beside the shards while
    the others wait for it where Megatron-Bridge makes its process group (dist.distributed_timeout_minutes).

    resolved:   the step's resolved configuration; DESIGN's sections, and any other section of the container.
    packed_dir: a packed_parquet directory.
    base:       a checkpoint_megatron directory.
    adapts:     whether adapters are trained; False: all weights of the base.
    scratch:    where the metadata and, for releases that read no Parquet, a copy of the rows go; a directory that all
                processes see. Beside checkpoint.save by default.

    Raises ConfigError with every setting that does not fit, StepFailed for a missing package.
    """
    installed = _release.load()
    where = data.plan(packed_dir, scratch or _scratch(resolved), reads_parquet=installed.reads_parquet)
    container = compose(resolved, packed_dir, base, installed, where, progress.log, adapts=adapts)
    train, forward_step = _release.entry_points()
    if os.environ.get("RANK", "0") == "0":
        data.write(where, progress)
    progress.log(f"handing over to Megatron-Bridge {installed.version}")
    train(config=container, forward_step_func=forward_step)


def _scratch(resolved: Mapping[str, Any]) -> Path:
    save = (resolved.get("checkpoint") or {}).get("save")
    if not save:
        raise ConfigError("checkpoint.save: missing", hint="Set where the checkpoint goes.")
    place = Path(save).expanduser()
    return place.parent / f"{place.name}.bridge_data"
