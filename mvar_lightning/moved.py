"""Module names of version 0.1: they work for one more version, and each tells its new name once, in one line.

Recipes and scripts name classes by path (``mvar_lightning.modules.VARModule``). For an old name a finder in
``sys.meta_path`` makes a module that looks its names up in the new places; nothing is imported before one is asked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "mvar_lightning"
UNTIL = "0.3"

MOVED = {
    "analysis": "evaluation",
    "analysis.alignment": "evaluation.papers.alignment",
    "analysis.analysis_files": "evaluation.papers.figures tools.console evaluation.reports",
    "analysis.attention_mass": "evaluation.papers.attention_mass",
    "analysis.curves": "runs.sweep_results",
    "analysis.image_evaluation": "evaluation.images evaluation.image_job",
    "analysis.image_features": "evaluation.images",
    "analysis.image_files": "evaluation.images evaluation.reports",
    "analysis.image_report": "evaluation.images evaluation.reports",
    "analysis.image_sources": "evaluation.image_sources",
    "analysis.perturbation": "evaluation.papers.perturbation",
    "analysis.quality": "metrics.quality",
    "analysis.scaling": "evaluation.papers.scaling",
    "analysis.size_watch": "evaluation.image_sources",
    "analysis.strips": "evaluation.strips tools.drawing",
    "analysis.style": "tools.plots",
    "analysis.sweep_results": "runs.sweep_results",
    "analysis.sweeps": "runs.sweep runs.sweep_results",
    "analysis.tokenizer": "evaluation.tokenizer",
    "analysis.tokenizer_files": "evaluation.reports",
    "analysis.tokenizer_report": "evaluation.reports",
    "attention.neighborhood": "attention.strategies",
    "callbacks.access": "callbacks.base data.reading.loader tools.drawing",
    "callbacks.checkpoint_io": "callbacks.last_checkpoint",
    "callbacks.guards": "callbacks.monitors",
    "callbacks.judge": "evaluation.features callbacks.metrics",
    "callbacks.pictures": "tools.drawing",
    "callbacks.samples": "callbacks.run_pictures",
    "callbacks.stop_signals": "callbacks.last_checkpoint",
    "callbacks.throughput": "callbacks.monitors tools.compute",
    "checkpoints.buffers": "checkpoints.official_sizes",
    "checkpoints.files": "tools.files",
    "checkpoints.key_maps": "checkpoints.official_names",
    "checkpoints.sizes": "checkpoints.official_sizes",
    "commands.allocator": "tools.compute",
    "commands.evaluate_images": "commands.evaluate",
    "commands.evaluation_options": "commands.options evaluation.features",
    "commands.evaluation_plan": "evaluation.image_request",
    "commands.export": "commands.checkpoints",
    "commands.folder_lock": "tools.files",
    "commands.image_jobs": "evaluation.image_job evaluation.image_request",
    "commands.import_": "commands.checkpoints",
    "commands.info": "commands.checkpoints",
    "commands.lightning_cli": "runs.recipe",
    "commands.out_folder": "tools.files",
    "commands.picture_writer": "tools.drawing",
    "commands.processes": "tools.processes",
    "commands.progress": "tools.console",
    "commands.recipe_errors": "runs.recipe_check",
    "commands.report": "runs.train",
    "commands.run": "commands.train",
    "commands.run_data": "runs.run",
    "commands.runs": "runs.run",
    "commands.sampling_jobs": "sampling.jobs",
    "commands.sampling_options": "commands.options checkpoints.source tools.compute "
    "transformer.acceleration sampling.jobs",
    "commands.spreading": "tools.processes",
    "commands.token_jobs": "data.tokens.encoding",
    "commands.tokenizer_options": "commands.options checkpoints.source",
    "data.chunks": "data.making.writer",
    "data.embedded": "data.making.embedded data.making.shards",
    "data.faults": "data.reading.samples data.reading.loader data.images",
    "data.ground_truth": "data.making.imagenet",
    "data.imagenet": "data.making.imagenet data.images",
    "data.listing": "data.making.sources data.images",
    "data.loader": "data.reading.loader",
    "data.modules": "data.image_data",
    "data.photos": "data.making.embedded",
    "data.reading": "data.reading.samples",
    "data.remote": "data.reading.place",
    "data.resizing": "data.transforms",
    "data.shards": "data.making.shards",
    "data.sources": "data.making.sources data.making.imagenet",
    "data.streaming": "data.reading.order data.reading.loader",
    "data.token_cache": "data.tokens.cache data.index tools.files",
    "data.token_making": "data.tokens.making",
    "data.token_order": "data.token_data data.reading.order",
    "data.token_shards": "data.token_data",
    "data.token_stream": "data.token_data data.reading.order",
    "data.token_views": "data.tokens.making",
    "data.training_data": "data.image_data",
    "data.urls": "data.reading.place",
    "data.work_folder": "data.making.shards",
    "data.worker_signals": "data.reading.loader",
    "data.writing": "data.making.writer",
    "evaluating": "tools.compute",
    "metrics.inception_score": "metrics.precision_recall",
    "modules": "training",
    "modules.families": "training.next_scale",
    "modules.first_images": "training.manual_steps",
    "modules.kept_memory": "training.scale_groups",
    "modules.manual_steps": "training.manual_steps",
    "modules.means": "training.distributed",
    "modules.next_scale": "training.next_scale",
    "modules.optim": "training.optimizers",
    "modules.reproducible": "training.distributed",
    "modules.scale_groups": "training.scale_groups",
    "modules.sharding": "training.distributed",
    "modules.token_loss": "training.token_loss",
    "modules.tokenizer_checkpoint": "training.manual_steps",
    "modules.tokenizer_defaults": "training.tokenizer",
    "modules.tokenizer_module": "training.tokenizer",
    "modules.tokenizer_optimizers": "training.optimizers",
    "modules.tokenizer_start": "training.tokenizer",
    "sampling.edit": "sampling.editing",
    "sampling.filters": "sampling.draws",
    "sampling.generate": "sampling.sampler",
    "sampling.noise": "sampling.draws",
    "sampling.settings": "sampling.sampler",
    "tokenizer.convolution": "tokenizer.autoencoder",
    "tokenizer.diff_augment": "tokenizer.discriminator",
    "tokenizer.entropy": "tokenizer.losses",
    "tokenizer.fingerprint": "tokenizer.tokenizer",
    "tokenizer.frozen": "tokenizer.perceptual",
    "tokenizer.gan_losses": "tokenizer.adversarial",
    "tokenizer.lecam": "tokenizer.adversarial",
    "tokenizer.norms": "tokenizer.autoencoder",
    "tokenizer.pairing": "tokenizer.tokenizer",
    "tokenizer.ranks": "tools.processes",
    "tokenizer.remedies": "tokenizer.codebook",
    "tokenizer.remedies.base": "tokenizer.codebook",
    "tokenizer.remedies.codes": "tokenizer.codebook",
    "tokenizer.remedies.initialization": "tokenizer.codebook",
    "tokenizer.remedies.restart": "tokenizer.codebook",
    "tokenizer.resize": "tokenizer.quantizer",
    "tokenizer.scale_dropout": "tokenizer.quantizer",
    "tokenizer.usage": "tokenizer.codebook metrics.quality",
    "transformer.bf16": "transformer.acceleration",
    "transformer.compiled": "transformer.acceleration",
    "transformer.init": "transformer.transformer",
    "transformer.layers": "transformer.blocks",
    "transformer.products": "transformer.linear",
    "transformer.rope": "transformer.positions",
    "transformer.scale_graphs": "transformer.acceleration",
}
"""Old name to new ones, both without the package's; where a file was split, the one that has most of it is first."""

