#!/usr/bin/env bash
# Expected: fsspec's HTTP file system tells a file that is not there (404) from a server that is not there or busy (503):
#   `info` raises FileNotFoundError for the first alone.
# Happens: `info` raises FileNotFoundError for all three, and `exists` says False. The true reason is the exception's cause:
#   aiohttp's ClientResponseError with its status, or ClientConnectorError.
# Version: fsspec 2026.9.0, aiohttp 3.14.5
# Source: fsspec/implementations/http.py (`_info`); fsspec issue 873, pull request 1849 (open)
# Why it matters: data sets in shards are read from HTTP servers that are restarted and rate-limited. A reader that leaves out
#   what is "not there", or makes an index by asking `exists`, quietly trains on less.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
cd "$work"
venv/bin/python - <<'EOF'
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import fsspec

print(*(f"{name} {version(name)}" for name in ("fsspec", "aiohttp")))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
with socket.socket() as free:  # a port where nobody listens
    free.bind(("127.0.0.1", 0))
    nobody = free.getsockname()[1]
base = f"http://127.0.0.1:{server.server_port}"
files, failed = fsspec.filesystem("http"), False
for what, url, cause in (
    ("404", f"{base}/404", "ClientResponseError"),
    ("503", f"{base}/503", "ClientResponseError"),
    ("refused", f"http://127.0.0.1:{nobody}/x", "ClientConnectorError"),
):
    try:
        files.info(url)
        how = "nothing was raised"
    except Exception as error:
        how = f"{type(error).__name__} from {type(error.__cause__).__name__}"
    found = how.startswith("FileNotFoundError") and (what == "404" or cause in how) and not files.exists(url)
    failed |= not found
    print("as found:" if found else "CHANGED: ", f"{what}: {how}, exists {files.exists(url)}")
raise SystemExit(failed)
EOF
