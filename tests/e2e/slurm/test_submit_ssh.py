"""The same submission through an ssh tunnel: NeMo-Run's connection and rsync, to a real sshd on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm_site import DEMO, Site, everything_written, refused

pytest.importorskip("nemo_run", reason="nemo_run is not installed (pip install 'peft-steps[cluster]')")


@pytest.fixture
def site(tmp_path, cluster, sshd, monkeypatch) -> Site:
    """A machine that reaches the cluster through ssh alone: it does not know where Slurm is."""
    directory = tmp_path / "a laptop"
    directory.mkdir()
    sshd.write_ssh(tmp_path / "bin")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    site = Site(directory, cluster, {"SLURM_CONF": "/nowhere", "PATH": path})
    site.profile(f"""
        tunnel = "ssh"
        host = "{sshd.host}"
        user = "{sshd.user}"
        port = {sshd.port}
        identity = "{sshd.identity}"
        remote_job_dir = "{tmp_path}/there $(touch pwned)"
        python = "{sys.executable}"
        env_vars = {{HF_TOKEN = "${{oc.env:MINE}}"}}
    """)
    return site


def test_a_job_through_ssh(site, tmp_path):
    secret = "hush-$(touch pwned)-'quoted'-7d3f"
    with site.closed():
        job = site.submit(*DEMO, env={"MINE": secret})
        there = tmp_path / "there $(touch pwned)"
        file = there / "secrets" / job.directory.name
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        written = everything_written(tmp_path, site.cluster.directory)
        assert [path for path, data in written.items() if b"hush-" in data] == [file]
    job.succeed()
    assert job.there == there / "jobs" / job.directory.name
    assert (there / "output/tiny/chat/conversations.jsonl").exists(), "relative paths start at remote_job_dir"
    assert not file.exists()
    assert (job.there / "code/steps/errors.py").read_bytes() == (
        Path(__file__).parents[3] / "src/steps/errors.py"
    ).read_bytes()
    assert not list(tmp_path.rglob("pwned"))
    assert sorted(path.name for path in site.directory.iterdir()) == [".steps", "env.toml"]


def test_nobody_answers(site, sshd):
    sshd.drop_connections()
    sshd.deafen()
    try:
        refused(site, "cannot be reached", "Connection refused", "Check host and port", env={"MINE": "hush"})
    finally:
        sshd.listen()


def test_the_connection_for_files_fails(site, sshd):
    """The shell's connection lives on, NeMo-Run's own is refused: told as such, and the directory there is removed."""
    site.submit(*DEMO, env={"MINE": "hush"}).succeed()
    sshd.deafen()
    try:
        job = refused(site, "steps' own connection to ", "may share an open one): ", env={"MINE": "hush"})
        assert not Path(json.loads((job / "status.json").read_text())["handle"]["directory"]).exists()
    finally:
        sshd.listen()


def test_the_wrong_key(site, sshd, tmp_path):
    sshd.drop_connections()
    key = tmp_path / "another"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    site.profile(f'extends = "here"\nidentity = "{key}"', name="stranger")
    # The private client configuration names the right key as well; here it must not.
    config = tmp_path / "ssh_config"
    lines = sshd.client_config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "IdentityFile" not in line) + "\n")
    ssh = tmp_path / "bin/ssh"
    ssh.write_text(ssh.read_text().replace(str(sshd.client_config), str(config)))
    refused(site, "Permission denied", "ssh-add", profile="stranger", env={"MINE": "hush"})


def test_no_rsync(site, tmp_path):
    """Without rsync here, nothing stays on the cluster."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "sh", "cat", "mkdir"):
        (bare / name).symlink_to(shutil.which(name))
    done = refused(
        site, "rsync", "Install rsync here and on the login node.",
        env={"MINE": "hush", "PATH": f"{tmp_path / 'bin'}{os.pathsep}{bare}"},
    )  # fmt: skip
    there = json.loads((done / "status.json").read_text())["handle"]["directory"]
    assert not Path(there).exists()


def test_a_bad_partition_behind_ssh(site):
    site.profile('extends = "here"\npartition = "nosuch"', name="wrong")
    job = refused(site, "invalid partition specified: nosuch", profile="wrong", env={"MINE": "hush"})
    assert not Path(json.loads((job / "status.json").read_text())["handle"]["directory"]).exists()
