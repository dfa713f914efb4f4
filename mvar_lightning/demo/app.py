"""The page's server: its files, and answers as lines of JSON that come as they are made.

It listens to this machine alone: other host names (a page elsewhere that resolves to 127.0.0.1) and requests from other
origins are refused, bodies are bounded while they are read and looked at beside the loop, and no request names a file.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from mvar_lightning.demo.answers import (
    answer_attention,
    answer_compared,
    answer_edited,
    answer_mask,
    answer_sampled,
    answer_tokens,
    png,
    window,
)
from mvar_lightning.demo.asked import (
    MOST_VALUES,
    UPLOAD_BYTES,
    Attention,
    Compared,
    Edited,
    Masked,
    Sampled,
    Tokens,
    decode_picture,
    parse,
)
from mvar_lightning.demo.shelf import Shelf
from mvar_lightning.demo.turns import Turns, line_of
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import size_of
from mvar_lightning.tools.drawing import to_unit

PAGE = Path(__file__).parent / "page"

ANSWERS: dict[str, tuple[type[Any], Callable[..., None]]] = {
    "sample": (Sampled, answer_sampled),
    "edit": (Edited, answer_edited),
    "compare": (Compared, answer_compared),
    "mask": (Masked, answer_mask),
    "tokens": (Tokens, answer_tokens),
    "attention": (Attention, answer_attention),
}
"""What may be asked for at ``/api/NAME``, and who answers."""

POLICY = "; ".join(
    (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:",
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )
)
"""Content-Security-Policy: the browser itself loads nothing from elsewhere."""

SMALL, PICTURE = 2**16, (UPLOAD_BYTES + 2) // 3 * 4
LONGEST = {"edit": 2 * PICTURE + SMALL, "tokens": PICTURE + SMALL, "attention": 8 * MOST_VALUES}
"""Bytes of a request, by name: pictures in base64, or tokens; of all others `SMALL`."""

HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

HOSTS = ["127.0.0.1", "localhost"]


def build_app(shelf: Shelf) -> Starlette:
    """The application for the models of a shelf."""
    turns, one = Turns(), CapacityLimiter(1)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        turns.close()

    routes = [
        Route("/api/models", partial(models, shelf)),
        Route("/api/picture", partial(picture, shelf, one), methods=["POST"]),
        Route("/api/stop", partial(stop, turns), methods=["POST"]),
        Route("/api/{name}", partial(answer, shelf, turns), methods=["POST"]),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    middleware = [Middleware(OwnPage), Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]
    errors = {UserError: _told}
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=errors)
    app.state.turns = turns
    return app


class OwnPage:
    """Refuses what a page from elsewhere sends, gives every answer the headers that keep ours to itself, and tells of a
    failure of ours in a line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        began = False

        async def with_headers(message: Any) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        if _from_elsewhere(headers, scope["path"]):
            await Response("requests from other pages are not answered", 403)(scope, receive, with_headers)
            return
        try:
            await self.app(scope, receive, with_headers)
        except Exception as error:
            if began:
                raise
            await _answer({"event": "error", "message": line_of(error)}, 500)(scope, receive, with_headers)


def _from_elsewhere(headers: dict[str, str], path: str) -> bool:
    """Whether another page sends this, by what browsers say of it; a link to the page itself may stand anywhere."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None and origin != f"http://{headers.get('host')}":
        return True
    link = headers.get("sec-fetch-dest") == "document" and not path.startswith("/api/")
    return site not in ("same-origin", "none") and not link


def _answer(content: Any, status: int = 200) -> Response:
    """JSON in ASCII: what was sent may hold halves of characters, which UTF-8 has no bytes for."""
    return Response(json.dumps(content), status, media_type="application/json")


async def _told(request: Request, error: Exception) -> Response:
    """A mistake that is found before a job begins."""
    return _answer({"event": "error", "message": line_of(error)}, 400)


async def models(shelf: Shelf, request: Request) -> Response:
    """Which models there are."""
    return _answer(shelf.described())


async def picture(shelf: Shelf, one: CapacityLimiter, request: Request) -> Response:
    """An uploaded picture, its middle square at the model's size, as the page works on it. One is decoded at a time."""
    _check_type(request, "image/")
    described = {each["name"]: each for each in shelf.described()["models"]}
    name = request.query_params.get("model", "")
    if name not in described:
        raise UserError(f"model {name[:80]!r}: is not here")
    data = await _body(request, UPLOAD_BYTES)

    def cut() -> str:
        height_width, channels = described[name]["size"], described[name]["channels"]
        decoded = decode_picture(data, channels, side=2 * max(height_width))
        return png(to_unit(window(decoded, size_of(*height_width)))[0])

    return _answer({"event": "picture", "image": await to_thread.run_sync(cut, limiter=one)})


async def stop(turns: Turns, request: Request) -> Response:
    """Stop a job."""
    content = _json(await _body(request, 1000))
    name = content.get("job") if isinstance(content, dict) else None
    return _answer({"stopped": turns.stop(str(name))})


async def answer(shelf: Shelf, turns: Turns, request: Request) -> Response:
    """A job's events, a line each. The body is the request, and ``job`` its name."""
    name = request.path_params["name"]
    if name not in ANSWERS:
        return _answer({"event": "error", "message": f"{name[:40]!r}: nothing of that name is answered"}, 404)
    _check_type(request, "application/json")
    data = await _body(request, LONGEST.get(name, SMALL))
    kind, work = ANSWERS[name]
    job, asked = await run_in_threadpool(_read, kind, data)

    async def lines() -> AsyncIterator[bytes]:
        async for event in turns.run(job, lambda tell: work(shelf, asked, tell)):
            yield json.dumps(event).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _read(kind: type[Any], data: bytes) -> tuple[str, Any]:
    """A job's name and what it asks for. Values are counted before JSON is parsed, which would hold all others up."""
    if data.count(b",") > MOST_VALUES:
        raise UserError(f"request: more than {MOST_VALUES:,} values")
    content = _json(data)
    job = content.pop("job", "") if isinstance(content, dict) else ""
    if not isinstance(job, str) or not 8 <= len(job) <= 80:
        raise UserError("request: needs a job, a text of 8 to 80 characters by which it is stopped")
    return job, parse(kind, content)


def _check_type(request: Request, wanted: str) -> None:
    """Raise `UserError` for a body of another type: one that a foreign page may send unasked, a form's for example."""
    if not request.headers.get("content-type", "").startswith(wanted):
        raise UserError(f"request: must be sent as {wanted.rstrip('/')}")


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than it may be long. Raises `UserError` for a longer one."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                more = "; take a smaller picture" if most >= UPLOAD_BYTES else ""
                raise UserError(f"upload: more than {most:,} bytes{more}")
            parts.append(part)
    except ClientDisconnect:
        raise UserError("upload: was broken off") from None
    return b"".join(parts)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("request: is no JSON") from error
