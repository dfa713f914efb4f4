"""Folders of ``torch.distributed.checkpoint``: their tensors made whole on the way, without executing anything.

Such a folder has a pickled table of what lies where (``.metadata``) and files of tensors. torch reads the table with
`pickle`; here only the table's own classes are made (dataclasses of plain values), and of the rest tensors alone are
read, which torch loads with ``weights_only``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import in_a_line

TABLE = ".metadata"
TABLE_ROOMS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
TABLE_CLASSES = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo",
)  # fmt: skip
PLAIN = {("collections", "OrderedDict"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
PATHS = {("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}


class _Table(pickle.Unpickler):
    """Makes what a table of contents consists of, and refuses all else before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PATHS:
            return PurePosixPath  # where it was saved; nobody opens it
        if (module in TABLE_ROOMS and name in TABLE_CLASSES) or (module, name) in PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format
        ):
            return getattr(torch, name)
        raise _RefusedError(f"{module}.{name}")


class _RefusedError(Exception):
    """Something else than a table's classes."""


class _Reader(FileSystemReader):
    """torch's reader of the files, given the table."""

    def __init__(self, path: Path, table: Metadata) -> None:
        super().__init__(path)
        self.table = table

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.table


def table_of(path: Path) -> Metadata:
    """What lies where in a distributed checkpoint.

    Raises:
        UserError: no such table, a damaged one, or one that asks for anything to be run or leaves the folder.
    """
    try:
        with (path / TABLE).open("rb") as file:
            table = _Table(file).load()
    except _RefusedError as error:
        raise UserError(
            f"{path}: refused, its {TABLE} asks for {error} while being read; only a table of tensors is accepted "
            "(nothing was executed)"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: its {TABLE} is not readable ({in_a_line(error, 160)})") from error
    entries, places = getattr(table, "state_dict_metadata", None), getattr(table, "storage_data", None)
    if not isinstance(table, Metadata) or not isinstance(entries, dict) or not isinstance(places, dict):
        raise UserError(f"{path}: its {TABLE} is no table of a distributed checkpoint")
    for place in places.values():
        name = str(getattr(place, "relative_path", ""))
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path}: its {TABLE} names a file outside of the folder ({name[:80]})")
    return table


def outline(path: Path) -> dict[str, Tensor]:
    """The tensors of a distributed checkpoint by name, on the meta device: shapes and types alone."""
    entries = table_of(path).state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_distributed(path: Path, outlined: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These tensors of `outline`, read and made whole from the parts of all processes. Nothing else is read.

    Raises:
        UserError: a file of the folder is missing or damaged.
    """
    whole = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in outlined.items()}
    try:
        load(dict(whole), storage_reader=_Reader(path, table_of(path)), no_dist=True)
    except CheckpointException as error:  # no Exception: it comes from BaseException
        reason = next((cause for cause, _ in error.failures.values() if isinstance(cause, Exception)), None)
        if isinstance(reason, MemoryError):
            raise reason from error
        words = "" if reason is None else f" ({in_a_line(reason, 200)})"
        raise UserError(f"{path}: its files are not what its {TABLE} says{words}") from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # another table than torch's reader can use
        raise UserError(f"{path}: its files are not what its {TABLE} says ({in_a_line(error, 200)})") from error
    return whole
