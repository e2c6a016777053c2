"""Scripts run here and behind a real ssh: what they write, how they end, and what a connection fails with."""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support.sshd import Sshd

from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.shell import Shell
from steps.errors import ExecutorError

HOSTILE = "a b'c\"d$(touch oops)`id`\\ \n é \x01"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An sshd of its own, where login scripts are what they are: one talks, and reads what is not its business."""
    if lack := Sshd.missing():
        pytest.skip(lack)
    home = tmp_path_factory.mktemp("home")
    chatter = home / "chatter"
    chatter.write_text('echo "Welcome!"; echo "quota 93%" >&2; cat >/dev/null\n')
    (home / ".bash_profile").write_text(f'echo "== files"; export FOUND=login; PATH={home}/slurm:$PATH\n')
    (home / ".bash_logout").write_text('echo "Bye!"\n')
    (home / "slurm").mkdir()
    (home / "slurm" / "squeue").write_text("#!/bin/sh\necho from the login shell\n")
    (home / "slurm" / "squeue").chmod(0o755)
    (home / "bare").mkdir()
    for program in ("bash", "sh", "head", "cat", "echo", "sleep", "kill", "touch", "wc"):
        (home / "bare" / program).symlink_to(f"/bin/{program}")
    env = {"HOME": str(home), "PATH": str(home / "bare"), "BASH_ENV": str(chatter)}
    with Sshd(env) as running:
        yield running


@pytest.fixture
def remote(server, tmp_path, monkeypatch) -> Shell:
    server.write_ssh(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return Shell(server.host, server.user, server.port, str(server.identity))


@pytest.fixture(params=["here", "there"])
def shell(request) -> Shell:
    shell: Shell = Shell() if request.param == "here" else request.getfixturevalue("remote")
    return shell


def test_what_a_script_reads_writes_and_ends_with(shell):
    data = bytes(range(256)) * 4000 + b"\n\n"
    result = shell.run("cat; echo bad >&2; exit 7", stdin=data)
    assert (result.stdout, result.stderr, result.returncode) == (data, "bad\n", 7)
    assert shell.run("printf 'no end'").stdout == b"no end"
    assert shell.run("").stdout == b""
    assert shell.run("exit 255").returncode == 255
    assert shell.run("kill -9 $BASHPID").returncode == 137


def test_a_script_is_no_command_line(shell):
    """It may be long, and nobody sees it in a list of processes."""
    quoted = shlex.quote(HOSTILE)
    assert shell.run(f"printf %s {quoted}").stdout.decode() == HOSTILE
    long = f"printf %s {shlex.quote('x' * 300_000)} | wc -c"
    assert shell.run(long).text.strip() == "300000"
    seen = shell.run(": very-secret; tr '\\0' ' ' </proc/$PPID/cmdline; cat /proc/self/cmdline /proc/$$/cmdline")
    assert "very-secret" not in seen.text


def test_a_script_that_must_succeed(shell):
    assert shell.ask("echo == one; echo a; echo; echo b; echo == two").sections == {"one": ["a", "b"], "two": []}
    with pytest.raises(ExecutorError, match="no such thing"):
        shell.ask("echo no such thing >&2; exit 1")


def test_too_long(shell):
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=r"no answer within 1 s"):
        shell.run("sleep 30", timeout=1)
    assert time.monotonic() - began < 25


def test_a_login_shell_only_where_slurm_is_not_found_without(remote):
    result = remote.run("squeue; echo $FOUND")
    assert result.text == "from the login shell\nlogin\n"
    assert "Bye" not in remote.run("exit 3").text


def test_one_connection_for_all(remote, server):
    remote.run("true")
    server.deafen()
    try:
        assert remote.run("echo still here").text == "still here\n"
    finally:
        server.listen()
    server.drop_connections()
    assert remote.run("echo again").text == "again\n", "a connection that broke is made anew"


def test_threads_that_begin_together_make_one_connection(remote, server, monkeypatch):
    """Or the user would be asked for a password by each."""

    def logins() -> int:
        return (server.directory / "log").read_text().count("Accepted publickey")

    server.drop_connections()
    monkeypatch.setattr("steps.dispatch.executors.slurm.shell._CONNECTED", set())  # as in a new process
    before = logins()
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda number: remote.run(f"echo {number}").text, range(4)))
    assert results == ["0\n", "1\n", "2\n", "3\n"]
    assert logins() == before + 1


@pytest.fixture
def runtime(monkeypatch):
    """A directory for sockets that nothing else uses; short, as their paths must be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


def test_a_directory_of_somebody_else_is_not_used(runtime):
    """A shared connection whose socket others can open is theirs too."""
    ours = runtime / f"steps-ssh-{os.getuid()}"
    assert f"ControlPath={ours}/%C" in Shell("host")._ssh()
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    ours.chmod(0o755)
    assert f"ControlPath={ours}/%C" not in Shell("host")._ssh()
    ours.rmdir()
    (runtime / "theirs").mkdir(mode=0o700)
    ours.symlink_to(runtime / "theirs")
    assert f"ControlPath={ours}/%C" not in Shell("host")._ssh()


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        ({"port": 1}, "Connection refused", "Check host and port"),
        ({"host": "no-such-host.invalid"}, "Could not resolve hostname", "network"),
        ({"user": "nobody-of-that-name"}, "Permission denied", "must log in"),
    ],
)
def test_what_ssh_fails_with_is_told_in_its_words(remote, change, words, hint):
    with pytest.raises(ExecutorError, match=f"cannot be reached: .*{words}.*{hint}"):
        replace(remote, **change).run("true")


def test_a_host_whose_key_is_not_known_is_not_trusted(remote, server, runtime):
    """The user's own ssh configuration decides, and nothing of ours loosens it."""
    assert not any("StrictHostKeyChecking" in part or "KnownHosts" in part for part in Shell("host")._ssh())
    known = server.known_hosts.read_text()
    server.known_hosts.write_text("")
    try:
        with pytest.raises(ExecutorError, match=r"Host key verification failed.*check the host's key: `ssh -l"):
            remote.run("true")
    finally:
        server.known_hosts.write_text(known)


def test_a_connection_that_breaks_is_no_result(remote, server):
    remote.run("true")
    cut = threading.Timer(1, server.drop_connections)
    cut.start()
    with pytest.raises(ExecutorError, match="cannot be reached"):
        remote.run("echo half; sleep 20")
    cut.join()


def test_a_tunnel_that_leads_nowhere():
    with pytest.raises(ExecutorError, match=r"run\.env\.host: tunnel ssh needs a host"):
        Shell.of(SlurmEnv(tunnel="ssh"))
    assert Shell.of(SlurmEnv(host="login", tunnel="local")) == Shell()
    assert str(Shell.of(SlurmEnv(tunnel="ssh", host="login", user="me"))) == "me@login"


def test_no_ssh_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExecutorError, match="there is no ssh on this machine"):
        Shell("host").run("true")


def test_names_that_look_like_options_are_names():
    """A host from a profile must not become an option of ssh that runs a command here."""
    with pytest.raises(ExecutorError):
        Shell("-oProxyCommand=touch /tmp/steps-was-here").run("true", timeout=20)
    assert not Path("/tmp/steps-was-here").exists()
