"""What a step tells the world, and how failures of the machine are put into words."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from steps.errors import ConfigError, StepFailed, understand
from steps.runtime.progress import Reporter, duration, short
from steps.runtime.sinks import sinks


def test_metrics_are_rows_of_json_without_nan(tmp_path):
    reporter = Reporter(tmp_path)
    reporter.metrics({"iteration": 1, "loss": 2.5})
    reporter.metrics({"iteration": 2, "loss": float("nan")})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"iteration": 1, "loss": 2.5}, {"iteration": 2, "loss": None}]


def test_progress_file_follows_a_task_and_the_last_line_is_printed(tmp_path, capsys):
    reporter = Reporter(tmp_path)
    with reporter.task("packing", total=4, unit="rows") as task:
        assert json.loads((tmp_path / "progress.json").read_text())["done"] == 0
        task.advance(3, loss=1.25)
        task.advance()
    state = json.loads((tmp_path / "progress.json").read_text())
    assert (state["task"], state["done"], state["total"], state["finished"]) == ("packing", 4, 4, True)
    assert capsys.readouterr().out.startswith("packing: 4/4 rows (100%), ")


def test_the_rate_leaves_out_what_an_earlier_run_did(tmp_path):
    task = Reporter(tmp_path).task("train", total=20, unit="steps", start=10)
    task.advance(2)
    assert task.line(4.0) == "train: 12/20 steps (60%), 0.5 steps/s, 16 s left"


def test_a_failed_task_is_not_told_as_done(tmp_path, capsys):
    with pytest.raises(RuntimeError), Reporter(tmp_path).task("packing", total=4):
        raise RuntimeError
    assert capsys.readouterr().out == ""


def test_other_processes_are_silent(tmp_path, capsys):
    reporter = Reporter(tmp_path, active=False)
    with reporter.task("x", 1) as task:
        task.advance()
    reporter.log("x")
    reporter.metrics({"iteration": 1})
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_stops_the_bar_not_the_work(tmp_path, capsys):
    (tmp_path / "progress.json").mkdir()
    reporter = Reporter(tmp_path)
    with reporter.task("x", 1) as task:
        task.advance()
    assert "progress is not shown" in capsys.readouterr().err


def test_short():
    assert [short(value) for value in (1, 1234.0, 0.012345, 123.456, 5.0)] == ["1", "1,234", "0.01235", "123.5", "5"]


def test_duration():
    told = {
        0.4: "0 s",
        45: "45 s",
        60: "1 min",
        200: "3 min 20 s",
        7_500: "2 h 5 min",
        7_205: "2 h",
        273_600: "3 d 4 h",
    }
    assert {seconds: duration(seconds) for seconds in told} == told


def test_a_step_without_anything_to_try_never_runs_for_a_probe(tmp_path):
    (tmp_path / "config.yaml").write_text("dataset_json: nowhere\noutput_dir: chat\n")
    command = [sys.executable, "-m", "steps.data_prep.demo_chat.step", "--config", "config.yaml", "--probe"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: data_prep/demo_chat cannot be probed: it has no part that could be tried by itself" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Logger:
        tensorboard_dir, wandb_project = str(tmp_path / "tb"), None

    (sink,) = sinks(Logger)
    sink.write({"iteration": 3, "loss": 2.5})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_a_missing_logger_package_is_named(monkeypatch):
    import sys

    class Logger:
        tensorboard_dir, wandb_project, wandb_exp_name = None, "mine", None

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"logger.wandb_project: the package wandb is not installed. pip install wandb"
    ):
        list(sinks(Logger))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), r"the disk is full \(/data/x\)"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: Permission denied"),
        (KeyError("x"), "KeyError: 'x'. Run again with --debug"),
    ],
)
def test_failures_of_the_machine_in_words(error, message):
    with pytest.raises(StepFailed, match=message):
        raise understand(error, debug=False)


def test_interruption_has_its_exit_code():
    assert understand(KeyboardInterrupt(), debug=False).exit_code == 130
