"""A shell where Slurm's commands are: bash on this machine, or behind the user's own `ssh`.

Nothing of a script ever stands in a command line: it travels over stdin, as what it reads does. What comes back is
framed, so that the chatter of login scripts is cut off and a connection that broke is told from a script that failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.errors import ExecutorError, Problem

#: ssh gives up on a host that does not answer, and on a connection that has gone dead, after about this long.
_CONNECT_SECONDS = 15
_PERSIST_SECONDS = 300
#: What somebody is given to type a password or a second factor.
_LOGIN_SECONDS = 120
#: A unix socket's path has at most 104 bytes (macOS); ssh appends a 40 character hash and 17 more while it makes one.
_LONGEST_SOCKET_DIRECTORY = 104 - 58


@dataclass(frozen=True)
class Result:
    """What a script wrote and how it ended; `returncode` is its own."""

    stdout: bytes
    stderr: str
    returncode: int

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def sections(self) -> dict[str, list[str]]:
        """The lines that are not empty under each `== NAME` line."""
        result: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in filter(None, self.text.splitlines()):
            if line.startswith("== "):
                lines = result.setdefault(line[3:], [])
            else:
                lines.append(line)
        return result


@dataclass(frozen=True)
class Shell:
    """Runs scripts on one machine. host: '' for this one. Equal shells reach the same machine in the same way."""

    host: str = ""
    user: str = ""
    port: int = 0
    identity: str = ""

    @classmethod
    def of(cls, env: SlurmEnv) -> Shell:
        """The shell that a profile describes. Raises ExecutorError for a tunnel that leads nowhere."""
        if env.tunnel == "local":
            return cls()
        if not env.host:
            hint = "Set host to the cluster's login node, or tunnel to local where sbatch runs here."
            raise ExecutorError(Problem(where="run.env.host", what="tunnel ssh needs a host", hint=hint))
        return cls(env.host, env.user or "", env.port or 0, env.identity or "")

    @property
    def here(self) -> bool:
        """Whether scripts run on this machine."""
        return not self.host

    def __str__(self) -> str:
        return (f"{self.user}@{self.host}" if self.user else self.host) or "this machine"

    def run(self, script: str, *, stdin: bytes = b"", timeout: float = 60) -> Result:
        """Run a bash script to its end; it finds `stdin` on its standard input.

        Raises ExecutorError, with ssh's own words, when it could not be run to its end, and after `timeout` seconds.
        """
        if self.here or self in _CONNECTED:
            return self._run(script, stdin, timeout)
        # Threads that begin together must not each make a connection: the user would be asked as often.
        with _CONNECTING:
            result = self._run(script, stdin, timeout + (_LOGIN_SECONDS if somebody_is_there() else 0))
            _CONNECTED.add(self)
            return result

    def _run(self, script: str, stdin: bytes, timeout: float) -> Result:
        mark = secrets.token_hex(8)
        text = script.encode()
        command = _wrapped(mark, len(text), self.here)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            # Files, not pipes: a shared connection that stays in the background may keep them open.
            try:
                process = subprocess.Popen(
                    ["sh", "-c", command] if self.here else [*self._ssh(), command],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=err,
                    start_new_session=self.here,  # ssh may have to ask for a password on the terminal
                )
            except FileNotFoundError as error:
                hint = "Install OpenSSH's client, or use tunnel: local on a login node."
                raise ExecutorError("there is no ssh on this machine", hint=hint) from error
            assert process.stdin is not None
            threading.Thread(target=_feed, args=(process.stdin, text + stdin), daemon=True).start()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                _end(process, group=self.here)
                hint = "Try again; if it stays so, ask the cluster's people."
                raise ExecutorError(f"{self}: no answer within {timeout:g} s", hint=hint) from None
            except BaseException:
                _end(process, group=self.here)
                raise
            out.seek(0)
            err.seek(0)
            written, complaints = out.read(), err.read().decode(errors="replace")
        return self._unwrap(mark, written, complaints, process.returncode)

    def ask(self, script: str, *, timeout: float = 60) -> Result:
        """The result of a script that has no reason to fail. Raises ExecutorError, with its words, when it does."""
        result = self.run(script, timeout=timeout)
        if result.returncode:
            raise ExecutorError(f"{self}: {result.stderr.strip() or f'status {result.returncode}'}")
        return result

    def _unwrap(self, mark: str, written: bytes, complaints: str, returncode: int) -> Result:
        _, began, rest = written.partition(f"{mark}\n".encode())
        ended = re.search(rf"\n{mark} (\d+)\n".encode(), rest[-(len(mark) + 8) :])
        if not began or not ended:
            raise self._broken(complaints.replace(f"{mark}\n", ""), returncode)
        output = rest[: len(rest) - len(ended[0])]
        return Result(output, complaints.partition(f"{mark}\n")[2], int(ended[1]))

    def _broken(self, complaints: str, returncode: int) -> ExecutorError:
        _CONNECTED.discard(self)
        lines = [line.strip() for line in complaints.splitlines() if line.strip()]
        words = "; ".join(lines[-3:]) or f"status {returncode}"
        if self.here:
            return ExecutorError(f"a shell on this machine ended early: {words}")
        return ExecutorError(f"{self} cannot be reached: {words}", hint=self._hint(complaints))

    def _hint(self, complaints: str) -> str:
        by_hand = " ".join(["ssh", *self.address()])
        for words, hint in (
            ("Could not resolve", "Check host in the profile, and the network (VPN?)."),
            ("IDENTIFICATION HAS CHANGED", f"Somebody may be listening in, or it was set up anew: see `{by_hand}`."),
            ("Host key verification failed", f"Log in once by hand and check the host's key: `{by_hand}`."),
            ("Permission denied", f"`{by_hand}` must log in: check user and identity, or load your key (ssh-add)."),
            ("Connection refused", "Check host and port in the profile."),
            ("timed out", "Check host and port in the profile, and the network (VPN?)."),
            ("bash: not found", "steps needs bash on the login node."),
        ):
            if words in complaints:
                return hint
        return f"See whether `{by_hand}` works."

    def address(self) -> list[str]:
        """What stands behind `ssh` on a command line that leads there."""
        user = ["-l", self.user] if self.user else []
        port = ["-p", str(self.port)] if self.port else []
        identity = ["-i", os.fspath(Path(self.identity).expanduser())] if self.identity else []
        return [*user, *port, *identity, "--", self.host]

    def _ssh(self) -> list[str]:
        """The command that a remote command line is appended to. Everything else is as the user's ssh config has it."""
        options = {
            "ConnectTimeout": _CONNECT_SECONDS,
            "ServerAliveInterval": _CONNECT_SECONDS // 3,
            "ServerAliveCountMax": 3,
            "RemoteCommand": "none",
            "ClearAllForwardings": "yes",
        }
        if not somebody_is_there():
            options["BatchMode"] = "yes"
        if sockets := _socket_directory():
            # A second factor is asked for once; and a new connection for each question would be slow.
            options |= {
                "ControlMaster": "auto",
                "ControlPath": f"{sockets}/%C",
                "ControlPersist": _PERSIST_SECONDS,
            }
        flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        return ["ssh", "-T", *flags, *self.address()]


