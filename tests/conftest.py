"""Shared ground of all tests: one thread, no network, no user settings, and a word about what could not run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("STEPS_ENV_FILE", "NEMOTRON_ENV_FILE", "NEMORUN_HOME", "SLURM_CONF"):
    os.environ.pop(name, None)


def pytest_terminal_summary(terminalreporter):
    """The last lines of the run: nobody should believe in tests that never ran."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        reasons: dict[str, int] = {}
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reasons[reason.removeprefix("Skipped: ")] = reasons.get(reason.removeprefix("Skipped: "), 0) + 1
        terminalreporter.section("NOT RUN", red=True, bold=True)
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count} skipped: {reason}")
