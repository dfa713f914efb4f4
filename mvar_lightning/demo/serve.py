"""Serves the page on this machine: its port, when it is ready, and an end that waits for nobody."""

from __future__ import annotations

import errno
import socket
import webbrowser
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette

from mvar_lightning.errors import UserError

HOST = "127.0.0.1"

PATIENCE = 2
"""Seconds that running answers have to end when the server is told to."""


def serve(
    app: Starlette, port: int, warm: Callable[[], None], ready: Callable[[str], None], open_browser: bool = False
) -> None:
    """Serve until told to stop.

    Args:
        app: of `build_app`.
        port: 0 takes a free one.
        warm: called before anybody is answered.
        ready: given the address once the page answers.
        open_browser: show it there.

    Raises:
        UserError: a port that is in use or not allowed.
    """
    listening = _listen(port)
    address = f"http://{HOST}:{listening.getsockname()[1]}"
    warm()
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE, lifespan="on"))

    def began() -> None:
        ready(address)
        if open_browser:
            webbrowser.open(address)

    server.began = began
    server.ends = app.state.turns.close
    with suppress(KeyboardInterrupt):  # how it is told
        server.run(sockets=[listening])


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is in use" if taken else f"cannot be listened to ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"``port`` {port}: {reason}; give another one, or 0 for any that is free") from error


class _Server(uvicorn.Server):
    """Says when it answers, and ends streams that still run when it is told to stop."""

    began: Callable[[], object]
    ends: Callable[[], object]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.began()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.ends()
        await super().shutdown(sockets)