#: Shells whose shared connection should be there.
_CONNECTED: set[Shell] = set()
_CONNECTING = threading.Lock()


def somebody_is_there() -> bool:
    """Whether ssh can ask for a password."""
    return bool(sys.stdin) and sys.stdin.isatty()


def _wrapped(mark: str, size: int, here: bool) -> str:
    """A command line for any login shell: it reads `size` bytes of script from stdin, and runs them in bash.

    A login shell is started only where Slurm is not found without one: some take seconds. Scripts that run at login
    get no stdin, and what they print stands before the mark. The script runs in a subshell, so that its `exit` neither
    skips the last mark nor runs what a user wants done at logout.
    """
    run = (
        f'exec 0<&3 3<&-; script=$(head -c {size}; echo x); printf "%s\\n" {mark}; printf "%s\\n" {mark} >&2; '
        f'(eval "${{script%x}}"); printf "\\n%s %s\\n" {mark} $?'
    )
    run = shlex.quote(run)
    plain, login = f"exec bash -c {run} 3<&0 </dev/null", f"exec bash -lc {run} 3<&0 </dev/null"
    if here:
        return plain
    return "exec sh -c " + shlex.quote(f"command -v squeue >/dev/null 2>&1 && {plain}; {login}")


def _feed(stream: IO[bytes], data: bytes) -> None:
    """Write everything; whoever reads may have gone."""
    with contextlib.suppress(BrokenPipeError):
        stream.write(data)
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def _end(process: subprocess.Popen[bytes], *, group: bool) -> None:
    """Kill a command, here with everything it started."""
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _socket_directory() -> Path | None:
    """A directory of the user's own for shared connections; None where there can be none."""
    name = f"steps-ssh-{os.getuid()}"
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp"):  # noqa: S108 (checked below to be ours alone)
        directory = Path(parent or "/nowhere") / name
        if len(os.fspath(directory)) > _LONGEST_SOCKET_DIRECTORY:
            continue
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            found = directory.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700:
            return directory
    return None
