"""What this machine has to offer, asked of the kernel. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether there is a GPU that PyTorch might compute on."""
    return any((root / "dev").glob("nvidia[0-9]*"))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that a new process can have: what the kernel calls available, or less where a cgroup's limit leaves less.

    None where the kernel does not say (not Linux).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min([free, *_left(root)])


def own_bytes() -> int:
    """What this process has in memory now; 0 where the kernel does not say."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that this process has had in memory (VmHWM); 0 where the kernel does not say."""
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _left(root: Path) -> Iterator[int]:
    """What each cgroup of this process, and each above it, leaves of its limit."""
    for folder, limit, used, cached in _groups(root):
        try:
            most = (folder / limit).read_text().strip()
            if most == "max":
                continue
            now = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # The cache of files counts as used, but is given back when memory runs short.
        yield max(0, int(most) - now + int(stat.get(cached, 0)))


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The folder of each cgroup that may limit memory, and the names of limit, usage and reclaimable cache in it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":  # version 2
            top, names = base, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        # In a container the path may be one of the host's, of which only the top is to be seen.
        for above in (folder, *folder.parents):
            if above.is_relative_to(top):
                yield above, *names
