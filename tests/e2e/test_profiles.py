"""`steps profiles`, as a user types it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support.steps import steps

from steps.dispatch.profiles import env_files

BARE = dict.fromkeys(("STEPS_ENV_FILE", "NEMOTRON_ENV_FILE", "SLURM_HOST", "HF_TOKEN", "WANDB_API_KEY"), "")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None):
    return steps("profiles", *arguments, cwd=cwd, env={**BARE, **(env or {})})


def on_a_terminal(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code of `steps ARGUMENTS` and what a terminal of 80 columns shows, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "steps", *arguments]
    with subprocess.Popen(
        command, cwd=cwd, env={**environment, **BARE, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while piece := os.read(ours, 65536):
                shown += piece
    os.close(ours)
    return process.returncode, re.sub(r"\x1b\[\d*m", "", shown.decode()).replace("\r\n", "\n")


def test_list_is_not_cut_in_a_pipe_and_says_the_same_as_json(project):
    (project / "env.toml").write_text(
        '[wandb]\nproject = "p"\n'
        '[mine]\nextends = "slurm_peft_megatron_bridge"\ndescription = "' + "long " * 30 + 'end"\n'
        '[broken]\nextends = "nowhere"\n'
    )
    done = run("list", cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["NAME", "EXECUTOR", "EXTENDS", "FILE", "WHAT"]
    assert lines[0].split()[:4] == ["mine", "slurm", "slurm_peft_megatron_bridge", "env.toml"]
    assert lines[0].endswith("long end")
    assert lines[1].split()[:4] == ["broken", "-", "nowhere", "env.toml"]
    assert "broken: env.toml [broken]: extends 'nowhere', which is no profile" in lines[1]
    rows = json.loads(run("list", "--json", cwd=project).stdout)
    assert [row["name"] for row in rows] == [line.split()[0] for line in lines]
    assert "wandb" not in [row["name"] for row in rows]
    assert {"local", "slurm_peft_megatron_bridge", "lepton_peft_megatron_bridge"} <= {row["name"] for row in rows}
    assert [row["name"] for row in rows if row["problem"]] == ["broken"]


def test_list_and_help_fit_a_terminal_of_80_columns(project):
    (project / "env.toml").write_text('[mine]\nextends = "slurm_peft_megatron_bridge"\n')
    code, text = on_a_terminal("profiles", "list", cwd=project)
    header, mine, *others = text.splitlines()
    assert (code, header.split(), mine.split()) == (
        0,
        ["NAME", "EXECUTOR", "WHAT"],
        ["mine", "slurm", "extends", "slurm_peft_megatron_bridge"],
    )
    assert max(map(len, others)) <= 80
    code, text = on_a_terminal("profiles", "--help", cwd=project)
    assert (code, "..." in text.partition("Commands:")[2]) == (0, False)


def test_show_tells_where_each_value_stands_without_any_variable_set(project):
    (project / "env.toml").write_text("""
