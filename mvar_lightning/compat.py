"""Private doors of libraries, each with a test: what no public name gives."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator


def end_workers(loader: Any) -> None:
    """End the worker processes of a loader whose `_iterator` is a DataLoader's, and forget the iterator.

    Lightning's own way at the end of a run; a DataLoader has only its destructor, which comes when memory is tidied.
    """
    _shutdown_workers_and_reset_iterator(loader)
