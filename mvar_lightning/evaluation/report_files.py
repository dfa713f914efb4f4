"""What every evaluation leaves in a folder: numbers as JSON, Markdown, and pictures, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import writing

Draw = Callable[[Path], Any]
"""Writes a picture to a file."""


def write_report(folder: Path, files: Mapping[str, str | Draw]) -> list[Path]:
    """Write files by name, a text or what a function draws; the folder is made if it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    targets = [folder / name for name in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(*targets) as asides:
            for aside, content in zip(asides, files.values(), strict=True):
                if isinstance(content, str):
                    aside.write_text(content, encoding="utf-8")
                else:
                    content(aside)
    except OSError as error:
        raise UserError(f"``out`` {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return targets


def markdown_of(title: str, tables: Sequence[str], notes: Sequence[str], about: Mapping[str, Any]) -> str:
    """A report in Markdown: tables, notes, and what was measured on; what is None there is left out."""
    told = [f"{name.replace('_', ' ')}: {value}" for name, value in about.items() if value is not None]
    lists = ["".join(f"- {line}\n" for line in lines) for lines in (notes, told) if lines]
    return "\n".join([f"# {title}\n", *tables, *lists])
