"""Work shared among processes of one machine: every N-th item to each, on its own GPU or its share of the cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from mvar_lightning.errors import UserError

Work = Callable[[Sequence[Any], int, Callable[[Any], None]], None]
"""(items, rank, send): does the items in turn and sends anything but text to whoever shares them out."""


def spread(work: Work, items: Sequence[Any], processes: int, device: str, receive: Callable[[Any], None]) -> None:
    """Do all items and pass on what is sent; in this process where there is only one.

    Args:
        work: can be sent to other processes.
        items: the same.
        processes: at most; never more than there are items.
        device: its type; with ``cuda``, process r has GPU r as its current one.
        receive: told what each process sends.

    Raises:
        UserError: where one of the processes does; the others are ended.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        work(items, 0, receive)
        return
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(_process, (work, items, processes, device, queue), nprocs=processes, join=False, daemon=True)
    assert context is not None
    ended = False
    while not ended:
        ended = context.join(timeout=0.1)
        while not queue.empty():
            sent = queue.get()
            if isinstance(sent, str):
                for process in context.processes:
                    process.terminate()
                raise UserError(sent)
            receive(sent)
        time.sleep(0.05)


def _process(rank: int, work: Work, items: Sequence[Any], processes: int, device: str, queue: Any) -> None:
    import os

    import torch

    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        work(items[rank::processes], rank, queue.put)
    except UserError as error:
        queue.put(str(error))
