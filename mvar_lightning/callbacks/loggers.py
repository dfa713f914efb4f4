"""What goes to a run's loggers beside scalars: pictures, TensorBoard's charts, the report at the end.

TensorBoard, Weights & Biases and MLflow take pictures; a CSV file takes numbers alone (the run's folder has them).

HW pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

SCALES = r"^{}_scale_\d+$"
CHARTS = {
    "validation": {
        "loss": ["Multiline", [r"^val/loss$", r"^train/loss$"]],
        "FID": ["Multiline", [r"^val/r?fid_(?!.*(images|reference)).*"]],
        "PSNR": ["Multiline", [r"^val/psnr$"]],
    },
    "scales": {
        "val/loss": ["Multiline", [SCALES.format("val/loss")]],
        "val/accuracy": ["Multiline", [SCALES.format("val/accuracy")]],
        "train/loss": ["Multiline", [SCALES.format("train/loss")]],
        "predictions/perplexity": ["Multiline", [SCALES.format("predictions/perplexity")]],
        "codebook/usage": ["Multiline", [SCALES.format("codebook/usage")]],
    },
}
"""TensorBoard's custom scalars: what matters first, and one chart with all scales."""


class ScaleCharts(pl.Callback):
    """Lays out TensorBoard's tab of custom scalars: validation first, and one chart for all scales."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own: list[Any] = list(trainer.loggers) if trainer.is_global_zero else []
        for logger in own:
            if kind_of_logger(logger) == "TensorBoardLogger":
                logger.experiment.add_custom_scalars(CHARTS)


def log_picture(trainer: pl.Trainer, picture_3HW: Tensor, tag: str) -> None:
    """A picture in [0, 1] to every logger that takes pictures."""
    for logger in trainer.loggers:
        kind: str | None = kind_of_logger(logger)
        own: Any = logger
        if kind == "TensorBoardLogger":
            own.experiment.add_image(tag, picture_3HW, global_step=trainer.global_step)
        elif kind == "MLFlowLogger":
            name = f"{tag.replace('/', '_')}/{trainer.global_step:08d}.png"  # an artifact: shown in the browser
            own.experiment.log_image(own.run_id, _pixels(picture_3HW), name)
        elif callable(getattr(own, "log_image", None)):  # Lightning's own name for it: Weights & Biases and others
            own.log_image(tag, [_pixels(picture_3HW)])


def log_report(trainer: pl.Trainer, report: Mapping[str, Any]) -> None:
    """The numbers of a run's report that no metric has: seconds, sizes, memory, the best value."""
    numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
    if isinstance(best := report.get("best"), dict):
        numbers |= {f"best_{best['monitor'].replace('/', '_')}": best["value"], "best_step": best["step"]}
    for logger in trainer.loggers:
        logger.log_metrics({f"report/{name}": float(value) for name, value in numbers.items()}, trainer.global_step)
        logger.save()


def kind_of_logger(logger: object) -> str | None:
    """Its class in Lightning, or the one that it comes from; loggers' packages need not be there to ask."""
    known = ("TensorBoardLogger", "MLFlowLogger", "WandbLogger", "CSVLogger")
    return next((cls.__name__ for cls in type(logger).__mro__ if cls.__name__ in known), None)


def _pixels(picture_3HW: Tensor) -> Any:
    return (picture_3HW.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
