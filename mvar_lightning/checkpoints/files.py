"""Reading and writing files of tensors. Nothing in a file is ever executed.

PyTorch files are read with ``weights_only`` and, where their form allows, memory-mapped: tensors then take memory
only as they are copied out.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mvar_lightning.errors import UserError


def read_torch(path: str | Path) -> Any:
    """The content of a ``torch.save`` file: tensors on the CPU and plain values.

    Raises:
        UserError: no such file, a truncated or foreign file, or one that holds anything but tensors and plain values.
    """
    path = existing_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        blocked = re.search(r"unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
        if blocked:
            raise UserError(
                f"{path}: refused, it asks to run {blocked[1]} while being read; only tensors and plain values are "
                "accepted (nothing was executed)"
            ) from error
        raise UserError(
            f"{path}: not readable as a PyTorch file of tensors ({type(error).__name__}): it is truncated, of another "
            "kind, or a pickle with code (nothing was executed)"
        ) from error


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises `UserError` where it cannot be read."""
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file (truncated, or of another kind): {error}") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises `UserError` where it cannot be read."""
    path = existing_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def existing_file(path: str | Path) -> Path:
    """The path of a file that is there. Raises `UserError` otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    return path


def write_tensors(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write as safetensors where the name says so, else as ``torch.save`` does."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if Path(path).suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


@contextmanager
def written_aside(*targets: str | Path) -> Iterator[list[Path]]:
    """Paths to write to in place of ``targets``; they take the targets' names only if nothing fails."""
    asides: list[Path] = []
    try:
        for target in map(Path, targets):
            if not target.parent.is_dir():
                raise UserError(f"{target}: the folder {target.parent} does not exist")
            handle, name = tempfile.mkstemp(prefix=".aside-", suffix=target.suffix, dir=target.parent)
            os.close(handle)
            asides.append(Path(name))
        yield asides
        for aside, path in zip(asides, targets, strict=True):
            aside.chmod(0o666 & ~_umask())
            aside.replace(path)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
