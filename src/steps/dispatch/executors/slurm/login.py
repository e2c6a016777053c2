"""What NeMo-Run's tunnel may ask for when no key lets it in."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from typing import Any

from steps.dispatch.executors.slurm.shell import somebody_is_there


class Prompt:
    """Answers a server's questions from the terminal, each with the address that asks. Without a terminal, and for a
    password that the server would not take, there is no answer: the login fails at once.

    address: user@host:port.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def answer_for(self, tunnel: Any) -> None:
        """Put these answers in the place of the tunnel's own, which ask `Password:` whoever listens."""
        tunnel.auth_handler, tunnel.fallback_auth_handler = self.questions, self.password

    def questions(self, title: str, instructions: str, prompts: Sequence[tuple[str, bool]]) -> list[str]:
        """Keyboard-interactive: a password, a second factor, or nothing."""
        return [self._ask(text) for text, _ in prompts]

    def password(self) -> str:
        """The tunnel calls this when the server refuses questions; that refusal says what it takes instead."""
        allowed = getattr(sys.exc_info()[1], "allowed_types", ["password"])
        if "password" not in allowed:
            raise PermissionError(f"{self._address} takes no password, only {', '.join(allowed)}")
        return self._ask("Password: ")

    def _ask(self, text: str) -> str:
        if not somebody_is_there():
            raise PermissionError(f"{self._address} asks {text.strip()!r}, and there is no terminal to answer")
        return getpass.getpass(f"{self._address}: {text}")
