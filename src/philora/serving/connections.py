"""Listen on a socket, and limit the number and the time of the server's connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http
import ipaddress
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from philora.errors import ConfigError, fault
from philora.serving.chat_requests import ApiError
from philora.serving.scheduler import Scheduler, stopping

logger = logging.getLogger(__name__)

HEADER_SECONDS = 15.0
"""Time limit of a request's header, from its first byte or from the opening of the connection."""

STOP_SECONDS = 1.0
"""Time that clients have to read the end of their answers when the server stops."""

MOST_CONNECTIONS = 1000
_ACCEPTED_AT_ONCE = 16
_RESERVED_DESCRIPTORS = 64
_QUEUE = 128


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; called before weights are loaded, so that a port in use is reported at once.

    Raises:
        ConfigError: The port is in use, or the address does not exist.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        expected = "an address of this machine and a free port"
        todo = "Give another --port, or 0 for any free one"
        raise ConfigError(fault("server", "address", f"{host}:{port}", expected, f"{error}. {todo}")) from error


def address_of(bound: socket.socket) -> str:
    """Return the address as a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(host: str) -> frozenset[str] | None:
    """Return the names that a Host header may have: on loopback those of this machine; None elsewhere, for any name."""
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_loopback(host) else None


def check_key(host: str, key: str | None) -> None:
    """Require a key beyond loopback, because anyone who reaches the server can use the machine.

    Raises:
        ConfigError: There is none, or it cannot be sent in a header.
    """
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip() == key or not key):
        raise ConfigError(fault("server", "api_key", "...", "printable ASCII characters, without spaces around them"))
    if key is None and not is_loopback(host):
        todo = "Set --api-key or PHILORA_API_KEY, or leave --host out"
        raise ConfigError(fault("server", "host", host, "a key where other machines reach the server", todo))


# -- connections


def most_connections() -> int:
    """Return the most connections that leave this process enough file descriptors for other use."""
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    opened = 64
    with contextlib.suppress(OSError):
        opened = len(list(Path("/proc/self/fd").iterdir()))
    return max(4, min(MOST_CONNECTIONS, soft - opened - _RESERVED_DESCRIPTORS))


class Server(uvicorn.Server):
    """uvicorn's server, until SIGINT or SIGTERM, with a limit on connections; unfinished answers end with an error.

    uvicorn's own `limit_concurrency` refuses requests that have been read, while idle connections count and stay open.
    Here connections are refused when they open, and closed when a header takes too long.

    Args:
        app, scheduler: The application, and the scheduler; its answers end with the server.
        connections: Most connections at a time; default: as many as the process has file descriptors for.
        header_seconds: As `HEADER_SECONDS`.
    """

    def __init__(
        self,
        app: ASGIApp,
        scheduler: Scheduler,
        *,
        connections: int | None = None,
        header_seconds: float = HEADER_SECONDS,
    ) -> None:
        self.scheduler = scheduler
        self.connections = most_connections() if connections is None else connections
        self.header_seconds = header_seconds
        self.refused = 0
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(_Connection, self),  # type: ignore[arg-type]  # called as the class would be
                ws="none",
                log_config=None,  # uvicorn's would close all log handlers of the process, and the streams of some
                log_level="error",
                access_log=False,
                server_header=False,
                backlog=_ACCEPTED_AT_ONCE,
                timeout_graceful_shutdown=3,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with a long queue; uvicorn accepts only a few connections in one go."""
        await super().startup(sockets)
        for item in sockets or []:
            item.listen(_QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: end answers with an error, and close connections that do not read it in time."""
        self.scheduler.end_answers()
        cut = asyncio.get_running_loop().call_later(STOP_SECONDS, self._cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def note_refused(self) -> None:
        """Log the first connection that is refused, and every thousandth."""
        if self.refused % 1000 == 0:
            logger.warning("%d connections are open, which is the limit: another is refused", self.connections)
        self.refused += 1


class _Connection(H11Protocol):
    """uvicorn's connection, refused if there are too many, and closed if a header does not arrive in time."""

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(**options)
        self._owner = server
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._owner.connections:
            self._owner.note_refused()
            self._refuse(503, "The server has too many connections; try again later.", "too_many_connections")
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Read data unless the connection is refused."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel its timer."""
        self._unwatch()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close after the answer; a request whose body has not arrived gets an error."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and cycle.more_body and not cycle.response_started:
            error = stopping()
            self._refuse(error.status, str(error), "server_stopping")
        else:
            super().shutdown()

    def _watch(self) -> None:
        """Set a time limit while a header is awaited, and remove it while an answer is computed."""
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self._late is None:
            self._late = self.loop.call_later(self._owner.header_seconds, self._too_late)
        elif not waiting:
            self._unwatch()

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self._refuse(408, "The request did not arrive in time.", "request_timeout")

    def _refuse(self, status: int, text: str, code: str) -> None:
        """Send an error in OpenAI's form, outside of any request, and close the connection."""
        body = ApiError(status, text, type="server_error", code=code).response().body
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
