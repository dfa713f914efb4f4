"""Checkpoints: the published files in and out, the suite's own folders, Lightning's files, and initial weights."""

from mvar_lightning.checkpoints.finetune import load_initial_weights
from mvar_lightning.checkpoints.folder import load, load_tokenizer, save
from mvar_lightning.checkpoints.official import export_official, import_official

__all__ = ["export_official", "import_official", "load", "load_initial_weights", "load_tokenizer", "save"]
