"""The page's server: its files, and answers as lines of JSON that come as they are made.

It listens to this machine alone: other host names (a page elsewhere that resolves to 127.0.0.1) and requests from other
origins are refused, bodies are bounded while they are read, and no request names a file.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
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

HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

HOSTS = ["127.0.0.1", "localhost"]


def build_app(shelf: Shelf) -> Starlette:
    """The application for the models of a shelf."""
    turns = Turns()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        turns.close()

    routes = [
        Route("/api/models", partial(models, shelf)),
        Route("/api/picture", partial(picture, shelf), methods=["POST"]),
        Route("/api/stop", partial(stop, turns), methods=["POST"]),
        Route("/api/{name}", partial(answer, shelf, turns), methods=["POST"]),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS), Middleware(OwnPage)]
    errors = {UserError: _told}
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=errors)
    app.state.turns = turns
    return app


class OwnPage:
    """Refuses what a page from elsewhere sends, and gives every answer the headers that keep ours to itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers.get('host')}":
            await Response("requests from other pages are not answered", 403)(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers)


async def _told(request: Request, error: Exception) -> Response:
    """A mistake that is found before a job begins."""
    return JSONResponse({"event": "error", "message": line_of(error)}, 400)


async def models(shelf: Shelf, request: Request) -> Response:
    """Which models there are."""
    return JSONResponse(shelf.described())


async def picture(shelf: Shelf, request: Request) -> Response:
    """An uploaded picture, its middle square at the model's size, as the page works on it."""
    _check_type(request, "image/")
    data = await _body(request, UPLOAD_BYTES)
    described = {each["name"]: each for each in shelf.described()["models"]}
    name = request.query_params.get("model", "")
    if name not in described:
        raise UserError(f"model {name[:80]!r}: is not here")

    def cut() -> str:
        height_width, channels = described[name]["size"], described[name]["channels"]
        return png(to_unit(window(decode_picture(data, channels), size_of(*height_width)))[0])

    return JSONResponse({"event": "picture", "image": await run_in_threadpool(cut)})


async def stop(turns: Turns, request: Request) -> Response:
    """Stop a job."""
    content = _json(await _body(request, 1000))
    name = content.get("job") if isinstance(content, dict) else None
    return JSONResponse({"stopped": turns.stop(str(name))})


async def answer(shelf: Shelf, turns: Turns, request: Request) -> Response:
    """A job's events, a line each. The body is the request, and ``job`` its name."""
    name = request.path_params["name"]
    if name not in ANSWERS:
        return JSONResponse({"event": "error", "message": f"{name[:40]!r}: nothing of that name is answered"}, 404)
    _check_type(request, "application/json")
    content = _json(await _body(request, UPLOAD_BYTES))
    job = content.pop("job", "") if isinstance(content, dict) else ""
    if not isinstance(job, str) or not 8 <= len(job) <= 80:
        raise UserError("request: needs a job, a text of 8 to 80 characters by which it is stopped")
    kind, work = ANSWERS[name]
    asked = parse(kind, content)

    async def lines() -> AsyncIterator[bytes]:
        async for event in turns.run(job, lambda tell: work(shelf, asked, tell)):
            yield json.dumps(event).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _check_type(request: Request, wanted: str) -> None:
    """Raise `UserError` for a body of another type: one that a foreign page may send unasked, a form's for example."""
    if not request.headers.get("content-type", "").startswith(wanted):
        raise UserError(f"request: must be sent as {wanted.rstrip('/')}")


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than it may be long. Raises `UserError` for a longer one."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise UserError(f"upload: more than {most:,} bytes; take a smaller picture")
        parts.append(part)
    return b"".join(parts)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("request: is no JSON") from error
