"""How much memory there is, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from steps import machine

GIB = 2**30


def kernel(root: Path, files: dict[str, str], cgroup: str) -> Path:
    files = {
        "proc/meminfo": "MemTotal:  16777216 kB\nMemFree:  1024 kB\nMemAvailable:  8388608 kB\n",
        "proc/self/cgroup": cgroup,
        **files,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 1\ninactive_file {cached}\n"
    return {f"{place}/memory.max": f"{limit}\n", f"{place}/memory.current": f"{used}\n", f"{place}/memory.stat": stat}


def version_1(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{place}/memory.limit_in_bytes": f"{limit}\n",
        f"{place}/memory.usage_in_bytes": f"{used}\n",
        f"{place}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cached}\n",
    }


@pytest.mark.parametrize(
    ("files", "cgroup", "expected"),
    [
        ({}, "0::/\n", 8 * GIB),
        (version_2("job", "max", GIB), "0::/job\n", 8 * GIB),
        (version_2("job", 4 * GIB, GIB), "0::/job\n", 3 * GIB),
        (version_2("job", 4 * GIB, 2 * GIB, GIB), "0::/job\n", 3 * GIB),  # the cache can go
        (version_2("job", 64 * GIB, GIB), "0::/job\n", 8 * GIB),  # more than there is
        (version_2("job", GIB, 2 * GIB), "0::/job\n", 0),
        ({**version_2("a", 4 * GIB, GIB), **version_2("a/b", 16 * GIB, 0)}, "0::/a/b\n", 3 * GIB),
        (version_2("", 2 * GIB, GIB), "0::/seen/only/outside\n", GIB),  # a container with the host's path
        (version_1("job", 4 * GIB, 2 * GIB, GIB), "9:cpu,memory:/job\n0::/\n", 3 * GIB),
        (version_1("job", 2**63 - 4096, GIB), "9:memory:/job\n", 8 * GIB),  # no limit
    ],
)
def test_the_least_of_what_the_kernel_and_each_cgroup_leave(tmp_path, files, cgroup, expected):
    assert machine.available_bytes(kernel(tmp_path, files, cgroup)) == expected


def test_a_kernel_that_does_not_say(tmp_path):
    assert machine.available_bytes(tmp_path) is None


def test_a_gpu_is_seen_by_its_device(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not machine.has_gpu(tmp_path)
    (tmp_path / "dev/nvidia0").touch()
    assert machine.has_gpu(tmp_path)


def test_this_machine_and_this_process():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    available = machine.available_bytes()
    assert available is not None
    assert 0 < available < total
    assert 0 < machine.own_bytes() <= machine.peak_bytes() < total
