"""Where an artifact came from: its chain of records, back to what no step has made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from steps.artifacts import checkpoint, packed_parquet
from steps.artifacts.opening import CONTRACTS, NAMED_TYPES, is_hub_id
from steps.artifacts.record import RECORD, Input, Record, missing_files, read
from steps.errors import ArtifactError


@dataclass(frozen=True)
class Origin:
    """One artifact of a chain.

    path:   as it was named.   type: by its record, else by who read it or by what lies there.
    key:    the config key that named it, '' for the one that was asked for.
    record: None where there is none (made by other tools, or gone).
    faults: what is wrong with it now: gone, damaged, or no longer what was read.
    made_from: what its record says it was made from.
    """

    path: str
    type: str
    key: str = ""
    record: Record | None = None
    faults: Sequence[str] = ()
    made_from: Sequence[Origin] = ()


def home(path: Path) -> Path:
    """The directory of the artifact that a path leads to or into: a split, an iteration, one of its files."""
    root = checkpoint.home(packed_parquet.root(path))
    if (root / RECORD).is_file():
        return root
    for above in root.resolve().parents:
        if (above / RECORD).is_file() and _is_part(root.resolve().relative_to(above).as_posix(), above):
            return above
    return root


def _is_part(name: str, place: Path) -> bool:
    try:
        record = read(place)
    except ArtifactError:
        return False
    return record is not None and any(file == name or file.startswith(f"{name}/") for file in record.files)


def trace(path: Path) -> Origin:
    """The chain of an artifact on disk. Raises ArtifactError where its own record is damaged."""
    place = home(path)
    record = read(place)
    if record is None:
        return Origin(str(path), looks_like(place) or "")
    return Origin(str(path), record.type, "", record, _gone(place, record), _inputs(record, place, (place.resolve(),)))


def looks_like(path: Path) -> str | None:
    """The type that a directory without a record has by what lies in it; None where that tells none."""
    if not path.is_dir():
        return None
    return next((name for name, check in CONTRACTS.items() if name != "training_jsonl" and not check(path)), None)


def _inputs(record: Record, place: Path, above: tuple[Path, ...]) -> list[Origin]:
    return [_origin(item, place, above) for item in record.inputs]


def _origin(item: Input, place: Path, above: tuple[Path, ...]) -> Origin:
    found = _found(item.path, place)
    if found is None:
        on_the_hub = item.type in NAMED_TYPES and not item.digest and is_hub_id(item.path)
        gone = () if on_the_hub else ("not there any more",)
        return Origin(item.path, item.type, item.key, None, gone)
    inside = home(found)
    if inside.resolve() in above:  # a record that names itself, by hand or by a link: there is no more to tell
        return Origin(item.path, item.type, item.key, None, ("leads back to what was made from it",))
    try:
        record = read(inside)
    except ArtifactError as error:
        return Origin(item.path, item.type, item.key, None, (str(error),))
    if record is None:
        return Origin(item.path, item.type, item.key)
    faults = [*_gone(inside, record)]
    if item.digest and record.digest != item.digest:
        faults.append("made anew since: its content is not what was read")
    made_from = _inputs(record, inside, (*above, inside.resolve()))
    return Origin(item.path, record.type, item.key, record, faults, made_from)


def _found(named: str, place: Path) -> Path | None:
    """A path of a record. Relative ones counted from where the step ran: here, or a folder above the artifact."""
    path = Path(named).expanduser()
    candidates = [path] if path.is_absolute() else [path, *(parent / path for parent in place.resolve().parents)]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _gone(place: Path, record: Record) -> Sequence[str]:
    gone = missing_files(place, record)
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return [f"damaged: {gone[0]}{more} is missing or has another size"] if gone else []


def walk(origin: Origin) -> Iterator[Origin]:
    """An artifact and everything it was made from."""
    yield origin
    for part in origin.made_from:
        yield from walk(part)