READING = "data.reading"
"""The one old file whose name a room has now; the room asks for the file's names itself."""

BENCHMARKS = (
    "mvar_lightning.benchmarks: measurements left the package; in a clone of the repository they are the folder "
    "benchmarks/ (python -m benchmarks --help)"
)


def install() -> None:
    """Let old names be found. A second call does nothing.

    Before the others: an update leaves the folders of old rooms behind, with compiled files in them, which Python's own
    finder takes for empty packages.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finder and loader in one (not of `importlib.abc`, whose import takes longer than the package's)."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        inside = name.removeprefix(f"{PACKAGE}.")
        old = (inside in MOVED and inside != READING) or inside.partition(".")[0] == "benchmarks"
        if inside == name or not old:
            return None
        loader: Any = self
        return ModuleSpec(name, loader, is_package=True)  # a package, since old modules may be asked for inside it

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name.removeprefix(f"{PACKAGE}.") not in MOVED:
            raise ImportError(BENCHMARKS, name=spec.name)
        room, _, file = spec.name.rpartition(".")
        if callable(vars(sys.modules[room]).get(file)):
            sys.modules[room].__class__ = _Room
        return old_module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@cache
def old_module(name: str) -> ModuleType:
    """The module that stands for an old name, given with the package's."""
    return _Moved(name)


class _Moved(ModuleType):
    """An old module. It looks up every name anew, so that it never holds another object than the new one."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._targets = [f"{PACKAGE}.{new}" for new in MOVED[name.removeprefix(f"{PACKAGE}.")].split()]
        self._told = False

    def __getattr__(self, name: str) -> Any:
        # what the import system and inspectors ask of every module is not worth a line, nor the new module's business
        if not (name.startswith("__") and name != "__all__"):
            for target in self._targets:
                found = getattr(import_module(target), name, self)
                if found is not self:
                    if not self._told:
                        self._told = True
                        line = f"{self.__name__} is now {target}; the old name works until {UNTIL}"
                        # without the caller's place, which for a recipe would be a line in the parser's code
                        warnings.warn_explicit(line, FutureWarning, PACKAGE, 0)
                    return found
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it is now {self._targets[0]}")


class _Room(ModuleType):
    """A room with a function that an old file had its name from (`sampling.generate`): the function stays.

    The import system sets every module that it loads as an attribute of its package.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, _Moved) and name in vars(self)):
            super().__setattr__(name, value)
