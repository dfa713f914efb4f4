"""Pictures written by threads while the next ones are made: compressing a PNG takes longer than a GPU's sampling."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

THREADS = 8
"""At most; Pillow lets other threads run while it compresses."""


class PictureWriter:
    """Writes one batch of pictures at a time; as a context, all are written when it ends.

    Args:
        write: writes a picture to a file, whole or not at all, and raises `UserError` where it cannot.
    """

    def __init__(self, write: Callable[[Tensor, Path], None]) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="png")
        self._running: list[Future[None]] = []

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._pool.shutdown()  # whatever ended the work, the pictures made before are worth their file
        if kind is None:
            self.wait()

    def add(self, pictures: Iterable[tuple[Tensor, Path]]) -> None:
        """Start writing a batch, once the one before is written. Raises what went wrong with that one."""
        self.wait()
        self._running = [self._pool.submit(self._write, picture_3HW, file) for picture_3HW, file in pictures]

    def wait(self) -> None:
        """Until all are written. Raises what went wrong with the first of them."""
        running, self._running = self._running, []
        wait(running)
        for future in running:
            future.result()
