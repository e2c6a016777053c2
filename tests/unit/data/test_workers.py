"""Worker processes: results of every task, failures told, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steps.engine.data.workers import Pool
from steps.errors import StepFailed


class Square:
    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __call__(self, number: int) -> int:
        if number == self.bad == 3:
            raise StepFailed("three", hint="not three", name="three")
        if number == self.bad == 4:
            raise KeyError("four")
        if number == self.bad == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        return number * number


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [1, 2])
def test_every_task_is_done_once(number):
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    with Pool(number, Square, -1) as pool:
        assert sorted(pool.run(range(20))) == [n * n for n in range(20)]
        assert list(pool.run([])) == []
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


@pytest.mark.parametrize(("bad", "text", "name"), [(3, "three", "three"), (4, "KeyError: 'four'", ""), (5, "-9", "")])
def test_a_failure_reaches_the_parent_and_ends_all_workers(bad, text, name):
    with Pool(2, Square, bad) as pool:
        pids = [process.pid for process in pool._workers.values()]
        with pytest.raises(StepFailed, match=text) as caught:
            list(pool.run(range(20)))
    assert caught.value.name == name
    assert not any(map(alive, pids))


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\nfrom steps.engine.data.workers import Pool\n"
        "class Slow:\n    def __call__(self, n):\n        return n\n"
        "if __name__ == '__main__':\n"
        "    with Pool(2, Slow) as pool:\n"
        "        list(pool.run(range(4)))\n"
        "        print(*[process.pid for process in pool._workers.values()], flush=True)\n"
        "        time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not any(map(alive, pids)):
            return
        time.sleep(0.1)
    pytest.fail("a worker outlived its parent")
