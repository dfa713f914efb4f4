"""What the first process does alone may take longer than the run's own group would wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mvar_lightning.callbacks import metrics
from mvar_lightning.errors import UserError
from mvar_lightning.tools.processes import done_by_first, is_lost_process
from tests.faults.harness import call, start

SECONDS = 2.0
"""So long the group waits, and so much longer takes the work."""


def on_a_rank(folder: str, rank: int) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS))
    for case in (refused, through_the_helper, of_a_classifier, plainly, ended):  # plainly breaks the group
        try:
            print(case.__name__, case(Path(folder)), flush=True)
        except (UserError, RuntimeError) as error:
            said = "lost" if is_lost_process(error) else str(error)
            print(case.__name__, type(error).__name__, said, flush=True)


def slowly(result: Any) -> Callable[..., Any]:
    def work(*_: Any) -> Any:
        assert dist.get_rank() == 0
        time.sleep(SECONDS + 1)
        return result

    return work


def refused(folder: Path) -> Any:
    def work() -> None:
        raise UserError("``count`` 0: too few")

    return done_by_first(work)


def through_the_helper(folder: Path) -> Any:
    return done_by_first(slowly("done"))


def of_a_classifier(folder: Path) -> Any:
    """As the metrics of a run ask for it."""
    names: Any = metrics
    names.run_data = lambda trainer: SimpleNamespace(image_data=lambda who: None)
    names.load_classifier = lambda file: SimpleNamespace(to=lambda device: file.name)
    names.classifier_file = slowly(folder)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(fast_dev_run=False, default_root_dir=folder, strategy=strategy)
    return metrics.classifier_of(trainer, "FID")


def plainly(folder: Path) -> Any:
    said = [slowly("done")() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]


def ended(folder: Path) -> Any:
    return done_by_first(lambda: os._exit(0))


def test_the_others_wait_for_long_work_and_hear_of_its_end(tmp_path: Path) -> None:
    started = [start(code=call(on_a_rank, str(tmp_path), rank), seconds=60) for rank in range(2)]
    for rank, answer in enumerate([each.finish() for each in started]):
        assert answer.status == 0, answer.err[-3000:]
        told = answer.out.splitlines()
        assert told[0] == "refused UserError count 0: too few"
        assert told[1:3] == ["through_the_helper done", f"of_a_classifier {tmp_path.name}"]
        if rank > 0:
            assert told[3].startswith("plainly") and "rror" in told[3], told
            assert told[4].startswith("ended") and told[4].endswith(" lost"), told
