"""One job at a time: a queue with room for a few, each job with events for its visitor and a stop that stops."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mvar_lightning.errors import UserError

Event = dict[str, Any]
"""Plain values for the visitor."""

Tell = Callable[[Event], None]
"""Sends an event; raises `Stopped` where nobody waits for it any more. An empty one only looks whether to go on."""

Work = Callable[[Tell], None]

MOST_WAITING = 8
"""Jobs behind the one that runs; one more is sent away."""

LINE = 600
"""Characters of a message, at most; of a longer one both ends are told."""

LOOK = 0.5
"""Seconds after which a waiting visitor is told anew how many are before."""


class Stopped(Exception):
    """The visitor stopped the job, or left."""


class Turn:
    """One job of one visitor: the events of its thread on their way to the visitor's stream."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stopped = threading.Event()
        self.began = False
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._loop = loop

    def tell(self, event: Event) -> None:
        """`Tell`, called by the job's thread."""
        if self.stopped.is_set():
            raise Stopped
        if event:
            self.put(event)

    def put(self, event: Event | None) -> None:
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Turns:
    """The queue. Jobs run in one thread, in the order in which they came."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._turns: dict[str, Turn] = {}

    async def run(self, name: str, work: Work) -> AsyncIterator[Event]:
        """The events of a job, and last one called ``done``, ``stopped`` or ``error``. A visitor who leaves stops it.

        Args:
            name: by which `stop` knows the job; a visitor's own, and hard to guess.
        """
        if name in self._turns:
            yield {"event": "error", "message": f"job {name[:40]!r}: is there already"}
            return
        if len(self._turns) > MOST_WAITING:
            yield {"event": "error", "message": f"{MOST_WAITING} jobs are waiting already; try again in a while"}
            return
        turn = self._turns[name] = Turn(asyncio.get_running_loop())
        future, ended = self._pool.submit(_run, turn, work), False
        try:
            told = 0
            while True:
                ahead = [*self._turns].index(name)
                if not turn.began and ahead and ahead != told:
                    told = ahead
                    yield {"event": "waiting", "ahead": ahead}
                try:
                    event = await asyncio.wait_for(turn.events.get(), LOOK)
                except TimeoutError:
                    if turn.stopped.is_set() and future.cancel():
                        yield {"event": "stopped"}
                        return
                    continue
                if event is None:
                    ended = True
                    return
                yield event
        finally:
            turn.stopped.set()
            if ended or future.cancel():
                del self._turns[name]
            else:  # the visitor left; others wait until its thread is free
                future.add_done_callback(lambda done: self._turns.pop(name))

    def stop(self, name: str) -> bool:
        """Stop a job after the scale at which it is, or the reading of its model; whether there is one of this name."""
        turn = self._turns.get(name)
        if turn is not None:
            turn.stopped.set()
        return turn is not None

    def close(self) -> None:
        """Stop all jobs."""
        for turn in self._turns.values():
            turn.stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _run(turn: Turn, work: Work) -> None:
    turn.began = True
    try:
        turn.tell({"event": "begun"})
        work(turn.tell)
        turn.put({"event": "done"})
    except Stopped:
        turn.put({"event": "stopped"})
    except Exception as error:
        turn.put({"event": "error", "message": line_of(error)})
    finally:
        turn.put(None)


def line_of(error: Exception) -> str:
    """What to say of an error in the page; in the log stands one line, or of a bug of ours where it came from."""
    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, MemoryError) or "memory" in str(error).lower():
        message = "not enough memory for this; ask for fewer images, or a smaller model"
    else:
        traceback.print_exception(error, file=sys.stderr)
        message = f"the server failed ({type(error).__name__}); its log says where"
    message = _one_line(message)
    print(f"mvar demo: {message}", file=sys.stderr, flush=True)
    return message


def _one_line(message: str) -> str:
    """Without line ends and other signs by which a visitor could write lines of his own into the log."""
    if len(message) > LINE:
        message = f"{message[: LINE * 2 // 3]} ... {message[-LINE // 3 :]}"
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message)
