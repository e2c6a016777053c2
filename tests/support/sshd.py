"""A real, private sshd on loopback, with keys of its own: the other end of a tunnel, on this machine.

The user's ~/.ssh is neither read nor written. OpenSSH's client takes that directory from the password file, whatever
HOME says, so a program that starts `ssh` or `rsync` by itself is steered by a PATH with write_ssh()'s directory in it.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from support.processes import Guard, children_of, kill, members_of, stop_process

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class SshdError(RuntimeError):
    """The private sshd did not come up; the message ends with its last lines."""


class Sshd:
    """One sshd for the current user, root or not; reached as ssh -p PORT -i IDENTITY USER@127.0.0.1.

    env: what every session gets in its environment, such as a cluster's SLURM_CONF and PATH.
    """

    host = "127.0.0.1"

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self.env = dict(env or {})
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.port = 0
        self._daemon: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._guard: Guard | None = None

    @staticmethod
    def missing() -> str:
        """A sentence that says what this machine lacks, or nothing at all."""
        absent = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
        return f"no private sshd: {', '.join(absent)} not found (apt install openssh-server rsync)" if absent else ""

    @property
    def directory(self) -> Path:
        """Where everything of this server lies; gone after stop()."""
        if self._directory is None:
            raise SshdError("the sshd is not running")
        return self._directory

    @property
    def identity(self) -> Path:
        """The private key that the server lets in."""
        return self.directory / "identity"

    @property
    def known_hosts(self) -> Path:
        """A known_hosts file with the server's key under its host and port."""
        return self.directory / "known_hosts"

    @property
    def client_config(self) -> Path:
        """For `ssh -F`: known host, key and port for this server's address, and nothing asked on a terminal."""
        return self.directory / "ssh_config"

    def __enter__(self) -> Sshd:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self, timeout: float = 20) -> Sshd:
        """Make the keys, start the server, wait for its greeting. SshdError, and nothing left, if it does not come."""
        if lack := self.missing():
            raise SshdError(lack)
        self._directory = Path(tempfile.mkdtemp(prefix="sshd-", dir="/tmp"))
        self._guard = Guard(self._directory, self._mark())
        try:
            self._write_files()
            self.listen(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def listen(self, timeout: float = 20) -> None:
        """Take connections, on the same port as before deafen()."""
        program = shutil.which("sshd", path=SEARCH_PATH)  # sshd insists on its absolute path
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd shuts its unprivileged half in
        with (self.directory / "log").open("ab") as log:
            self._daemon = subprocess.Popen(
                [str(program), "-D", "-e", "-f", str(self.directory / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while not self._greets():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise SshdError(f"sshd not up (status {self._daemon.poll()})\n{self.log_tail()}")
            time.sleep(0.02)

    def deafen(self) -> None:
        """Take no new connections; those that live go on."""
        if self._daemon is not None:
            stop_process(self._daemon)
            self._daemon = None

    def drop_connections(self) -> int:
        """Cut every connection that lives, as a broken line does: the server's half dies without a word, the commands
        that it ran keep running. How many connections there were."""
        assert self._daemon is not None, "not listening"
        connections = children_of(self._daemon.pid)
        sshd = {pid for pid in members_of(self.directory) | connections if _is_sshd(pid)} - {self._daemon.pid}
        kill(sshd)
        return len(connections)

    def stop(self) -> None:
        """End the server, its connections and what they started, and remove the directory. Safe to call twice."""
        if self._directory is None:
            return
        members = members_of(self._directory, self._mark())
        self.deafen()
        kill(members | members_of(self._directory, self._mark()))
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._guard is not None:
            self._guard.dismiss()
        self._directory = self._guard = None

    def ssh(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command line over the connection, with the real client."""
        line = ["ssh", "-F", str(self.client_config), f"{self.user}@{self.host}", *command]
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def write_ssh(self, directory: Path) -> Path:
        """Put an `ssh` into `directory`, for a PATH: the real client, with client_config in place of the user's own."""
        directory.mkdir(parents=True, exist_ok=True)
        script = directory / "ssh"
        script.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {shlex.quote(str(self.client_config))} "$@"\n')
        script.chmod(0o755)
        return script

    def log_tail(self, lines: int = 20) -> str:
        log = self.directory / "log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""

    def _write_files(self) -> None:
        here = self.directory
        for name in ("host_key", "identity"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"test {name}", "-f", str(here / name)]
            subprocess.run(make, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        with socket.socket() as free:
            free.bind((self.host, 0))
            self.port = free.getsockname()[1]
        (here / "authorized_keys").write_text((here / "identity.pub").read_text())
        self.known_hosts.write_text(f"[{self.host}]:{self.port} {(here / 'host_key.pub').read_text()}")
        self.client_config.write_text(_client_config(here, self.host, self.port))
        name, _, value = self._mark().partition("=")
        (here / "sshd_config").write_text(_server_config(here, self.host, self.port, {**self.env, name: value}))

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _mark(self) -> str:
        """How the environment tells a process that a session of this server started."""
        return f"TEST_SSHD={self.directory}"


def _is_sshd(pid: int) -> bool:
    """By the program's name: sshd, and sshd-session in OpenSSH 9.8 and later."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    except OSError:
        return False


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"")


def _client_config(here: Path, host: str, port: int) -> str:
    values = {
        "Port": str(port),
        "IdentityFile": str(here / "identity"),
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": str(here / "known_hosts"),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
    }
    return f"Host {host}\n" + "".join(f"    {name} {value}\n" for name, value in values.items())


def _server_config(here: Path, host: str, port: int, env: Mapping[str, str]) -> str:
    # sshd takes the first SetEnv line and no other: all variables go into one
    variables = " ".join(f'"{name}={_escaped(value)}"' for name, value in env.items())
    values = {
        "Port": str(port),
        "ListenAddress": host,
        "HostKey": str(here / "host_key"),
        "AuthorizedKeysFile": str(here / "authorized_keys"),
        "PidFile": str(here / "pid"),
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "UsePAM": "no",
        "StrictModes": "no",
        "PrintMotd": "no",
        "MaxStartups": "100",
        "MaxSessions": "100",
        "Subsystem": "sftp internal-sftp",
        "SetEnv": variables,
    }
    return "".join(f"{name} {value}\n" for name, value in values.items())