[mine]
extends = "slurm_defaults"
account = "team"
env_vars = {HF_TOKEN = "${oc.env:HF_TOKEN}", API_KEY = "written-in-the-file", KEY = "${oc.env:K,in-the-default}"}
""")
    done = run("show", "mine", cwd=project)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^account: team +# env.toml \[mine\]$", done.stdout, re.MULTILINE)
    assert re.search(r"^  HF_TOKEN: \$\{oc.env:HF_TOKEN\} +# env.toml \[mine\]$", done.stdout, re.MULTILINE)
    assert re.search(r"^gpus_per_node: 8 +# profiles/slurm.toml \[slurm_defaults\]$", done.stdout, re.MULTILINE)
    data = json.loads(run("show", "mine", "--json", cwd=project).stdout)
    assert data["chain"] == ["env.toml [mine]", "profiles/slurm.toml [slurm_defaults]"]
    assert data["sources"]["account"] == "env.toml [mine]"
    for text in (done.stdout, json.dumps(data)):
        assert "written-in-the-file" not in text
        assert "in-the-default" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("show", "slurm_pfet_megatron_bridge"), 5, "Did you mean slurm_peft_megatron_bridge?"),
        (("show", "local", "--env-file", "no.toml"), 5, "error: --env-file names no.toml, which is not there"),
        (("show", "local", "--env-file", "n" * 300), 5, "which cannot be reached: File name too long"),
        (("list", "--env-file", "broken.toml"), 5, "error: broken.toml:1:"),
        (("check",), 2, "wants the name of a profile. There are: "),
        (("show",), 2, "wants the name of a profile. There are: "),
        (("init", "slrum"), 2, "error: there is no starter for 'slrum'. Did you mean slurm?"),
        (("init", "slurm", "broken.toml"), 2, "error: broken.toml is there already, and stays as it is"),
        (("init", "slurm", "no/where.toml"), 1, "error: no/where.toml cannot be written: No such file or directory"),
    ],
)
def test_errors_are_one_line_on_stderr(project, arguments, code, message):
    (project / "broken.toml").write_text("this is no TOML")
    done = run(*arguments, cwd=project)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (project / "broken.toml").read_text() == "this is no TOML"


@pytest.mark.parametrize("kind", ["slurm", "lepton"])
def test_init_writes_a_file_that_the_next_commands_read(project, kind):
    done = run("init", kind, cwd=project)
    assert done.returncode == 0, done.stderr
    written = (project / "env.toml").read_text()
    assert written == (env_files.SHIPPED / "starters" / f"{kind}.toml").read_text()
    again = run("init", kind, cwd=project)
    assert again.returncode == 2
    assert (project / "env.toml").read_text() == written
    check, plan = [line.strip() for line in done.stdout.splitlines() if line.startswith("  steps ")]
    # What it says to do next: the check names every value that is still to be filled in …
    checked = steps(*check.split()[1:], cwd=project, env=BARE)
    assert checked.returncode == 5
    blanks = re.findall(r'^(?!#).*"(<[^<>]+>)"', written, re.MULTILINE)
    assert [blank for blank in blanks if f"{blank} is still to be filled in" in checked.stderr] == blanks
    assert len(checked.stderr.splitlines()) == len(blanks)
    # … and when they are, the dry run plans with them.
    (project / "env.toml").write_text(
        re.sub(r"<(directory)?[^<>]*>", lambda m: "/shared" if m[1] else "filled", written)
    )
    planned = steps(*plan.split()[1:], cwd=project, env=BARE)
    assert planned.returncode == 0, planned.stderr
    assert re.search(rf"filled +# env.toml \[{kind}_base\]$", planned.stdout, re.MULTILINE)


def test_init_elsewhere_names_the_file_in_the_next_commands(project):
    done = run("init", "slurm", "a b.toml", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "steps profiles check slurm_peft_megatron_bridge --env-file 'a b.toml'" in done.stdout
    (project / "folder").mkdir()
    assert run("init", "lepton", "folder", cwd=project).returncode == 0
    assert (project / "folder" / "env.toml").is_file()


def test_check_says_ready_or_what_is_missing(project):
    (project / "env.toml").write_text("""
[fine]
executor = "local"
env_vars = {A = "${oc.env:SOME_VARIABLE}"}
[wrong]
extends = "fine"
gpus_per_node = "${oc.env:OTHER_VARIABLE}"
[late]
executor = "local"
nodes = "${oc.env:SOME_VARIABLE}"
[two]
executor = "local"
nodes = 2
""")
    done = run("check", "fine", cwd=project, env={"SOME_VARIABLE": "1"})
    assert (done.returncode, done.stdout) == (0, "fine is ready\n")
    done = run("check", "wrong", cwd=project)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.splitlines() == [
        f"error: run.env.{key}: the variable {name} is not set (from env.toml [{table}]). "
        f"export {name}=…, or give it a default where it is written: ${{oc.env:{name},…}}"
        for key, name, table in [
            ("env_vars.A", "SOME_VARIABLE", "fine"),
            ("gpus_per_node", "OTHER_VARIABLE", "wrong"),
        ]
    ]
    done = run("check", "late", cwd=project, env={"SOME_VARIABLE": "two"})
    assert done.returncode == 5
    assert "run.env.nodes: 'two' is not an integer (from env.toml [late])" in done.stderr
    done = run("check", "two", cwd=project)
    assert done.stderr.startswith("error: run.env.nodes: this machine is one node (from env.toml [two])")


def test_a_broken_file_never_breaks_a_run_on_this_machine(project):
    (project / "env.toml").write_text("this is no TOML")
    arguments = ("run", "data_prep/sft_packing", "-c", "tiny", "--dry-run", "--json")
    plain = steps(*arguments, cwd=project, env={**BARE, "STEPS_ENV_FILE": "nowhere.toml"})
    assert json.loads(plain.stdout)["steps"][0]["profile"] == "local", plain.stderr
    named = steps(*arguments, "-r", "local", cwd=project, env=BARE)
    assert named.returncode == 5
    assert "env.toml:1:" in named.stderr + named.stdout


def test_nothing_is_left_in_the_directory(project):
    for arguments in (("list",), ("show", "local"), ("check", "local")):
        assert run(*arguments, cwd=project).returncode == 0
    assert os.listdir(project) == ["pyproject.toml"]
