"""An HTTP server over a folder, with ranges: it counts what it is asked for and sends, and fails where told to."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Per path (``/x.tar``) the faults: `breaks` times a transfer ends after `at` of what it should send; `statuses`
    are answered first, one after the other; `silent` and `trickling` ones never end; `lies` has words of `Handler`.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.ranges: list[tuple[str, str | None]] = []
        self.sent: Counter[str] = Counter()
        self.breaks: dict[str, int] = {}
        self.at = 0.5
        self.statuses: dict[str, list[int]] = {}
        self.heads_too = False
        self.silent: set[str] = set()
        self.trickling: set[str] = set()
        self.lies: dict[str, str] = {}
        self.versions: Counter[str] = Counter()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # readers that go away are no news

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        self.server.ranges.append((self.path, self.headers.get("Range")))
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, path = self.server, self.path
        file = server.folder / path.lstrip("/").partition("?")[0]
        statuses = server.statuses.get(path, [])
        status = (
            (statuses.pop(0) if len(statuses) > 1 else statuses[0]) if statuses and (body or server.heads_too) else 200
        )
        if status != 200 or not file.is_file():
            self.send_response(status if status != 200 else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = data = file.read_bytes()
        lie = server.lies.get(path, "")
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted and lie != "no ranges" else 0
        shown = start
        if start and lie == "other range":
            shown = start = start // 2
        elif start and lie == "other bytes":
            data = data[start:] + data[:start]
        self.send_response(206 if wanted and lie != "no ranges" else 200)
        if wanted and lie != "no ranges":
            self.send_header("Content-Range", f"bytes {shown}-{len(whole) - 1}/{len(whole)}")
        piece = data[start:]
        length = len(piece) + (1000 if lie == "longer" else -(len(piece) // 2) if lie == "shorter" else 0)
        self.send_header("Content-Length", str(length))
        if lie == "changes":
            server.versions[path] += 1
        self.send_header("ETag", f'"{server.versions[path]}"')
        self.end_headers()
        if not body:
            return
        self.close_connection = True
        if path in server.trickling:
            for byte in piece:
                if server.over.wait(0.05):
                    return
                self.wfile.write(bytes([byte]))
        if server.breaks.get(path, 0) > 0 or path in server.silent:
            server.breaks[path] = server.breaks.get(path, 0) - 1
            piece = piece[: int(len(piece) * server.at)]
        self.wfile.write(piece[:length])
        self.wfile.flush()
        server.sent[path] += len(piece)
        if path in server.silent:
            server.over.wait(20)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    try:
        yield server
    finally:
        server.stop()
