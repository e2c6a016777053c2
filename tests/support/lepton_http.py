"""How a `support.lepton` workspace is reached: HTTP/1.1 with the token checked, logs as chunked streams."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from support.lepton_jobs import WORKSPACE, Replica

if TYPE_CHECKING:
    from support.lepton import Lepton

BASE = f"/api/v2/workspaces/{WORKSPACE}"


class Refused(Exception):
    """Answered with `status` and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, lepton: Lepton, *args: Any) -> None:
        self.lepton = lepton
        super().__init__(*args)

    def handle(self) -> None:
        lepton = self.lepton
        with lepton.lock:
            lepton.connections.add(self.connection)
        try:
            with contextlib.suppress(OSError):  # the other end has gone, or `down` closed the connection
                super().handle()
        finally:
            with lepton.lock:
                lepton.connections.discard(self.connection)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _respond(self) -> None:
        lepton = self.lepton
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path, _, query = self.path.removeprefix(BASE).partition("?")
        lepton.requests.append((self.command, self.path.removeprefix(BASE), body))
        while lepton.hanging.is_set():
            time.sleep(0.02)
        try:
            if status := lepton.fault(path):
                raise Refused(status, "as the test asked")
            if self.headers.get("Authorization") != f"Bearer {lepton.token}":
                raise Refused(401, "Unauthorized")
            if not urlsplit(self.path).path.startswith(f"{BASE}/"):
                raise Refused(404, f"{path}: not found")
            if log := re.fullmatch(r"/jobs/([^/]+)/replicas/([^/]+)/log", path):
                self._stream(lepton.replica(*log.groups()))
                return
            status, content = lepton.answer(self.command, path, parse_qs(query), body)
        except Refused as refused:
            status, content = refused.status, {"code": refused.status, "message": refused.message}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _respond

    def _stream(self, replica: Replica) -> None:
        """The log from its beginning, and on until the worker has ended."""
        lepton = self.lepton
        with lepton.lock:
            cuts = lepton.cuts
            lepton.streams += 1
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with replica.log.open("rb") as log:
                while True:
                    ended = replica.gone.is_set()
                    while piece := log.read(4096):  # a character may be cut in two, as in any stream of bytes
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    if ended:
                        break
                    if lepton.cuts != cuts:
                        self.connection.shutdown(socket.SHUT_RDWR)  # no last chunk: the client sees a broken stream
                        return
                    if select.select([self.connection], [], [], 0.03)[0]:  # the client says nothing more: it has gone
                        self.close_connection = True
                        return
            self.wfile.write(b"0\r\n\r\n")
        finally:
            with lepton.lock:
                lepton.streams -= 1
