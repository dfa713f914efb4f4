"""A process group of the test's own process, for what asks for one: DDP, FSDP2, their state dicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_KEPT: list[Any] = []


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """gloo among one, with its store in a folder.

    The group is left but kept alive. In torch 2.13 its end joins gloo's threads while it holds Python's lock, and a
    thread that is just giving back the work of DDP's last reduction may want that lock: both then wait for ever, and
    with them the worker that runs these tests.
    """
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    _KEPT.append(torch.distributed.group.WORLD)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
