"""artifact.json: what an artifact is, where it came from, and the facts that later steps must agree with.

An artifact is a directory. It is written beside its final place (`.NAME.partial`) under a lock and renamed when it is
whole, so a reader never sees half of one and a rerun never mixes with leftovers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from steps.errors import ArtifactError, StepFailed

RECORD = "artifact.json"
FORMAT_VERSION = 1
#: `.NAME.PID.tmp`: a file that its writer was killed over, see `write_text`.
_UNFINISHED = re.compile(r"\..+\.\d+\.tmp")


@dataclass(frozen=True)
class Input:
    """One artifact that was read to make this one. `key` is the config key that named it."""

    key: str
    path: str
    type: str
    digest: str = ""


@dataclass
class Record:
    """The contents of artifact.json.

    digest: sha256 over the sorted (relative path, size, sha256) of the files: two artifacts with equal digests hold
            equal bytes. Empty for a growing artifact (a run that still saves checkpoints).
    facts:  what later steps must agree with: tokenizer_digest, chat_template_digest, pack_size, base_fingerprint,
            adapter method, dim, alpha, target_modules, dtype, counts, …
    """

    type: str
    producer: Mapping[str, str] = field(default_factory=dict)
    config_digest: str = ""
    inputs: Sequence[Input] = ()
    digest: str = ""
    files: Mapping[str, int] = field(default_factory=dict)
    created_at: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        """Write artifact.json into `directory`, whole or not at all."""
        self.created_at = self.created_at or datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_text(directory / RECORD, json.dumps(asdict(self), indent=2) + "\n")


_KINDS: Mapping[str, type] = {
    "type": str, "producer": dict, "config_digest": str, "inputs": list, "digest": str, "files": dict,
    "created_at": str, "facts": dict, "format_version": int,
}  # fmt: skip


def read(directory: Path) -> Record | None:
    """The record of an artifact; None where there is none (made by another tool)."""
    path = directory / RECORD
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint="Make the artifact again.") from error
    if not isinstance(data, dict) or "type" not in data:
        raise ArtifactError(f"{path} is no artifact record (it has no type)", hint="Make the artifact again.")
    for name, kind in _KINDS.items():
        if name in data and not isinstance(data[name], kind):
            what = f"{path} is damaged: {name} is {json.dumps(data[name])[:40]}"
            raise ArtifactError(what, hint="Make the artifact again.")
    if data.get("format_version", 0) > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} was written by a newer version of steps (format {data['format_version']}, "
            f"this one reads up to {FORMAT_VERSION})",
            hint="Upgrade peft-steps.",
        )
    known = {name: data[name] for name in Record.__dataclass_fields__ if name in data}
    try:
        known["inputs"] = [Input(**entry) for entry in known.get("inputs", ())]
    except TypeError as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint="Make the artifact again.") from error
    return Record(**known)


def missing_files(directory: Path, record: Record) -> list[str]:
    """Files that the record lists and that are gone or have another size. Cheap: looks at sizes only."""
    return [
        name
        for name, size in record.files.items()
        if not (directory / name).is_file() or (directory / name).stat().st_size != size
    ]


def digest_config(config: Mapping[str, Any]) -> str:
    """sha256 of a resolved configuration; where it runs (`run`) does not count."""
    relevant = {key: value for key, value in config.items() if key != "run"}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()


#: sha256 of files that were hashed while they were written: by device, inode, size and time of the last change.
_remembered: dict[tuple[int, ...], str] = {}


def remember(path: Path, digest: str) -> None:
    """Spare `digest_file` the reading of a file that its writer has just hashed. Renaming it changes nothing."""
    _remembered[_identity(path)] = digest


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    if known := _remembered.get(_identity(path)):
        return known
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_files(directory: Path) -> tuple[str, dict[str, int]]:
    """The content digest of a directory and the size of each of its files (the record itself left out)."""
    total, sizes = hashlib.sha256(), {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != RECORD:
            sizes[name] = path.stat().st_size
            total.update(f"{name}\0{sizes[name]}\0{digest_file(path)}\n".encode())
    return total.hexdigest(), sizes


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a small file whole or not at all: beside, synced, then renamed. `mode` as in open(2), default by umask."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666 if mode is None else mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def remove_unfinished(directory: Path) -> None:
    """Remove the files that killed writers left half written. Only for who holds the place alone."""
    for path in directory.rglob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path`'s place alone: a second writer of the same artifact fails at once, nothing mixes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.parent / f".{path.name}.lock"
    while True:
        with lock_path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StepFailed(
                    f"another run is writing {path} at this moment", hint="Wait for it, or write somewhere else."
                ) from None
            if not lock_path.exists() or not os.path.samestat(os.fstat(file.fileno()), lock_path.stat()):
                continue  # its last holder removed it between our opening and our locking
            try:
                yield
            finally:
                lock_path.unlink(missing_ok=True)
            return


def check_replaceable(path: Path, type: str) -> None:
    """Refuse a destination whose contents we did not make: nothing of the user's is ever overwritten."""
    if Path(os.path.realpath(path)).is_symlink():
        raise ArtifactError(f"{path} is a link that leads to itself", hint="Remove it or choose another path.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    record = read(path) if path.is_dir() else None
    if record is None or record.type != type:
        what = f"holds a {record.type}" if record else "was not made by steps"
        raise ArtifactError(
            f"{path} already exists and {what}; it is not overwritten", hint="Choose another path or remove it."
        )


@contextmanager
def publish(path: Path, record: Record, *, keep_partial: bool = False) -> Iterator[Path]:
    """Yield a directory to fill; when the block ends well it becomes `path`, with its record.

    keep_partial: a partial directory left by a killed run is handed over as it is (the step knows how to resume),
                  and stays when the block fails; otherwise it starts empty and is removed.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced, on its own disk
    check_replaceable(path, record.type)
    partial, old = path.parent / f".{path.name}.partial", path.parent / f".{path.name}.old"
    with lock(path):
        if old.exists():  # killed between the two renames below
            shutil.rmtree(old) if path.exists() else old.rename(path)
        if partial.exists() and not keep_partial:
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        try:
            yield partial
        except BaseException:
            if not keep_partial:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if keep_partial:
            remove_unfinished(partial)
        record.digest, record.files = digest_files(partial)
        record.write(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
