"""What a job needs on the cluster before sbatch is called: its directory, its files and our code, its secrets."""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from steps.dispatch.executors.slurm import layout
from steps.dispatch.executors.slurm.shell import Shell
from steps.dispatch.job import JobSpec, is_secret
from steps.dispatch.package import sources
from steps.errors import ExecutorError

#: Shorter values are found everywhere by chance.
_TELLING = 8
#: Variables without which no job runs, whatever is in them.
_NEEDED = frozenset({"HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "USER"})
#: Copies what is in a directory here into a directory on the cluster. Raises ExecutorError.
Copy = Callable[[str, str], None]


@dataclass(frozen=True)
class Stage:
    """A job's place on the cluster. Every method raises ExecutorError."""

    spec: JobSpec
    shell: Shell
    directory: str

    @property
    def _is_local_directory(self) -> bool:
        return self.shell.here and self.directory == os.fspath(self.spec.directory.absolute())

    def prepare(self) -> Cluster:
        """Make the job's directory, which must be new, and see what the cluster has."""
        directory = shlex.quote(self.directory)
        make = "" if self._is_local_directory else f"mkdir -p -- {shlex.quote(posixpath.dirname(self.directory))}\n"
        make += "" if self._is_local_directory else f"mkdir -- {directory}\n"
        # First of all: with the controller down, every command of Slurm takes its ten seconds to say so.
        ask = "said=$(scontrol show config 2>&1) || case $said in\n"
        ask += '    *"contact slurm controller"*) echo "$said" >&2; exit 75 ;;\nesac\n'
        result = self.shell.run(
            f"{ask}set -e\n{make}mkdir -- {directory}/work\n"
            'command -v sbatch || echo\nprintf "%s\\n" "$SLURM_CONF"\n'
            "srun --help 2>&1 | grep -c -e --container-image || true\n"
            f"test -e {shlex.quote(layout.squash_file(self.spec) or '/')} && echo there || echo missing\n"
            f'printf "%s\\n" "$(echo "$said" | {layout.NAME_IN_CONFIG})"\n'
        )
        if result.returncode == 75:
            raise refused("the job was not submitted", result.stderr)
        if result.returncode:
            raise refused(f"the job's directory cannot be made on {self.shell}", result.stderr)
        sbatch, conf, pyxis, image, name = result.text.splitlines()
        if not sbatch:
            self.remove()
            hint = "Use tunnel: ssh with the host of a login node, or run this on one."
            raise ExecutorError(f"there is no sbatch on {self.shell}", hint=hint)
        return Cluster(sbatch, conf, pyxis != "0", image == "there", name)

    def send(self, copy: Copy) -> None:
        """The job's files and our code. Through ssh in one rsync."""
        names = ["config.yaml", "job.yaml", layout.SCRIPT, layout.NODE_SCRIPT]
        names += [layout.SQUASH_SCRIPT] if layout.squash_file(self.spec) else []
        try:
            if self.shell.here:
                target = Path(self.directory)
                _write_code(target / "code")
                for name in () if self._is_local_directory else names:
                    shutil.copy(self.spec.directory / name, target / name)
                return
            with tempfile.TemporaryDirectory(prefix="steps-") as private:
                staged = Path(private) / "job"  # its mode arrives there, and should be a usual one
                _write_code(staged / "code")
                for name in names:
                    shutil.copy(self.spec.directory / name, staged / name)
                copy(os.fspath(staged), self.directory)
        except OSError as error:
            raise not_put(self.directory, str(error)) from error

    def send_secrets(self) -> None:
        """Into a file for this user only, over stdin: in no command line, in no directory of a job."""
        if not self.spec.secret_env:
            return
        text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.spec.secret_env.items())
        path = layout.secrets(self.directory)
        folder = shlex.quote(posixpath.dirname(path))
        script = f"set -eC; umask 077; mkdir -p -- {folder}; chmod 700 {folder}; cat > {shlex.quote(path)}"
        result = self.shell.run(script, stdin=text.encode())
        if result.returncode:
            raise refused(f"the job's secrets cannot be put on {self.shell}", result.stderr)

    def remove(self) -> None:
        """Leave nothing on the cluster of a job that was not submitted."""
        mine = f"{self.directory}/work" if self._is_local_directory else self.directory
        code = f"{self.directory}/code"
        with contextlib.suppress(ExecutorError):
            self.shell.run("rm -rf -- " + " ".join(map(shlex.quote, (layout.secrets(self.directory), mine, code))))


@dataclass(frozen=True)
class Cluster:
    """What the login node has. conf: SLURM_CONF there; has_image: the container image is imported already; name: what
    Slurm calls the cluster, '' where it does not say.
    """

    program: str
    conf: str
    pyxis: bool
    has_image: bool
    name: str = ""

    def sbatch(self, spec: JobSpec) -> list[str]:
        """The beginning of the command line, quoted: sbatch as a login shell finds it.

        sbatch hands its environment to the job, and Slurm keeps that on its disk until then: variables of this machine
        that hold a secret of the job are taken out of it. The job has them from its own file.
        """
        secrets = [value for name, value in spec.secret_env.items() if is_secret(name) or not _is_everyday(value)]
        hidden = [
            name
            for name, value in os.environ.items()
            if name not in _NEEDED and (name in spec.secret_env or _tells(value, secrets))
        ]
        unset = [part for name in hidden for part in ("-u", name)]
        call = ["env", *unset, *([f"SLURM_CONF={self.conf}"] if self.conf else []), self.program]
        return [*map(shlex.quote, call), "--parsable"]


def _write_code(directory: Path) -> None:
    """Our package, below `directory`. Raises OSError.

    Bytes and mode bits, no owners and times: a job's copy is new, and some cluster file systems refuse the rest.
    """
    for file, place in sources():
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, directory / place)


