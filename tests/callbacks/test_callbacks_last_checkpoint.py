"""When the checkpoint to go on from is written; exact resumption is proven in `tests/training/test_resume.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from mvar_lightning.callbacks import LastCheckpoint, NonFiniteLossGuard
from mvar_lightning.errors import UserError

LAST = Path("checkpoints/last.ckpt")


class Places(pl.Callback):
    """Batches of the epoch done at each checkpoint."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        done = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
        self.found.append((trainer.current_epoch, done))


@pytest.mark.parametrize(
    ("last", "settings", "places"),
    [
        (LastCheckpoint(), {}, [(0, 6), (0, 6), (1, 6), (1, 6)]),
        (LastCheckpoint(), {"check_val_every_n_epoch": 2}, [(0, 6), (1, 6), (1, 6)]),
        (LastCheckpoint(every_steps=2), {"limit_val_batches": 0}, [(0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (1, 6)]),
        (LastCheckpoint(every_minutes=0), {"limit_val_batches": 0, "max_epochs": 1}, [(0, n) for n in range(1, 7)]),
        (
            LastCheckpoint(every_steps=1),
            {"limit_val_batches": 0, "accumulate_grad_batches": 2},
            [(epoch, batches) for epoch in (0, 1) for batches in (2, 4, 6)],
        ),
        (LastCheckpoint(every_steps=1), {"fast_dev_run": True}, []),
    ],
)
def test_where_it_is_written(
    last: LastCheckpoint, settings: dict[str, Any], places: Any, make_trainer: Any, module: Any, data: Any
) -> None:
    seen = Places()
    settings = {"num_sanity_val_steps": 2, "enable_checkpointing": True, **settings}
    trainer = make_trainer(seen, last, **settings)
    trainer.fit(module, datamodule=data)
    assert seen.found == places
    assert (Path(trainer.default_root_dir) / LAST).exists() == bool(places)


def test_seconds_of_a_run_are_those_of_all_its_parts(make_trainer: Any, make_module: Any, data: Any) -> None:
    first = LastCheckpoint()
    trainer = make_trainer(first, enable_checkpointing=True, max_epochs=1)
    trainer.fit(make_module(), datamodule=data)
    path = Path(trainer.default_root_dir) / LAST
    earlier = torch.load(path, weights_only=True)["callbacks"]["LastCheckpoint"]["seconds"]
    assert 0 < earlier <= first.state_dict()["seconds"]
    second = LastCheckpoint()
    make_trainer(second, enable_checkpointing=True, max_epochs=2).fit(make_module(), datamodule=data, ckpt_path=path)
    assert second.state_dict()["seconds"] > earlier


def test_a_guard_names_it(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    module.poison_at = 8
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        NonFiniteLossGuard(), LastCheckpoint(), logger=logger, enable_checkpointing=True, max_epochs=3
    )
    with pytest.raises(UserError, match=r"loss at step 8: not finite; the last good checkpoint is .*last\.ckpt"):
        trainer.fit(module, datamodule=data)
    assert torch.load(Path(trainer.default_root_dir) / LAST, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("wrong", "said"), [({"every_steps": 0}, "every_steps 0"), ({"every_minutes": -1}, "minutes -1")]
)
def test_wrong_intervals(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LastCheckpoint(**wrong)
