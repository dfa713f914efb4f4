"""What a finished run has come to: `metrics.json`, and a short table with the paths of everything it made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mvar_lightning.runs.run import DAMAGED, Run
from mvar_lightning.tools.console import print_table
from mvar_lightning.tools.files import read_json, write_json

if TYPE_CHECKING:
    from mvar_lightning.runs.recipe import SuiteCLI

SHOWN = ("val/", "codebook/usage")


def write_report(run: Run, cli: SuiteCLI) -> None:
    """Write ``metrics.json``: last validation metrics, sizes, speed and memory of the run.

    The seconds are those of training with its validations, over all the times that the run was taken up again.
    """
    from mvar_lightning.callbacks import LastCheckpoint
    from mvar_lightning.tools.compute import peak_memory_bytes

    module: Any = cli.model
    trainer: Any = cli.trainer
    latest: dict[str, float] = {}
    seconds = sum(c.state_dict()["seconds"] for c in trainer.callbacks if isinstance(c, LastCheckpoint))
    for callback in trainer.callbacks:
        latest |= getattr(callback, "latest", {})
    core = getattr(module, "model", module.tokenizer)
    report = {
        "recipe": str(run.recipe),
        "overrides": list(run.overrides),
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in core.parameters()),
        "seconds_per_step": latest.get("speed/step_seconds"),
        "peak_memory_bytes": peak_memory_bytes(trainer.strategy.root_device),
        "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
    }
    if hasattr(module, "model"):
        report["attention"] = repr(core.strategy)
        # keys and values that sampling one unguided image holds, in the model's precision
        elements = 2 * core.backend.plan.cache_tokens * core.width * core.depth
        report["kv_cache_bytes_per_image"] = elements * next(core.parameters()).element_size()
    write_json(run.metrics_file, report)


def print_report(run: Run) -> None:
    """The table at the end of `mvar train`."""
    report = read_json(run.metrics_file, DAMAGED)
    shown = {name: value for name, value in report["metrics"].items() if name.startswith(SHOWN)}
    rows = [
        ("steps", f"{report['steps']:,} in {report['seconds']:.0f} s"),
        ("parameters", f"{report['parameters']:,}"),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        *((name, f"{value:.4g}") for name, value in shown.items() if "_scale_" not in name),
    ]
    print_table(rows, title=str(run.recipe))
    written = {
        "samples": run.folder / "samples.png",
        "reconstructions": run.folder / "reconstructions.png",
        "metrics": run.metrics_file,
        "checkpoint": run.last_checkpoint,
        "weights": run.model_folder,
        "TensorBoard": run.folder / "tensorboard",
    }
    for label, path in written.items():
        if path.exists():
            print(f"  {label:<12} {path}")
