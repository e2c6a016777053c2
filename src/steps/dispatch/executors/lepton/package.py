"""A job's files and our code as one command that makes them appear on a workspace's storage."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from steps.dispatch.package import sources

#: Linux takes no argument longer than 128 KiB.
_PART = 100_000
#: busybox has all of it. The last part decides: tar fails when the archive is not whole.
_UNPACK = 'd=$1; shift; mkdir -p "$d" && printf %s "$@" | base64 -d | tar -xzf - -C "$d"'


def unpack(files: Sequence[Path], destination: str) -> list[str]:
    """The command that unpacks `files`, and our package under code/, into `destination`."""
    text = base64.b64encode(archive(files)).decode()
    parts = [text[at : at + _PART] for at in range(0, len(text), _PART)]
    return ["sh", "-c", _UNPACK, "sh", destination, *parts]


def archive(files: Sequence[Path]) -> bytes:
    """A tar.gz of `files`, without their directories, and of the package `steps` as it is now under code/. No git.

    gzip, not xz: a fifth larger, and every tar reads it.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file in files:
            tar.add(file, file.name, filter=_anyones)
        for file, place in sources():
            tar.add(file, f"code/{place}", filter=_anyones)
    return buffer.getvalue()


def _anyones(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the owner here, who is nobody there."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
