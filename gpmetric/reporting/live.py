"""A campaign's page over HTTP, while its driver runs: one address, one page, read from the ledger at most so often."""

from __future__ import annotations

import hashlib
import logging
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.evolution.live_page import HOST
from gpmetric.plain import one_line
from gpmetric.reporting.blocks import Page
from gpmetric.reporting.page import render
from gpmetric.reporting.source import page_of

__all__ = ["LiveServer", "Served"]

_LOG = logging.getLogger(__name__)
_SECONDS = 5.0  # after which a browser looks again
_SHARE = 10.0  # so many times what a page took to make passes before another one is made
_PATIENCE = 10.0  # seconds for a request to come


class Served:
    """The page of a ledger, made anew where the ledger has changed and the last one is old enough.

    A page that cannot be made is told once, and the last one stays.
    """

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._seen: object = None
        self._next = 0.0
        self._failed = False
        self._content = render(_waiting(ledger), live=_SECONDS).encode()

    def content(self) -> bytes:
        """The page as it is now."""
        with self._lock:
            now = time.monotonic()
            if now >= self._next and (seen := self._signs()) != self._seen:
                self._make(seen)
                self._next = now + max(1.0, _SHARE * (time.monotonic() - now))
            return self._content

    def _make(self, seen: object) -> None:
        try:
            self._content, self._seen = render(page_of(self._ledger), live=_SECONDS).encode(), seen
        except (GpmetricError, OSError) as error:
            if not self._failed and self._ledger.is_file() and self._ledger.stat().st_size:
                _LOG.warning("--live: %s (told once; the campaign goes on)", one_line(str(error)))
                self._failed = True

    def _signs(self) -> object:
        """What changes with the ledger."""
        found = []
        for path in (self._ledger, self._ledger.with_name(f"{self._ledger.name}-wal")):
            try:
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size))
            except OSError:
                found.append((0, 0))
        return tuple(found)


def _waiting(ledger: Path) -> Page:
    return Page(f"Campaign {ledger.name}", "The campaign is about to begin: nothing is in its ledger yet.", (), ())


class LiveServer(ThreadingHTTPServer):
    """Answers GET / with the page, to those who ask for this machine by its own name.

    A page of another site whose name leads here, too, asks by that name, and gets nothing.

    Args:
        listening: a socket on the loopback address.
        served: the page.
    """

    daemon_threads = True

    def __init__(self, listening: socket.socket, served: Served) -> None:
        address = listening.getsockname()
        super().__init__(address, _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_address, self.served = listening, address, served
        self.server_name, self.server_port = HOST, address[1]
        names = (HOST, "localhost")  # whose port browsers leave out where it is 80
        self.hosts = {f"{name}:{address[1]}" for name in names} | ({*names} if address[1] == 80 else set())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves before it has its answer is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    server_version, sys_version = "gpmetric", ""
    timeout = _PATIENCE

    def do_GET(self) -> None:
        if self.headers.get_all("Host", []) not in [[name] for name in self.server.hosts]:
            self.send_error(403, "another host is meant")
        elif self.path != "/":
            self.send_error(404)
        else:
            content = self.server.served.content()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:32]}"')
            self.end_headers()
            self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in (
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", "frame-ancestors 'none'"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is told of requests."""
