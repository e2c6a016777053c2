"""What a step.py stands on: its configuration, its checked inputs, a place to report to and a way to publish.

def run(job: Job[Config]) -> None:
    with job.produce("output_dir") as out:
        out.facts["rows"] = write_rows(out.path, job.config, job.progress)
    job.summary(rows=out.facts["rows"])

if __name__ == "__main__":
    runtime.main(run)
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from steps import __version__, preflight
from steps.artifacts import record
from steps.artifacts.opening import Artifact
from steps.config import yaml12
from steps.config.base import StepConfig
from steps.config.validate import as_written, validate_adopted
from steps.errors import Interrupted, StepsError, UsageError, understand
from steps.manifest import Manifest
from steps.manifest import read as read_manifest
from steps.runtime.progress import Reporter
from steps.runtime.sinks import sinks

# Decided here because it must be before torch loads OpenMP. Threads that spin for long while they wait for each other
# are ruin where anything else runs; threads that sleep at once are slow where nothing does. Training on two cores,
# tokens/s alone and beside two busy processes: spinning (OpenMP's default) 360 and below 30; 10,000 turns 405 and 77;
# 1,000 turns 362 and 178; sleeping at once 283 and 198. A user's own choice wins.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

C = TypeVar("C", bound=StepConfig)

SUMMARY = "summary.json"
#: Set by whoever draws bars from progress.json, so that lines do not repeat them.
WATCHED = "STEPS_WATCHED"


@dataclass
class Output:
    """An artifact being written: fill `path` with files and `facts` with what later steps must agree with."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job(Generic[C]):
    """One running step.

    inputs:    the opened artifacts, by config key.
    directory: where the job's own files go (metrics.jsonl, …), never an artifact.
    probe:     measure a little of the work and tell that in the summary, instead of doing it; write no artifact.
    """

    config: C
    resolved: Mapping[str, Any]
    manifest: Manifest
    inputs: Mapping[str, Artifact]
    progress: Reporter
    directory: Path
    passthrough: tuple[str, ...] = ()
    probe: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints (rank 0)."""
        return _is_main()

    def record(self, key: str) -> record.Record:
        """A new record for the artifact at config key `key`, with everything known before the work starts."""
        port = next(port for port in self.manifest.produces if port.key == key)
        return record.Record(
            type=port.type,
            producer={"step": self.manifest.id, "job": self.directory.name, "code_version": __version__},
            config_digest=record.digest_config(self.resolved),
            inputs=[
                record.Input(name, str(item.path or item.value), item.type, item.record.digest if item.record else "")
                for name, item in self.inputs.items()
            ],
        )

    @contextmanager
    def produce(self, key: str, *, keep_partial: bool = False) -> Iterator[Output]:
        """Write the artifact that config key `key` places. See `artifacts.record.publish`."""
        destination, new = Path(preflight.lookup(self.config, key)).expanduser(), self.record(key)
        with record.publish(destination, new, keep_partial=keep_partial) as partial:
            output = Output(partial, new.facts)
            yield output
        self.progress.log(f"{new.type} written to {destination}")

    def summary(self, **values: Any) -> None:
        """What the person who started the run wants to read at its end. Later calls add to earlier ones."""
        if self.is_main:
            path = self.directory / SUMMARY
            known = json.loads(path.read_text()) if path.exists() else {}
            record.write_text(path, json.dumps({**known, **values}, default=str))


def main(run: Callable[[Job[Any]], None]) -> NoReturn:
    """Run a step: `python -m steps.<category>.<step>.step --config FILE [--probe] [--debug] [-- PASSTHROUGH…]`.

    Ends the process: 0, or the exit code of the failure, told in one message (`--debug` adds the traceback).
    """
    arguments = sys.argv[1:]
    own, passthrough = _split(arguments)
    debug, probe = "--debug" in own, "--probe" in own
    own = [argument for argument in own if argument not in ("--debug", "--probe")]
    manifest: Manifest | None = None
    try:
        folder = Path(sys.modules[run.__module__].__file__ or "").resolve().parent
        manifest = read_manifest(folder, folder.parents[1])
        if len(own) != 2 or own[0] != "--config":
            raise SystemExit(f"usage: python -m {manifest.module} --config FILE [--probe] [--debug] [-- PASSTHROUGH…]")
        _prepare_signals()
        job = _open(manifest, Path(own[1]), tuple(passthrough), probe=probe)
        try:
            run(job)
        finally:
            job.progress.close()
    except BaseException as error:
        code = _tell(error, manifest, debug)
        sys.stdout.flush()
        sys.stderr.flush()
        # A hung thread or worker pool must not keep a failed job alive.
        os._exit(code) if code else sys.exit(0)
    sys.exit(0)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" in arguments:
        at = arguments.index("--")
        return arguments[:at], arguments[at + 1 :]
    return arguments, []


def _open(manifest: Manifest, path: Path, passthrough: tuple[str, ...], *, probe: bool = False) -> Job[Any]:
    if passthrough and not manifest.run.passthrough:
        raise UsageError(f"{manifest.id} takes no arguments behind --, got {' '.join(passthrough)!r}")
    cls = importlib.import_module(manifest.schema_module).Config
    data, lines = yaml12.load(path)
    if preflight.lookup(data, "run.env.executor") is not None:
        data["run"]["env"]["executor"] = "local"  # whoever brought the job here: it is here now
    sources = {key: f"{path.name}:{line}" for key, line in lines.items()}
    # The dispatcher writes the step's own keys; a file that is handed straight to the step may hold others.
    adopted = cls.adopt(data, sources)
    config, _ = validate_adopted(cls, adopted)
    if probe and (why := config.unprobed()):
        raise UsageError(f"{manifest.id} cannot be probed: {why}")
    findings = preflight.check(manifest, config, adopted.sources)
    replace(findings, problems=tuple(as_written(adopted, findings.problems))).raise_if_any()
    directory = path.parent if (path.parent / "job.yaml").exists() else Path.cwd()
    active = _is_main()
    reporter = Reporter(
        directory,
        lines=WATCHED not in os.environ,
        active=active,
        sinks=sinks(getattr(config, "logger", None)) if active and not probe else (),
    )
    for message in [*adopted.notes, *(f"warning: {warning}" for warning in findings.warnings)]:
        reporter.log(message)
    return Job(config, adopted.data, manifest, findings.inputs, reporter, directory, passthrough, probe)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _prepare_signals() -> None:
    def stop(number: int, _: object) -> NoReturn:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _tell(error: BaseException, manifest: Manifest | None, debug: bool) -> int:
    """Print a failure as a person wants to read it; return its exit code."""
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 2
        return int(error.code or 0)
    if debug:
        traceback.print_exception(error)
    if not isinstance(error, StepsError):
        error = understand(error, debug)
    if _first_to_tell():
        for problem in error.problems:
            print(f"error: {manifest.explain(problem) if manifest else problem}", file=sys.stderr)
    return error.exit_code


def _told_in() -> Path:
    """The job's directory, which all its processes see, or else where temporary files go."""
    config = next(
        (Path(value) for name, value in zip(sys.argv, sys.argv[1:], strict=False) if name == "--config"), None
    )
    return config.parent if config and (config.parent / "job.yaml").exists() else Path(tempfile.gettempdir())


def _first_to_tell() -> bool:
    """Whether this process tells the failure: of several that fail for the same reason, the first one does."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return True
    try:
        (_told_in() / f".told-{run}-{os.environ.get('MASTER_PORT')}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
