"""Our packed rows as Megatron-Bridge's fine-tuning data.

Releases differ in what they read. Later ones read our Parquet shards where they lie (a directory for each split). The
0.3 releases read one pickled `.npy` for each split; `write` makes it from the shards. Both want a small JSON with
the lengths of the packs beside the data.

A row `{input_ids, loss_mask, seq_start_id}` is trained by both in the same way: per document [s, e), tokens are
ids[s:e-1], labels ids[s+1:e] and the mask is stored[s:e-1], which is why ours is already shifted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.artifacts import packed_parquet, record
from steps.engine.megatron_bridge.findings import Findings
from steps.engine.megatron_bridge.release import Release
from steps.engine.megatron_bridge.values import assign
from steps.engine.progress import Progress

_SPECS_FIELDS = ("offline_packing_specs", "packed_sequence_specs")
_DERIVED = ("packed_train_data_path", "packed_val_data_path", "packed_metadata_path")


@dataclass(frozen=True)
class HandOver:
    """What Megatron-Bridge is pointed at, and what of it must be written first (`write`).

    train, valid: its packed_train_data_path and packed_val_data_path; valid is None without a valid split.
    metadata:     its packed_metadata_path, always written.
    convert:      train and valid are .npy files to be written from the shards.
    """

    packed_dir: Path
    train: Path
    valid: Path | None
    metadata: Path
    convert: bool


def plan(packed_dir: Path, scratch: Path, *, reads_parquet: bool) -> HandOver:
    """Where the data of a run lies. No file is touched. scratch: a directory all processes see."""
    root = packed_parquet.root(packed_dir)
    has_valid = bool(packed_parquet.shards(root, "valid"))
    if reads_parquet:
        train, valid = root / "splits" / "train", root / "splits" / "valid"
    else:
        train, valid = scratch / "train.npy", scratch / "valid.npy"
    return HandOver(root, train, valid if has_valid else None, scratch / "metadata.json", not reads_parquet)


def sequence_length(resolved: Mapping[str, Any], packed_dir: Path, findings: Findings) -> int | None:
    """recipe.seq_length, or pack_size of the data's record; None (and a problem) when neither is known or they differ.

    `model.seq_length` and `dataset.seq_length`, where given, must say the same.
    """
    said = {"recipe.seq_length": _get(resolved, "recipe", "seq_length")}
    known = record.read(packed_parquet.root(packed_dir))
    if known is not None and "pack_size" in known.facts:
        said["pack_size of the data"] = known.facts["pack_size"]
    said["model.seq_length"] = _get(resolved, "model", "seq_length")
    said["dataset.seq_length"] = _get(resolved, "dataset", "seq_length")
    for key in _SPECS_FIELDS:
        said[f"dataset.{key}.packed_sequence_size"] = _get(resolved, "dataset", key, "packed_sequence_size")
    said = {key: value for key, value in said.items() if value is not None}
    if not said:
        findings.problem("recipe.seq_length", "missing", hint="Set it to the pack_size the data was packed with.")
    elif len(set(said.values())) > 1:
        told = ", ".join(f"{key} is {value}" for key, value in said.items())
        findings.problem("recipe.seq_length", f"lengths disagree: {told}", name="seq_length_mismatch")
    else:
        return int(next(iter(said.values())))
    return None


def dataset(
    recipe_dataset: Any,
    section: Mapping[str, Any],
    where: HandOver,
    release: Release,
    findings: Findings,
    *,
    seq_length: int,
    context_parallel_size: int,
    seed: int | None,
) -> Any:
    """The dataset configuration of a run, with the recipe's loader settings and our rows.

    Always of the release's own class for local data: a recipe's own is one that downloads a public data set.
    seed: of the order of the rows, where the section does not set one.
    """
    fields = {item.name for item in dataclasses.fields(release.dataset) if item.init}
    kept = {
        item.name: getattr(recipe_dataset, item.name)
        for item in (dataclasses.fields(recipe_dataset) if dataclasses.is_dataclass(recipe_dataset) else ())
        if item.name in fields and not item.name.startswith("hf_")
    }
    key = next(name for name in _SPECS_FIELDS if name in fields)
    specs = release.specs(packed_sequence_size=seq_length)
    if context_parallel_size > 1:
        specs.pad_seq_to_mult = 2 * context_parallel_size  # each document is cut in 2 * CP chunks
        _check_documents(where.packed_dir, specs.pad_seq_to_mult, findings)
    # Assigned, not passed: a .npy does not exist before `write`, and the constructor would look for it. As the
    # constructor would keep them: a Path to a .npy, a text for Parquet.
    kind = Path if where.convert else str
    specs.packed_train_data_path = kind(where.train)
    specs.packed_val_data_path = None if where.valid is None else kind(where.valid)
    specs.packed_metadata_path = where.metadata
    kept |= {
        "dataset_root": str(where.packed_dir),  # as text: its run_config.yaml loses what a Path says
        "seq_length": seq_length,
        "do_validation": where.valid is not None,
        "do_test": False,
        key: specs,
        # Otherwise it trains every token, whatever our mask says.
        "dataset_kwargs": {**(kept.get("dataset_kwargs") or {}), "answer_only_loss": True},
    }
    if "enable_offline_packing" in fields:
        kept["enable_offline_packing"] = True
    if seed is not None:
        kept["seed"] = seed
    made = release.dataset(**kept)
    if where.valid is None:
        findings.note("the data has no valid split: nothing is evaluated")
    if packed_parquet.shards(where.packed_dir, "test"):
        findings.note("splits/test is not read: Megatron-Bridge evaluates the valid split only")
    _apply_section(made, section, key, findings)
    return made


def _check_documents(packed_dir: Path, multiple: int, findings: Findings) -> None:
    """Context parallelism cuts the tokens of each document (one less than stored); looks at the first row only."""
    row = next(read_rows(packed_parquet.shards(packed_dir, "train")), None)
    if row is not None and any(length % multiple for length in _document_lengths(row)):
        findings.problem(
            "recipe.context_parallel_size",
            f"the documents in {packed_dir} are not padded to multiples of {multiple} (2 * context_parallel_size)",
            hint=f"Pack again with pad_multiple={multiple}.",
            name="context_parallel_padding",
        )


def _document_lengths(row: Mapping[str, Any]) -> list[int]:
    """Tokens of each document of a packed row that are trained on: all but the last, which is only a label."""
    starts = row["seq_start_id"]
    return [end - start - 1 for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)]


def _apply_section(made: Any, section: Mapping[str, Any], key: str, findings: Findings) -> None:
    """The user's own `dataset` keys. What follows from nano3_packed_sft_dir cannot be set beside it."""
    own = {name: value for name, value in section.items() if name not in ("nano3_packed_sft_dir", "seq_length")}
    for name in _SPECS_FIELDS:
        specs = own.pop(name, None)
        if not isinstance(specs, Mapping):
            continue
        for derived in _DERIVED:
            if specs.get(derived) is not None:
                findings.problem(
                    f"dataset.{name}.{derived}",
                    "follows from dataset.nano3_packed_sft_dir",
                    hint="Remove it, or point dataset.nano3_packed_sft_dir at the data.",
                )
        assign(getattr(made, key), {k: v for k, v in specs.items() if k not in _DERIVED}, f"dataset.{name}", findings)
    if "dataset_root" in own:
        findings.problem("dataset.dataset_root", "follows from dataset.nano3_packed_sft_dir", hint="Remove it.")
        del own["dataset_root"]
    if own.get("do_validation") and not made.do_validation:
        findings.problem("dataset.do_validation", "the data has no valid split", hint="Pack with valid_ratio above 0.")
        del own["do_validation"]
    assign(made, own, "dataset", findings)


