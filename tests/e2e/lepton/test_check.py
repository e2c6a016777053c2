"""`steps profiles check` of a Lepton profile: what is missing, before any job is submitted."""

from __future__ import annotations

import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.lepton import SHAPES
from support.lepton_site import Site

from steps.config.base import StepConfig
from steps.dispatch.executors.lepton import EXECUTOR
from steps.dispatch.executors.lepton.env import LeptonEnv


def problems(site: Site, **more) -> dict[str, str]:
    """Where -> the whole message."""
    env = LeptonEnv.model_validate({**site.run_env, **more})
    return {problem.where: str(problem) for problem in [*EXECUTOR.check(StepConfig(), env), *EXECUTOR.probe(env)]}


def test_a_profile_that_lacks_nothing(site: Site):
    site.lepton.secrets["team"] = "value"
    assert problems(site, secret_vars={"TEAM": "team"}) == {}
    done = site.steps("profiles", "check", "here")
    assert (done.returncode, done.stderr) == (0, "")


def test_everything_is_told_together(site: Site):
    site.lepton.secrets["team-secret"] = "value"
    more = {
        "resource_shape": "cpu.smal",
        "container_image": None,
        "secret_vars": {"A": "team-secrt", "B": "nothing-like-it"},
        "env_vars": {"B": "1"},
        "workspace": "/elsewhere",
        "mounts": [*site.run_env["mounts"], {"path": "/", "mount_path": "relative", "from": "node-local"}],
    }
    found = problems(site, **more)
    assert set(found) == {
        "run.env.mounts.1.mount_path", "run.env.workspace", "run.env.secret_vars.B", "run.env.container_image",
        "run.env.secret_vars.A", "run.env.resource_shape",
    }  # fmt: skip
    assert f"Allowed: {', '.join(SHAPES)}. Did you mean cpu.small?" in found["run.env.resource_shape"]
    assert "Did you mean team-secret?" in found["run.env.secret_vars.A"]
    assert f"/elsewhere lies in none of the mounts ({site.store}, relative)" in found["run.env.workspace"]
    site.profile(**more)  # what can be seen without asking comes first
    done = site.steps("profiles", "check", "here")
    assert (done.returncode, done.stderr.count("error: ")) == (5, 3)
    site.profile(**{**more, "env_vars": {}, "workspace": None, "mounts": site.run_env["mounts"]})
    done = site.steps("profiles", "check", "here")
    assert (done.returncode, done.stderr.count("error: ")) == (5, 4)
    assert all(where in done.stderr for where in list(found)[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"node_group": "a-group"},
            "run.env.node_group: Lepton workspace ws has no node group 'a-group'. Did you",
        ),
        ({"node_group": "xyz"}, "has no node group 'xyz'. Node groups: my-group"),
        ({"nemo_run_dir": None}, "run.env.nemo_run_dir: is missing, and a Lepton job needs it"),
        ({"nemo_run_dir": "relative"}, "run.env.nemo_run_dir: 'relative' is no absolute path"),
        ({"mounts": []}, "lies in none of the mounts (none): what is written there is lost with the job"),
        ({"mounts": [{"path": "/", "mount_path": "/"}]}, "run.env.mounts.0.from: is missing"),
    ],
)
def test_one_fault(site: Site, change: dict, message: str):
    assert message in "\n".join(problems(site, **change).values())


def test_a_workspace_that_refuses_or_is_away(site: Site):
    site.lepton.token = "another"
    assert "refuses the token (unauthorized). Run `lep login`" in problems(site)[""]
    site.lepton.fail_next("/usersecrets", 403)
    site.lepton.token = "good-token"
    assert "does not allow this to you (forbidden)" in problems(site)[""]
    site.lepton.down()
    assert "cannot be reached: connection refused" in problems(site)[""]


def test_an_address_where_something_else_answers(site: Site, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        (site.directory / "usersecrets").write_text("<html>Welcome</html>")
        monkeypatch.setenv("LEPTON_WORKSPACE_URL", f"http://127.0.0.1:{server.server_port}")
        assert "gave an answer that leptonai's client does not understand" in problems(site)[""]
        server.shutdown()


def test_a_mount_that_ends_like_the_directory_does_not_hold_it(site: Site):
    mounts = [{"path": "/", "mount_path": "/mnt/a", "from": "x"}]
    found = problems(site, mounts=mounts, nemo_run_dir="/mnt/ab/jobs", workspace="/mnt/a/../a/w/")
    assert list(found) == ["run.env.nemo_run_dir"]
