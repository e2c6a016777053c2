"""The slurm.conf of a private cluster: what it takes to run without root, systemd, cgroups, a database or a network."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from collections.abc import Mapping
from pathlib import Path

NODES = ("n1", "n2")

# slurmd can end a job above its memory without cgroups; it needs memory as something that is allocated.
MEMORY_LIMITS = {
    "JobAcctGatherType": "jobacct_gather/linux",
    "JobAcctGatherParams": "OverMemoryKill",
    "JobAcctGatherFrequency": "task=1",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerNode": "100",
}


def user_name() -> str:
    """The name of the user whom this process runs as, whatever the environment claims."""
    return pwd.getpwuid(os.getuid()).pw_name


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def slurm_conf(root: Path, settings: Mapping[str, str]) -> str:
    """The text of slurm.conf for a cluster in `root`."""
    host, user = socket.gethostname().partition(".")[0], user_name()
    controller, *ports = free_ports(1 + len(NODES))
    values = {
        "ClusterName": "private",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": str(controller),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={root}/munge/s",
        "CredType": "cred/munge",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": f"{root}/jobcomp.txt",
        "PlugStackConfig": f"{root}/plugstack.conf",
        "StateSaveLocation": f"{root}/state",
        "SlurmdSpoolDir": f"{root}/spool/%n",
        "SlurmctldPidFile": f"{root}/slurmctld.pid",
        "SlurmdPidFile": f"{root}/%n.pid",
        "SlurmdParameters": "config_overrides",  # the nodes may claim more than the machine has
        "ReturnToService": "2",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "KillWait": "2",
        "MinJobAge": "3600",
        "GresTypes": "gpu",
        **settings,
    }
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
    partition = "Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=FORCE:8"
    lines = [f"{name}={value}" for name, value in values.items()]
    lines += [f"NodeName={name} Port={port} {node}" for name, port in zip(NODES, ports, strict=True)]
    lines += [f"PartitionName=batch Default=YES {partition}", f"PartitionName=debug {partition}"]
    return "\n".join(lines) + "\n"
