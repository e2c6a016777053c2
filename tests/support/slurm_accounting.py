"""A private Slurm with real accounting: a mariadbd and a slurmdbd of its own beside the other daemons."""

from __future__ import annotations

import getpass
import shutil
import subprocess

from support.processes import stop_process
from support.slurm import Cluster, search_path
from support.slurm_conf import free_ports

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb", "mariadb-install-db")


class AccountedCluster(Cluster):
    """As Cluster; sacct and sacctmgr answer from a database that remembers every job."""

    @staticmethod
    def missing() -> str:
        """A sentence that says what this machine lacks, or nothing at all."""
        absent = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
        packages = "slurmdbd mariadb-server-core mariadb-client-core"
        lack = f"no Slurm accounting: {', '.join(absent)} not found (apt install {packages})" if absent else ""
        return Cluster.missing() or lack

    def start(self, timeout: float = 30) -> AccountedCluster:
        (self._port,) = free_ports(1)
        self.settings |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": str(self._port),
        }
        super().start(timeout)
        return self

    def start_controller(self, timeout: float = 30) -> None:
        """The controller insists on finding its accounting when it starts."""
        if "slurmdbd" not in self._daemons:
            self._start_accounting(timeout)
        super().start_controller(timeout)

    def stop_accounting(self) -> None:
        """End slurmdbd: jobs go on, and the controller keeps what it has to tell."""
        stop_process(self._daemons.pop("slurmdbd"))

    def _start_accounting(self, timeout: float) -> None:
        root, user = self.directory, getpass.getuser()
        with self.configuration.open("a") as file:
            file.write(f"AccountingStoragePass={root}/munge/s\n")
        socket, data = root / "mysql", root / "data"
        make = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=socket"]
        subprocess.run([*make, f"--user={user}", "--skip-test-db"], check=True, capture_output=True, timeout=120)
        place = [f"--datadir={data}", f"--socket={socket}", f"--pid-file={root}/mysql.pid", f"--user={user}"]
        self._spawn("mariadbd", "mariadbd", "--no-defaults", "--skip-networking", *place)
        ask = ["mariadb", "--no-defaults", f"--socket={socket}", "--execute"]
        self._wait("mariadbd", lambda: self.run(*ask, "select 1").returncode == 0, timeout)
        configuration = root / "slurmdbd.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={root}/munge/s\nDbdHost=localhost\nDbdAddr=127.0.0.1\n"
            f"DbdPort={self._port}\nSlurmUser={user}\nLogFile={root}/log/dbd.log\nPidFile={root}/dbd.pid\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser={user}\nStorageLoc=acct\n"
        )
        environment = {"MYSQL_UNIX_PORT": str(socket), "SLURM_CONF": str(configuration.with_name("slurm.conf"))}
        self._spawn("slurmdbd", "env", *(f"{name}={value}" for name, value in environment.items()), "slurmdbd", "-D")
        manage = ("sacctmgr", "--immediate", "add", "cluster", "private")
        self._wait("slurmdbd", lambda: self.run(*manage).returncode == 0, timeout)
