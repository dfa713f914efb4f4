"""Remedies against unused codes that act on the codebook itself."""

from __future__ import annotations

from mvar_lightning.tokenizer.remedies.base import CodebookRemedy
from mvar_lightning.tokenizer.remedies.codes import take_replaced_codes
from mvar_lightning.tokenizer.remedies.initialization import DataDependentInit
from mvar_lightning.tokenizer.remedies.restart import DeadCodeRestart

__all__ = ["CodebookRemedy", "DataDependentInit", "DeadCodeRestart", "take_replaced_codes"]
