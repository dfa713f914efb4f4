"""How this process gets memory: on a CPU with glibc, tensors that are freed are not handed back to the system."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of the settings for ``mallopt`` (glibc, `malloc.h`)."""

NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensor. By default glibc gives large blocks back at once, and every step gets them
    again page by page, filled with zeros: 10% to 15% of a training step (VAR-d16's sizes, two cores).

    The process stays as large as it was at its largest. Returns whether there was something to set.
    """
    if not sys.platform.startswith("linux"):
        return False
    setting = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return setting is not None and all(setting(name, NEVER) for name in (TRIM_THRESHOLD, MMAP_THRESHOLD))
