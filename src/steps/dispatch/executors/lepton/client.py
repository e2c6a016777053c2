"""What is asked of a workspace, through leptonai's client: short time limits, and every failure an ExecutorError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from steps.dispatch.job import JobRecord
from steps.errors import ExecutorError, suggest

_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 20.0
_LOGIN = "Run `lep login`, or set LEPTON_WORKSPACE_ID and LEPTON_WORKSPACE_TOKEN."
#: With more jobs than this, all of the workspace are asked for at once.
_FEW = 3


class Unreachable(ExecutorError):
    """The workspace does not answer, now: asking again later may help."""


class NotThere(ExecutorError):
    """The workspace knows no such thing."""


class Workspace:
    """A workspace of Lepton's, as its credentials here name it. Raises ExecutorError where there are none.

    api: leptonai's own client.
    """

    def __init__(self) -> None:
        try:
            from leptonai.api.v2.client import APIClient
        except ImportError as error:
            hint = "pip install 'peft-steps[cluster]'"
            raise ExecutorError(f"the client of DGX Cloud Lepton cannot be imported: {error}", hint=hint) from error
        try:
            self.api = APIClient()
        except (RuntimeError, TypeError) as error:  # TypeError: an id without a token
            raise ExecutorError("there are no credentials for DGX Cloud Lepton", hint=_LOGIN) from error
        except (OSError, ValueError) as error:  # it asks Lepton for the URL of the workspace where none is given
            raise Unreachable(f"Lepton cannot be reached: {_words(error)}", hint="Check the network.") from error
        self.api._timeout = (_CONNECT_SECONDS, _ANSWER_SECONDS)

    @property
    def id(self) -> str:
        """The workspace's own name."""
        return str(self.api.workspace_id)

    @classmethod
    def of(cls, job: JobRecord) -> Workspace:
        """The workspace, which must be the job's."""
        workspace = cls()
        workspace.must_hold(job)
        return workspace

    def must_hold(self, job: JobRecord) -> None:
        """Raises ExecutorError for a job that was submitted to another workspace: that this one does not know it is not
        the job's end."""
        home = str(job.status.handle.get("workspace") or self.id)
        if home != self.id:
            hint = f"lep login -c {home}:TOKEN, or set LEPTON_WORKSPACE_ID and LEPTON_WORKSPACE_TOKEN to its own."
            raise ExecutorError(f"this is the {self}; {job.id} is in {home}", hint=hint)

    def __str__(self) -> str:
        return f"Lepton workspace {self.id}"

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Failures of the calls in here are told as ExecutorErrors; no token and no request's body is in them."""
        import requests
        from leptonai.api.v1.api_resource import ClientError, ServerError

        try:
            yield
        except ClientError as error:
            raise self._refused(error.response.status_code, error.response) from error
        except ServerError as error:
            hint = "Try again in a while."
            raise Unreachable(f"{self} failed with status {error.response.status_code}", hint=hint) from error
        except requests.exceptions.InvalidJSONError as error:
            raise self._strange() from error
        except requests.RequestException as error:
            hint = "Check the network, and LEPTON_WORKSPACE_URL where it is set."
            raise Unreachable(f"{self} cannot be reached: {_words(error)}", hint=hint) from error
        except RuntimeError as error:  # an answer that is not what the client expects
            raise self._strange() from error

    def _strange(self) -> ExecutorError:
        what = f"{self} gave an answer that leptonai's client does not understand"
        return ExecutorError(what, hint="Is LEPTON_WORKSPACE_URL right, and leptonai new enough?")

    def _refused(self, status: int, response: Any) -> ExecutorError:
        if status == 401:
            return ExecutorError(f"{self} refuses the token (unauthorized)", hint=_LOGIN)
        if status == 403:
            return ExecutorError(f"{self} does not allow this to you (forbidden)", hint="Ask its administrators.")
        message = _message(response)
        if status == 404:
            return NotThere(f"{self}: {message}")
        if status == 409:
            return ExecutorError(f"{self}: {message}", hint="Submit again: a new job has a new name.")
        return ExecutorError(f"{self} refuses this: {message}", hint="`steps profiles check` looks at the profile.")

    # jobs

    def job(self, name: str) -> Any:
        """The job, ended and deleted ones too. Raises NotThere."""
        with self.asking():
            return self.api.job.get(name)

    def jobs(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the jobs that the workspace knows."""
        wanted = set(names)
        found: dict[str, Any] = {}
        if len(wanted) > _FEW:
            with self.asking():
                found = {job.metadata.id_: job for job in self.api.job.list_all() if job.metadata.id_ in wanted}
        for name in wanted - found.keys():
            with contextlib.suppress(NotThere):
                found[name] = self.job(name)
        return found

    def stop(self, name: str) -> None:
        """End a job's workers; the job and its log stay. Raises NotThere."""
        with self.asking():
            self.api.job.update(name, spec={"spec": {"stopped": True}})

    def delete(self, name: str) -> None:
        """End a job and forget it with its log; one that is not there is no fault."""
        with contextlib.suppress(NotThere), self.asking():
            self.api.job.delete(name)

    def replicas(self, name: str) -> dict[int, str]:
        """Index of each worker that has started -> its id, <job>-<index>-<random>. Of several, the last one started."""
        with self.asking():
            ids = [str(replica.metadata.id_) for replica in self.api.job.get_replicas(name)]
        parts = [(replica.removeprefix(f"{name}-").partition("-")[0], replica) for replica in ids]
        return {int(index): replica for index, replica in parts if index.isdecimal()}

    def log(self, name: str, replica: str, idle_seconds: float) -> Iterator[bytes]:
        """A worker's log from its beginning until the worker's end. leptonai's own reader has no time limits.

        Raises Unreachable when it breaks off, or after so long without a word.
        """
        with self.asking():
            path = f"/jobs/{name}/replicas/{replica}/log"
            with self.api._get(path, stream=True, timeout=(_CONNECT_SECONDS, idle_seconds)) as response:
                self.api.job._raise_if_not_ok(response)
                yield from filter(None, response.iter_content(chunk_size=None))

    # secrets

    def secrets(self) -> list[str]:
        """The names of the workspace's secrets."""
        with self.asking():
            return [item.name for item in self.api.secret.list_all()]

    def create_secrets(self, values: Mapping[str, str]) -> None:
        """Secrets that only this user sees, by name."""
        if not values:
            return
        from leptonai.api.v1.types.common import LeptonVisibility
        from leptonai.api.v1.types.secret import SecretItem

        private = LeptonVisibility.PRIVATE
        with self.asking():
            self.api.secret.create([SecretItem(name=key, value=v, visibility=private) for key, v in values.items()])

    def delete_secrets(self, names: Iterable[str]) -> None:
        """Those that are not there are no fault."""
        for name in names:
            with contextlib.suppress(NotThere), self.asking():
                self.api.secret.delete(name)

    # what there is

    def node_group(self, name: str) -> Any:
        """The node group of that name. Raises ExecutorError with the ones there are."""
        with self.asking():
            groups = {group.metadata.name: group for group in self.api.nodegroup.list_all()}
        if name not in groups:
            hint = suggest(name, groups) or f"Node groups: {', '.join(sorted(map(str, groups))) or 'none'}"
            raise NotThere(f"{self} has no node group {name!r}", hint=hint)
        return groups[name]

    def shapes(self, group: Any) -> list[str]:
        """The resource shapes of a node group."""
        with self.asking():
            shapes = self.api.shapes.list_shapes(node_group=group.metadata.id_, purpose="job")
            return [str(shape.metadata.id_ or shape.metadata.name) for shape in shapes]


def _message(response: Any) -> str:
    try:
        answer = response.json()
        return str(answer.get("message") or answer.get("error") or answer)
    except (ValueError, AttributeError):
        return str(response.text).strip()[:300] or f"status {response.status_code}"


def _words(error: BaseException) -> str:
    """The innermost reason of requests' nested errors, in few words."""
    text = str(error)
    for words, meaning in (
        ("refused", "connection refused"), ("timed out", "no answer in time"), ("NameResolution", "unknown host"),
        ("Temporary failure in name", "unknown host"), ("closed connection", "the connection broke off"),
        ("Connection aborted", "the connection broke off"), ("Connection broken", "the connection broke off"),
        ("incomplete", "the connection broke off"),
    ):  # fmt: skip
        if words in text:
            return meaning
    return type(error).__name__
