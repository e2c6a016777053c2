"""Killed at any moment, the same command ends with the same bytes; with another template it starts afresh."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.chat import CHATML, CHATML_GENERATION, say
from support.packing_runs import configure, digests, pack, report

from steps.artifacts import record
from steps.config import yaml12

SPLITS = {"train_ratio": 0.8, "valid_ratio": 0.1, "test_ratio": 0.1, "num_shards": 2}
WORK = ".packed.partial/.work"


def rows(number=4000):
    draw = np.random.RandomState(7)
    return [{"messages": say(*("fox " * size for size in draw.randint(1, 9, 4)))} for _ in range(number)]


def start(cwd: Path, config) -> subprocess.Popen:
    (cwd / "killed.yaml").write_text(yaml12.dump(config))
    command = [sys.executable, "-m", "steps.data_prep.sft_packing.step", "--config", str(cwd / "killed.yaml")]
    # A session of its own: the kill below must reach this process alone, its workers have to notice by themselves.
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def kill_when(process: subprocess.Popen, moment) -> bool:
    """Kill -9 as soon as `moment()` is true; False when the process ended before."""
    while process.poll() is None:
        if moment():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def chunks(cwd: Path) -> int:
    return len(list((cwd / WORK).glob("chunk-*.npz")))


def no_process_is_left(cwd: Path) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cwd").readlink() == cwd and "killed.yaml" in (folder / "cmdline").read_text():
                return False
        except OSError:
            continue
    return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("undisturbed")
    pack(cwd, configure(cwd, rows(), **SPLITS))
    return digests(cwd)


@pytest.fixture(scope="module")
def seconds(tmp_path_factory):
    """How long an undisturbed run takes."""
    cwd = tmp_path_factory.mktemp("timed")
    began = time.monotonic()
    pack(cwd, configure(cwd, rows(), **SPLITS))
    return time.monotonic() - began


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_between_chunks(tmp_path, undisturbed, workers):
    config = configure(tmp_path, rows(), num_workers=workers, **SPLITS)
    done = 0
    for wanted in (1, 3, 5):
        assert kill_when(start(tmp_path, config), lambda: chunks(tmp_path) >= wanted)  # noqa: B023
        assert chunks(tmp_path) >= max(wanted, done)  # what was done stays done
        done = chunks(tmp_path)
        assert not (tmp_path / "packed").exists()
    assert "going on with the work of an interrupted run" in pack(tmp_path, config).stdout
    assert digests(tmp_path) == undisturbed
    assert no_process_is_left(tmp_path)
    assert not (tmp_path / ".packed.partial").exists()


def test_killed_while_the_packs_are_written(tmp_path, undisturbed):
    config = configure(tmp_path, rows(), **SPLITS)
    splits = tmp_path / ".packed.partial/splits"
    assert kill_when(start(tmp_path, config), splits.exists)
    assert not (tmp_path / "packed").exists()
    (tmp_path / ".packed.partial/.report.json.77.tmp").write_text("{")  # as if the kill had come a little later
    assert "going on with the work of an interrupted run" in pack(tmp_path, config).stdout
    assert digests(tmp_path) == undisturbed


@pytest.mark.parametrize("name", [".report.json.77.tmp", ".artifact.json.77.tmp", "splits/train/.x.parquet.77.tmp"])
def test_killed_over_its_last_small_files(tmp_path, name):
    """All packs are written and a file beside them is half written: nothing of that file is published."""
    config = configure(tmp_path, rows(200), **SPLITS)
    pack(tmp_path, config)
    whole, digest = digests(tmp_path), record.read(tmp_path / "packed").digest
    (tmp_path / "packed").rename(tmp_path / ".packed.partial")
    (tmp_path / ".packed.partial" / name).write_text("{")
    pack(tmp_path, config)
    assert digests(tmp_path) == whole
    assert record.read(tmp_path / "packed").digest == digest


def test_killed_at_random_moments(tmp_path, undisturbed, seconds):
    seed = random.SystemRandom().randrange(1 << 32)
    draw = random.Random(seed)
    print(f"moments drawn with seed {seed}")
    config = configure(tmp_path, rows(), **SPLITS)
    killed = 0
    for _ in range(5):
        until = time.monotonic() + draw.uniform(0.4, 1.0) * seconds
        killed += kill_when(start(tmp_path, config), lambda: time.monotonic() > until)  # noqa: B023
    assert killed
    pack(tmp_path, config)
    assert digests(tmp_path) == undisturbed


def test_a_template_edited_in_between_never_mixes(tmp_path, undisturbed):
    config = configure(tmp_path, rows(), **SPLITS)
    assert kill_when(start(tmp_path, config), lambda: chunks(tmp_path) >= 3)
    edited = CHATML.replace("'<|im_end|>", "' .<|im_end|>")
    assert edited != CHATML
    (tmp_path / "tokenizer/chat_template.jinja").write_text(edited)
    assert "thrown away" in pack(tmp_path, config).stdout
    mixed = digests(tmp_path)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    pack(fresh, configure(fresh, rows(), edited, **SPLITS))
    assert {name: digest for name, digest in mixed.items() if name.endswith(".parquet")} == {
        name: digest for name, digest in digests(fresh).items() if name.endswith(".parquet")
    }
    assert mixed != undisturbed


@pytest.mark.parametrize("change", ["data", "seed", "tokenizer"])
def test_other_data_or_settings_start_afresh(tmp_path, change):
    config = configure(tmp_path, [*rows(600), b"{broken"], max_drop_ratio=0.0)
    pack(tmp_path, config, expect=1)
    assert chunks(tmp_path) == 2
    if change == "data":
        config = configure(tmp_path, rows(600), max_drop_ratio=0.0)
    elif change == "seed":
        config = {**config, "seed": 43, "max_drop_ratio": 1.0}
    else:
        path = tmp_path / "tokenizer/tokenizer.json"
        path.write_text(path.read_text().replace('"<|endoftext|>"', '"<|nothing|>"'))
        config = {**config, "max_drop_ratio": 1.0}
    assert "thrown away" in pack(tmp_path, config).stdout
    assert report(tmp_path)["rows"]["kept"] == 600


def test_the_same_text_on_another_day(tmp_path):
    """A template that writes the date: a run that goes on keeps the date it began with."""
    template = CHATML_GENERATION.replace("{% for", "{{ strftime_now('%H:%M:%S') }}{% for", 1)
    config = configure(tmp_path, rows(1500), template, pack_size=128)
    assert kill_when(start(tmp_path, config), lambda: chunks(tmp_path) >= 1)
    time.sleep(1.1)
    pack(tmp_path, config)
    from support.chat import small_tokenizer
    from support.packing_runs import documents

    clocks = {small_tokenizer().decode(ids).partition("<")[0] for ids, _ in documents(tmp_path)}
    assert len(clocks) == 1


def test_a_second_run_beside_the_first_is_refused(tmp_path):
    config = configure(tmp_path, rows())
    first = start(tmp_path, config)
    try:
        while chunks(tmp_path) < 1:
            assert first.poll() is None
            time.sleep(0.005)
        assert "another run is writing" in pack(tmp_path, config, expect=1).stderr
    finally:
        first.kill()
        first.wait()


MEASURE = """
from pathlib import Path
from steps.engine.data import blend, reading, sft
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.data.tokenizing import Settings
from steps.engine.progress import SILENT
out = Path("out")
out.mkdir()
files = reading.examine(blend.resolve("chat.jsonl"))
plan = sft.Plan(Tokenizer.load("tokenizer"), files, Settings(pack_size=2048))
report = sft.pack_conversations(out, plan, SILENT)
status = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")), report["rows"]["kept"])
"""


def peak_of_packing(cwd: Path, number: int) -> tuple[float, float]:
    """(MB of text, MB at the peak) of a process of its own that packs `number` conversations."""
    cwd.mkdir()
    configure(cwd, ({"messages": say("a lazy dog " * 60, "the quick brown fox " * 40)} for _ in range(number)))
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=cwd, capture_output=True, text=True, check=True)
    peak, kept = map(int, done.stdout.split())
    assert kept == number
    return (cwd / "chat.jsonl").stat().st_size / 2**20, peak / 2**10


def test_four_times_the_text_takes_no_more_memory(tmp_path):
    (text, peak), (more, higher) = (peak_of_packing(tmp_path / str(n), n) for n in (4_000, 16_000))
    assert more - text > 16
    assert higher - peak < (more - text) / 4, (peak, higher)


@pytest.mark.slow
def test_memory_does_not_grow_with_much_text(tmp_path):
    (text, peak), (more, higher) = (peak_of_packing(tmp_path / str(n), n) for n in (3_000, 60_000))
    assert more - text > 80
    assert higher - peak < 20, (peak, higher)