def write(where: HandOver, progress: Progress) -> None:
    """Write what `where` promises: the metadata and, for releases that need them, the .npy files.

    Whole or not at all, so that a restart on other machines never meets half of one. Memory: the .npy of a split is
    built in memory (about 5 bytes a token), as Megatron-Bridge 0.3 itself will hold it in every process.
    """
    splits = [("train", where.train)] + ([("valid", where.valid)] if where.valid is not None else [])
    where.metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata = []
    for split, target in splits:
        shards = packed_parquet.shards(where.packed_dir, split)
        with progress.task(f"handing {split} to Megatron-Bridge", unit="rows") as task:
            rows, lengths = [], _Lengths()
            for row in read_rows(shards):
                lengths.add(row)
                if where.convert:
                    rows.append(row)
                task.advance(1)
        metadata.append(lengths.summary())
        if where.convert:
            _save_npy(target, rows)
            progress.log(f"this Megatron-Bridge reads no Parquet: {split} was written to {target} for it")
    with _beside(where.metadata) as beside:
        beside.write_text(json.dumps(metadata))


def read_rows(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Packed rows as the 0.3 releases want them: input_ids int32 array, loss_mask uint8 array, seq_start_id list."""
    import pyarrow.parquet as pq

    for shard in shards:
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(batch_size=64, columns=["input_ids", "loss_mask", "seq_start_id"]):
                ids, mask, starts = batch.column("input_ids"), batch.column("loss_mask"), batch.column("seq_start_id")
                for row in range(batch.num_rows):
                    yield {
                        "input_ids": ids[row].values.to_numpy(),
                        "loss_mask": mask[row].values.to_numpy(),
                        # A list: Megatron-Bridge appends the end to it with `+`, which would add to an array.
                        "seq_start_id": starts[row].as_py(),
                    }


class _Lengths:
    """What Megatron-Bridge's metadata says of a split (it pads cu_seqlens to constant shapes with it)."""

    def __init__(self) -> None:
        self.documents, self.longest, self.shortest_pack = 0, 0, 0

    def add(self, row: Mapping[str, Any]) -> None:
        lengths = _document_lengths(row)
        self.documents = max(self.documents, len(lengths))
        self.longest = max(self.longest, *lengths)
        self.shortest_pack = min(self.shortest_pack or sum(lengths), sum(lengths))

    def summary(self) -> dict[str, int]:
        return {
            "max_samples_per_bin": self.documents,
            "dataset_max_seqlen": self.longest,
            "min_packed_seqlen": self.shortest_pack,
        }


def _save_npy(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import numpy as np

    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    with _beside(path) as beside, beside.open("wb") as file:
        np.save(file, array, allow_pickle=True)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def _get(mapping: Mapping[str, Any], *keys: str) -> Any:
    found: Any = mapping
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
