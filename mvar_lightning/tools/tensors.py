"""Files of tensors and arrays: what ``torch.save``, safetensors and numpy write, read without executing anything.

PyTorch files are read with ``weights_only`` and, where their form allows, memory-mapped: tensors then take memory
only as they are copied out. torch itself is imported only when there is something to read or to write.
"""

from __future__ import annotations

import lzma
import math
import os
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import existing_file, in_a_line, write, writing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CHECKING_THREADS = 4

SETTINGS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|omegaconf\.[\w.]+|typing\.\w+|collections\.defaultdict|"
    r"builtins\.(?:dict|list|tuple|int|float|str|bool)|pathlib\.[\w.]+|numpy\.[\w.]+"
)
"""Classes of the settings that trainers save beside weights, and what makes numpy's numbers: a stand-in of ours takes
their place."""


def read_torch(path: str | Path, whole: bool = True) -> Any:
    """The content of a ``torch.save`` file: tensors on the CPU and plain values.

    Args:
        whole: compare the checksums that the file keeps of its tensors, too, and not only of what describes them. That
            reads all of it, at one to several GB a second once it is in memory.

    Raises:
        UserError: no such file, a truncated, damaged or foreign file, or one that holds anything but tensors, plain
            values and settings (`SETTINGS`).
    """
    path = existing_file(path)
    try:
        _compare_checksums(path, whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _load(path)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        if blocked := _blocked(error):
            raise UserError(
                f"{path}: refused, it asks to run {blocked} while being read; only tensors and plain values are "
                "accepted (nothing was executed)"
            ) from error
        raise UserError(
            f"{path}: not readable as a PyTorch file of tensors ({type(error).__name__}): it is truncated, of another "
            "kind, or a pickle with code (nothing was executed)"
        ) from error


def _load(path: Path, settings: tuple[str, ...] = (), mapped: bool = True) -> Any:
    """Tensors and plain values; of the settings that trainers put beside them (an argparse.Namespace, OmegaConf's
    containers) an empty stand-in each, whose class is ours: nothing of theirs is called."""
    import torch

    try:
        with torch.serialization.safe_globals([(Left, name) for name in settings]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except RuntimeError as error:
        if not mapped or "mmap can only be used" not in str(error):
            raise
        return _load(path, settings, mapped=False)  # torch's older form
    except pickle.UnpicklingError as error:
        name = _blocked(error)
        if name is None or name in settings or not SETTINGS.fullmatch(name):
            raise
        return _load(path, (*settings, name), mapped)


def _blocked(error: Exception) -> str | None:
    """What a file asked for and did not get."""
    found = re.search(r"unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
    if found is None:
        return None
    return found[1] if "." in found[1] else f"builtins.{found[1]}"


class Left:
    """Stands where a file holds an object of settings. Takes whatever it is given and keeps none of it."""

    def __new__(cls, *_: object, **__: object) -> Left:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass


def _compare_checksums(path: Path, whole: bool) -> None:
    """Read members of the zip archive that ``torch.save`` writes, which fails where one is not as it was written.

    torch puts a CRC-32 beside each of them, and never looks at it again.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # torch's older form, without checksums
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if not any(member.CRC for member in members):
        return  # written with `torch.serialization.set_crc32_options(False)`
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise zipfile.BadZipFile("compressed")
    names = [member.filename for member in members if whole or "/data/" not in member.filename]
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        list(pool.map(partial(_read_members, path), [names[i::CHECKING_THREADS] for i in range(CHECKING_THREADS)]))


def _read_members(path: Path, names: Sequence[str]) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(name) as member:
                try:
                    while member.read(1 << 22):
                        pass
                except zipfile.BadZipFile as error:
                    words = "copy it again, or take an earlier one"
                    raise UserError(f"{path}: damaged, {name} in it is not what was written; {words}") from error


def safetensors_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors file, from its header alone. Raises `UserError` as `read_safetensors`."""
    return _from_safetensors(path, lambda file, key: tuple(file.get_slice(key).get_shape()))


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises `UserError` where it cannot be read."""
    return _from_safetensors(path, lambda file, key: file.get_tensor(key))


def _from_safetensors(path: str | Path, take: Callable[[Any, str], Any]) -> dict[str, Any]:
    from safetensors import safe_open

    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: take(file, key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except MemoryError:
        raise
    except Exception as error:
        reason = in_a_line(error)
        raise UserError(f"{path}: not a readable safetensors file (truncated, or of another kind): {reason}") from error


def write_tensors(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write as safetensors where the name says so, else as ``torch.save`` does; as `write` does."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path, state = Path(path), {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if path.suffix != ".safetensors":
        return write(path, lambda file: torch.save(state, file))
    with writing(path) as (aside,):
        try:
            save_file(state, aside)
        except SafetensorError as error:  # its words for what the system said
            told = re.search(r"\(os error (\d+)\)", str(error))
            if told is None:
                raise
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error


# Archives of arrays (npz)


DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,  # NumPy's second try at an array's header
    TypeError,  # a header with another type among its words
    KeyError,  # a damaged name
    RuntimeError,  # NotImplementedError with it: zipfile's answer to flags that say encrypted or an unknown method
)
"""What reading an npz of damaged bytes raises: NumPy, zipfile and its decompressors each have their own."""


def open_arrays(path: Path) -> Any:
    """An npz that is open for reading, nothing unpickled.

    Raises:
        UserError: it is missing, no npz, or an array's size is not the one that its header tells: memory is taken by
            the header.
    """
    import numpy as np

    existing_file(path)
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.lib.npyio.NpzFile):
            assert file.zip is not None
            _check_sizes(file.zip)
    except DAMAGED as error:
        raise UserError(
            f"{path}: not a readable npz: damaged, of another kind, or pickled ({in_a_line(error)})"
        ) from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: is a single array, not an npz; write it with numpy.savez")
    return file


def array_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type of an array, from the start of its file or of an npz's member.

    Raises:
        ValueError: it is of another version, or needs unpickling. Others of `DAMAGED` where it is no header.
    """
    from numpy.lib import format as form

    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    header: Any = readers.get(form.read_magic(stream))
    if header is None or (found := header(stream))[2].hasobject:
        raise ValueError("pickled, or of a later version")
    return found


def _check_sizes(archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        with archive.open(member) as stream:
            if not member.filename.endswith(".npy"):
                continue
            try:
                shape, _, kind = array_header(stream)
            except ValueError:
                continue  # refused once it is read: nobody may ask for it
            if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != member.file_size - stream.tell():
                raise ValueError(f"{member.filename}: its header tells another size")


def read_array(path: Path, file: Any, name: str) -> np.ndarray:
    """One array of an open npz. Raises `UserError` where it cannot be read."""
    try:
        return file[name]
    except DAMAGED as error:
        raise UserError(f"{path}: {name} cannot be read: it is damaged or pickled; only plain arrays are") from error
