"""Data workers outlive the signals that tell a run to stop.

Schedulers signal every process of a job. A worker killed by that would end the run at once, before it has saved.
"""

from __future__ import annotations

import os
import signal
import threading


def outlive_stop_signals(worker: int) -> None:
    """For a loader's ``worker_init_fn``: of SIGTERM only the parent's counts, SIGUSR1 is left to the parent.

    The parent ends its workers by a message, and by SIGTERM if they do not hear it. Only `sigwaitinfo` tells who sent a
    signal, so a thread waits for it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
