"""What NeMo-Run's tunnel is answered when a server asks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from steps.dispatch.executors.slurm import login


class Refused(Exception):
    allowed_types = ("publickey",)


@pytest.fixture
def tunnel() -> SimpleNamespace:
    tunnel = SimpleNamespace()
    login.Prompt("me@host:22").answer_for(tunnel)
    return tunnel


def test_nobody_is_asked_without_a_terminal(tunnel, monkeypatch):
    monkeypatch.setattr(login, "somebody_is_there", lambda: False)
    for ask in (tunnel.fallback_auth_handler, lambda: tunnel.auth_handler("", "", [("Code: ", False)])):
        with pytest.raises(PermissionError, match="me@host:22 asks"):
            ask()


def test_the_prompt_names_who_asks(tunnel, monkeypatch):
    asked = []
    monkeypatch.setattr(login, "somebody_is_there", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda text: asked.append(text) or "typed")
    assert tunnel.auth_handler("", "", [("Code: ", False)]) == [tunnel.fallback_auth_handler()] == ["typed"]
    assert asked == ["me@host:22: Code: ", "me@host:22: Password: "]


def test_a_password_that_the_server_would_not_take_is_not_asked_for(tunnel, monkeypatch):
    monkeypatch.setattr(login, "somebody_is_there", lambda: True)
    monkeypatch.setattr("getpass.getpass", None)
    try:
        raise Refused
    except Refused:
        with pytest.raises(PermissionError, match="takes no password, only publickey"):
            tunnel.fallback_auth_handler()