def _is_everyday(value: str) -> bool:
    """Whether a value is no secret, whoever handed it on: a place on this machine, or a search path of them.

    CACHE = "${oc.env:HOME}" must not take PATH out of the job's environment because that holds the home directory.
    """
    return value.startswith("/") and os.path.lexists(value.partition(":")[0])


def _tells(value: str, secrets: Collection[str]) -> bool:
    """Whether a variable gives a secret away: it is one, or part of one, or holds one."""
    long = len(value) >= _TELLING
    return any(value == one or (long and value in one) or (len(one) >= _TELLING and one in value) for one in secrets)


def not_put(directory: str, words: str) -> ExecutorError:
    """Files could not be copied into a job's directory on the cluster."""
    what = f"the job's files cannot be put into {directory}"
    if "No space left" in words:
        root = posixpath.dirname(posixpath.dirname(directory))
        return ExecutorError(f"{what}: no space left in {root}", hint=hint_for(words))
    return refused(what, words)


def refused(what: str, words: str) -> ExecutorError:
    """A failure in the words of the machine, with what can be done about it."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    hint = hint_for(words) or "`steps profiles check` looks at the profile and the cluster."
    return ExecutorError(f"{what}: {'; '.join(lines[-4:])}", hint=hint)


def hint_for(words: str) -> str:
    """What can be done about a refusal in these words; '' where nothing is known."""
    for part, hint in (
        ("No space left", "Free some space on the cluster and submit again."),
        ("Disk quota", "Free some space on the cluster and submit again."),
        ("Read-only", "Set remote_job_dir to a directory that you may write to."),
        ("Permission denied", "Set remote_job_dir to a directory that you may write to."),
        ("nvalid partition", "Check partition, run_partition and batch_partition; `sinfo` lists what there is."),
        ("nvalid account", "Check account; `sacctmgr show associations user=$USER` lists yours."),
        ("nvalid qos", "Check qos in the profile."),
        ("contact slurm controller", "The cluster's controller does not answer: try again later (`scontrol ping`)."),
        ("node configuration", "Ask for what its nodes have: nodes, gpus_per_node, mem, cpus_per_task (`sinfo -Nl`)."),
        ("rsync: command not found", "Install rsync here and on the login node."),
        ("rsync: not found", "Install rsync here and on the login node."),
    ):
        if part in words:
            return hint
    return ""
