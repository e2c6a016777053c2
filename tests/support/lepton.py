"""DGX Cloud Lepton on loopback: the workspace API as the `leptonai` client speaks it, whose jobs really run here.

    with Lepton() as lepton:
        os.environ.update(lepton.env)              # before leptonai is imported
        APIClient().job.create(...)                # one process for each of `completions`

Routes and models follow the client's own sources. Where those are silent (how an error is worded, what a deleted job's
`state` reads) a client must not depend on what is here: see `archived_state`.
Nothing reaches the network: a job's proxies lead nowhere, and its `wget` and `curl` fail.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import socket
import sys
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from support.lepton_http import BASE, Handler, Refused
from support.lepton_jobs import NODES, WORKSPACE, Job, Replica

NODE_GROUP, NODE_GROUP_ID = "my-group", "my-group-4f2a"  # users write the name, jobs carry the id
SHAPES: dict[str, tuple[int, str]] = {  # name: accelerators, their type
    "cpu.small": (0, ""),
    "cpu.medium": (0, ""),
    "gpu.2xh100-sxm": (2, "NVIDIA-H100-80GB-HBM3"),
    "gpu.8xh100-sxm": (8, "NVIDIA-H100-80GB-HBM3"),
}
LARGEST_JOB = 1536 * 1024  # bytes: a job is an object in Kubernetes, and etcd takes no larger request
JOB_NAME = re.compile(r"[a-z]([-a-z0-9]{0,34}[a-z0-9])?")


class Lepton:
    """image_env: what the container image brings. grace: seconds from SIGTERM to SIGKILL (30 in Kubernetes).

    requests: every (method, path below the workspace, body) received. secrets: name -> value.
    archived_state: how the `state` of a deleted job reads; the client's models know "Archived" and "Deleted".
    """

    def __init__(self, *, token: str = "good-token", image_env: dict[str, str] | None = None, grace: float = 5) -> None:
        self.token, self.image_env, self.grace = token, image_env or {}, grace
        self.archived_state = "Archived"
        self.requests: list[tuple[str, str, str]] = []
        self.secrets: dict[str, str] = {}
        self.jobs: list[Job] = []
        self.streams = 0  # logs that are being followed
        self.cuts = 0
        self.hanging = threading.Event()
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()
        self._faults: list[tuple[str, int]] = []
        self._delay = 0.0
        self._server: ThreadingHTTPServer | None = None
        self.root = Path(tempfile.mkdtemp(prefix="lepton-"))
        (self.root / "guard").mkdir()
        for name in ("wget", "curl"):
            program = self.root / "guard" / name
            program.write_text(f"#!/bin/sh\necho '{name}: no network in this test:' \"$@\" >&2\nexit 1\n")
            program.chmod(0o755)
        self.port = 0
        self.up()

    @property
    def env(self) -> dict[str, str]:
        """What a user exports. LEPTON_CACHE_DIR keeps the client away from the login of whoever runs the tests."""
        return {
            "LEPTON_WORKSPACE_ID": WORKSPACE,
            "LEPTON_WORKSPACE_TOKEN": self.token,
            "LEPTON_WORKSPACE_URL": f"http://127.0.0.1:{self.port}{BASE}",
            "LEPTON_WORKSPACE_ORIGIN_URL": f"http://127.0.0.1:{self.port}",
            "LEPTON_CACHE_DIR": str(self.root / "cache"),
        }

    def __enter__(self) -> Lepton:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # what a test may do to it

    def fail_next(self, path_prefix: str, status: int = 500) -> None:
        """The next request below the workspace whose path begins so is answered with `status`."""
        self._faults.append((path_prefix, status))

    def slow_start(self, seconds: float) -> None:
        """Jobs created from now on stay Queueing first."""
        self._delay = seconds

    def drop_logs(self) -> int:
        """Cut every open log stream in the middle, once. Returns how many there were."""
        with self.lock:
            self.cuts += 1
            return self.streams

    def down(self, *, hang: bool = False) -> None:
        """Refuse connections; with `hang` take them and answer nothing. Jobs go on."""
        if hang:
            self.hanging.set()
        elif self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            with self.lock:
                for connection in self.connections:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def up(self) -> None:
        """Answer (again), on the same port."""
        self.hanging.clear()
        if self._server is None:
            self._server = ThreadingHTTPServer(("127.0.0.1", self.port), functools.partial(Handler, self))
            self.port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def processes(self) -> list[int]:
        """The ids of every living process of any job."""
        return [pid for job in self.jobs for replica in job.replicas for pid in replica.living()]

    def stop(self) -> None:
        """End everything; no process and no file is left."""
        self.hanging.clear()
        self.down()
        for job in self.jobs:
            job.grace = 0
            job.end("Deleted")
        for job in self.jobs:
            job.join()
        shutil.rmtree(self.root, ignore_errors=True)

    # what the client may ask of it

    def fault(self, path: str) -> int | None:
        """The status that `fail_next` asked for, once."""
        with self.lock:
            for fault in self._faults:
                if path.startswith(fault[0]):
                    self._faults.remove(fault)
                    return fault[1]
        return None

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: str) -> tuple[int, Any]:
        """A status and what becomes JSON. Raises Refused."""
        mode = query.get("job_query_mode", ["alive_only"])[0]
        match method, [unquote(part) for part in path.strip("/").split("/")]:
            case "GET", ["workspace"]:
                return 200, self._workspace()
            case "GET", ["dedicated-node-groups"]:
                return 200, [_node_group()]
            case "GET", ["dedicated-node-groups", group, "nodes"] if group == NODE_GROUP_ID:
                return 200, [{"metadata": {"id": n}, "spec": {"unschedulable": False}, "status": {}} for n in NODES]
            case "GET", ["shapes"]:
                return 200, [{"metadata": {"id": name, "name": name}, "spec": {"name": name}} for name in SHAPES]
            case "GET", ["usersecrets"]:
                return 200, [{"name": name, "visibility": "private"} for name in self.secrets]  # never a value
            case "POST", ["usersecrets"]:
                self.secrets.update({item["name"]: item["value"] for item in json.loads(body)})
                return 201, {}
            case "DELETE", ["usersecrets", name] if name in self.secrets:
                del self.secrets[name]
                return 200, {}
            case "GET", ["jobs"]:
                first = query.get("page", ["1"]) == ["1"]  # the client asks for pages until one is empty
                return 200, {"jobs": [self._shown(job) for job in self._visible(mode)] if first else []}
            case "POST", ["jobs"]:
                return 201, self._create(body).shown()
            case "GET", ["jobs", name]:
                return 200, self._shown(self._job(name, mode))
            case "PATCH", ["jobs", name]:
                if json.loads(body) != {"spec": {"stopped": True}}:
                    raise Refused(400, "only spec.stopped=true can be changed here")
                self._job(name, "alive_only").end("Stopped")
                return 200, {}
            case "DELETE", ["jobs", name]:
                self._job(name, mode).end("Deleted")
                return 200, {}
            case "GET", ["jobs", name, "replicas"]:
                return 200, [_replica(replica) for replica in self._job(name, mode).replicas if replica.process]
        raise Refused(404, f"{method} {path}: not found")

    def replica(self, name: str, replica_id: str) -> Replica:
        """Whose log is read: there is one from when the worker has started until its job has been deleted."""
        for replica in self._job(name, "alive_only").replicas:
            if replica.id == replica_id and replica.process:
                return replica
        raise Refused(404, f"replica {replica_id} of job {name} has no log")

    def _visible(self, mode: str) -> list[Job]:
        archived = {"alive_only": (False,), "archive_only": (True,), "alive_and_archive": (False, True)}[mode]
        with self.lock:
            return [job for job in self.jobs if (job.state == "Deleted") in archived]

    def _job(self, name: str, mode: str) -> Job:
        """The youngest job of that name: a name is free again when its job has been deleted."""
        for job in reversed(self._visible(mode)):
            if job.id == name:
                return job
        raise Refused(404, f"job {name} not found")

    def _shown(self, job: Job) -> dict[str, Any]:
        shown = job.shown()
        if shown["status"]["state"] == "Deleted":
            shown["status"]["state"] = self.archived_state
        return shown

    def _create(self, body: str) -> Job:
        posted = json.loads(body)
        name, spec = posted["metadata"]["id"], posted["spec"]
        if len(body) > LARGEST_JOB:
            raise Refused(400, f"request is too large: {len(body)} bytes, at most {LARGEST_JOB}")
        if not JOB_NAME.fullmatch(name):
            raise Refused(400, f"job name {name!r}: lower case letters, digits and '-', at most 36 characters")
        if spec.get("resource_shape") not in SHAPES:
            raise Refused(400, f"resource shape {spec.get('resource_shape')!r} not found")
        affinity = spec.get("affinity", {})
        if affinity.get("allowed_dedicated_node_groups") != [NODE_GROUP_ID]:
            raise Refused(400, f"node groups {affinity.get('allowed_dedicated_node_groups')} not found")
        if unknown := set(affinity.get("allowed_nodes_in_node_group") or NODES) - set(NODES):
            raise Refused(400, f"nodes {sorted(unknown)} not found")
        for mount in spec.get("mounts", []):
            if not Path(mount["mount_path"]).is_dir():
                raise Refused(400, f"nothing is mounted here: {mount['mount_path']} has to exist")
        with self.lock:
            if any(job.id == name for job in self._visible("alive_only")):
                raise Refused(409, f"job {name} already exists")
            shape = SHAPES[spec["resource_shape"]]
            environment = self._environment(spec.get("envs", []))
            job = Job(posted, self.root, environment, shape, delay=self._delay, grace=self.grace)
            self.jobs.append(job)
        return job

    def _environment(self, asked: list[dict[str, Any]]) -> dict[str, str]:
        """The image's variables and the job's own, secrets resolved, behind what keeps a job on this machine."""
        refs = {env["name"]: env["value_from"]["secret_name_ref"] for env in asked if env.get("value_from")}
        if missing := sorted(set(refs.values()) - set(self.secrets)):
            raise Refused(400, f"secrets {missing} not found")
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            **self.image_env,
            **{env["name"]: env.get("value") or "" for env in asked},
            **{name: self.secrets[ref] for name, ref in refs.items()},
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
            "no_proxy": "127.0.0.1,localhost",
        }
        return {**environment, "PATH": f"{self.root / 'guard'}:{environment['PATH']}"}

    def _workspace(self) -> dict[str, Any]:
        resources, services = {"cpu": 0, "memory": 0, "accelerator_num": 0}, {"kv_store_num": 0, "queue_num": 0}
        counts = dict.fromkeys(("photons", "deployments", "pods", "image_pull_secrets"), 0)
        counts.update(jobs=len(self.jobs), secrets=len(self.secrets))
        return {
            **dict.fromkeys(("build_time", "git_commit", "workspace_tier"), ""),
            "workspace_name": WORKSPACE,
            "workspace_state": "normal",
            "workspace_disk_usage_bytes": 0,
            "supported_shapes": {},
            "workloads": {f"num_{name}": count for name, count in counts.items()},
            "resource_quota": {"limit": resources, "used": resources},
            "service_quota": {"limit": services, "used": services},
        }


def _node_group() -> dict[str, Any]:
    spec, status = {"workspaces": [WORKSPACE], "desired_nodes": len(NODES)}, {"ready_nodes": len(NODES)}
    return {"metadata": {"id": NODE_GROUP_ID, "name": NODE_GROUP}, "spec": spec, "status": status}


def _replica(replica: Replica) -> dict[str, Any]:
    node = {"id": replica.node, "name": replica.node}
    return {"metadata": {"id": replica.id, "name": replica.id}, "id": replica.id, "status": {"node": node}}
