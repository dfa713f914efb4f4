"""The suite's own checkpoints: a folder (``config.json`` and safetensors), or what Lightning writes (``.ckpt``).

A folder holds ``config.json``, ``tokenizer.safetensors`` and, unless it is of a tokenizer alone, ``model.safetensors``.
Where a checkpoint is asked for, a run's folder stands for the ``model/`` in it. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import os
import reprlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvar_lightning.checkpoints.assign import M, check_fit, fill, plain_names, shapes_of
from mvar_lightning.checkpoints.classes import check_names
from mvar_lightning.checkpoints.record import LIBRARY, Record
from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.tokenizer import MultiScaleTokenizer, check_pair, fingerprint
from mvar_lightning.tools.copies import fetched, local_copy, local_root
from mvar_lightning.tools.files import in_a_line, kind_of, read_json, standing, told, write_json, writing_folder
from mvar_lightning.tools.remote import NotThere, is_url, plain
from mvar_lightning.tools.tensors import read_safetensors, read_torch, safetensors_shapes, write_tensors
from mvar_lightning.transformer import NextScaleTransformer

CONFIG, MODEL, TOKENIZER = "config.json", "model.safetensors", "tokenizer.safetensors"

SHIPPED = Path(__file__).parents[1] / "models"
"""A saved folder for each trained model that comes with the package."""

IN_RUN = "model"
"""Where a run's folder keeps its weights."""

TRAINING = {"loops": dict, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict, "epoch": int}
TRAINING |= {"global_step": int, "pytorch-lightning_version": str}
"""What Lightning goes on from, in its checkpoints."""

RELEASED = (".pth", ".pt", ".bin", ".safetensors")
"""How released files end."""

OF_PARTS = ".index.json"
IN_FOLDER: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth")
IN_FOLDER += (f"model.safetensors{OF_PARTS}", f"pytorch_model.bin{OF_PARTS}")
"""Files that other trainers' folders keep their weights in; the last two are tables of what is split over files."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose record is read and whose tensors are read when asked for."""

    source: str
    record: Record
    parts: Mapping[str, Path | dict[str, Tensor]]
    checksums: Mapping[str, str] = field(default_factory=dict)
    half: bool = False
    """Whether its float32 weights are stored rounded to float16."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """What else is in it: the state of training."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a saved folder, and not a file of Lightning's."""
        return isinstance(self.parts["tokenizer"], Path)

    def check_resumable(self) -> None:
        """Raise `UserError` where weights are all that is there, or what Lightning goes on from is something else."""
        if not self.training.keys() >= {"optimizer_states", "lr_schedulers", "loops"}:
            raise UserError(
                f"{self.source}: holds weights alone, no run can go on from it; start a new one with model.init_from"
            )
        kinds = TRAINING | dict.fromkeys(("tokenizer", *(["model"] if self.record.model else [])), dict)
        for name, kind in kinds.items():
            if not isinstance(value := self.parts.get(name) or self.training.get(name), kind):
                raise UserError(f"{self.source}: its {name} is {reprlib.repr(value)}; take an earlier checkpoint")
        if not (version := self.training["pytorch-lightning_version"])[:1].isdecimal():
            raise UserError(f"{self.source}: its pytorch-lightning_version is {version!r}; take an earlier checkpoint")

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a part, by name; of a folder's from the file's header alone."""
        found = self.parts[part]
        if isinstance(found, Path):
            return safetensors_shapes(found)
        return {key: tuple(tensor.shape) for key, tensor in found.items()}

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors themselves, compared with the checksum that a folder's record has; rounded ones as float32."""
        found = self.parts[part]
        if not isinstance(found, Path):
            return found
        tensors = self._read(found)
        return (
            {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
            if self.half
            else tensors
        )

    def _read(self, found: Path) -> dict[str, Tensor]:
        expected = self.checksums.get(found.name)
        if expected is None:  # written before there were any
            return read_safetensors(found)
        with ThreadPoolExecutor(1) as beside:
            checksum = beside.submit(crc32_of, found)
            tensors = read_safetensors(found)
            if checksum.result() != expected:
                raise UserError(
                    f"{found}: damaged, its content has the CRC-32 {checksum.result()}, {CONFIG} says {expected}; "
                    "copy it again, or take another checkpoint"
                )
        return tensors

    def tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer, checked against the recorded hash."""
        tokenizer = fill(self.empty_tokenizer(), self.tensors("tokenizer"), f"{self.source} (tokenizer)")
        found = fingerprint(tokenizer)
        if found != self.record.tokenizer_hash:
            raise UserError(
                f"{self.source}: the tokenizer's weights and configuration have the hash {found[:12]}, the checkpoint "
                f"was written with {self.record.tokenizer_hash[:12]}: one of its parts was changed since"
            )
        return tokenizer

    def model(self) -> NextScaleTransformer:
        """The transformer of a checkpoint that has one."""
        made = fill(self.empty_model(), self.tensors("model"), f"{self.source} (model)")
        made.tokenizer_hash = self.record.tokenizer_hash
        return made

    def empty_tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer on the meta device. Raises `UserError` where its configuration is wrong."""
        return self._built("tokenizer", self.record.build_tokenizer)

    def empty_model(self) -> NextScaleTransformer:
        """The transformer on the meta device. Raises `UserError` where its configuration is wrong."""
        return self._built("model", self.record.build_model)

    def _built(self, part: str, build: Callable[[int], M]) -> M:
        name, shapes = f"{self.source} ({part})", self.shapes(part)
        try:
            module = build(len(shapes))
        except UserError as error:
            raise UserError(f"{name}: {error.marked.removeprefix(f'{self.source}: ')}") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged record can make a constructor fail in any way
            reason = f"{type(error).__name__}: {in_a_line(error)}"
            raise UserError(f"{self.source}: its {part} configuration cannot be built ({reason})") from error
        check_fit(shapes, shapes_of(module), name)
        return module


def save(
    path: str | Path,
    model: NextScaleTransformer | None,
    tokenizer: MultiScaleTokenizer,
    half: bool = False,
    class_names: Sequence[str] = (),
) -> None:
    """Write a checkpoint folder; it appears at ``path`` only once it is whole.

    Args:
        path: a new or empty folder, or an earlier checkpoint, which is replaced.
        model: None saves a tokenizer alone.
        tokenizer: the one that belongs to the model.
        half: round float32 weights to float16, in half of the space; they are float32 again when opened.
        class_names: of the model's classes, by index; `mvar info` shows them and `mvar sample` takes them.

    Raises:
        UserError: model and tokenizer do not fit together, a weight is too large for float16, ``path`` holds something
            else, or it cannot be written: an earlier checkpoint is then left as it was.
    """
    check_kind("path", path, (str, PathLike), "a folder")
    path = Path(path)
    check_kind("tokenizer", tokenizer, MultiScaleTokenizer, "a MultiScaleTokenizer")
    if model is not None:
        check_pair(model, tokenizer)
    if half and model is not None and model.quantized is not None:
        raise UserError(f"``half``: the model is in {model.quantized} already; save it without")
    if half:
        tokenizer, model = _rounded(tokenizer), None if model is None else _rounded(model)
    names = () if model is None else check_names(class_names, model.num_classes)
    record = Record(tokenizer.config, fingerprint(tokenizer), None if model is None else model.config, names)
    modules: dict[str, nn.Module] = {TOKENIZER: tokenizer} | ({} if model is None else {MODEL: model})
    with told(path):
        _check_target(path)
        with writing_folder(path) as folder:
            checksums = {}
            for name, module in modules.items():
                tensors = plain_names(module.state_dict(), name)
                if half:
                    tensors = {key: t.half() if t.dtype == torch.float32 else t for key, t in tensors.items()}
                write_tensors(folder / name, tensors)
                checksums[name] = crc32_of(folder / name)
            write_json(
                folder / CONFIG,
                {"library": LIBRARY, **record.as_plain(), "crc32": checksums, **({"half": True} if half else {})},
            )


def _rounded(module: M) -> M:
    """A copy whose float32 tensors are what float16 can say."""
    copy = deepcopy(module)
    for name, tensor in copy.state_dict().items():
        if tensor.dtype == torch.float32:
            tensor.copy_(tensor.half())
            if not tensor.isfinite().all():
                raise UserError(f"{name}: holds a value too large for float16; save without ``half``")
    return copy


def crc32_of(path: Path) -> str:
    """CRC-32 of a file's content, 8 hexadecimal digits: against damage, not against forgery."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def load(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[NextScaleTransformer | None, MultiScaleTokenizer]:
    """Model (None in a checkpoint of a tokenizer alone) and tokenizer, in eval mode.

    Args:
        path: a folder that `save` wrote, the folder of a run, or a Lightning checkpoint (``.ckpt``) of this suite.
            Where the run averaged its weights (EMA), a Lightning checkpoint gives the averaged ones.
        device: where to put them.

    Raises:
        UserError: no such checkpoint, a damaged or foreign one, one of another format version, or one whose weights
            are not those its record tells.
    """
    opened = open_checkpoint(path)
    model = None if opened.record.model is None else opened.model().to(device)
    tokenizer = opened.tokenizer()
    if model is not None:
        check_pair(model, tokenizer)
    return model, tokenizer.to(device)


def load_tokenizer(path: str | Path) -> MultiScaleTokenizer:
    """The tokenizer of any checkpoint that `load` takes. Raises `UserError` as `load`."""
    return open_checkpoint(path).tokenizer()


def open_checkpoint(path: str | Path, whole: bool = True) -> Opened:
    """Read a checkpoint's record.

    Args:
        whole: of a Lightning checkpoint look for damage everywhere, which reads all of it, and not only in the record.
            (A folder's tensors are looked at when they are read.)

    Raises:
        UserError: there is none, or it is damaged.
    """
    check_kind("path", path, (str, PathLike), "a folder or a file")
    path = standing(Path(located(path)))
    kind = kind_of(path)
    if kind is None:
        shipped = {folder.name: folder for folder in SHIPPED.glob("*")}
        if str(path) in shipped:
            return _open_folder(shipped[str(path)])
        raise UserError(f"{path}: no such checkpoint")
    if is_part(path):
        raise UserError(f"{path}: is one file of a saved folder, which is read as a whole; give {path.parent}")
    return _open_folder(saved_in(path)) if kind == "folder" else _open_lightning(path, whole)


def located(path: str | PathLike[str]) -> str | PathLike[str]:
    """Where a checkpoint or a released file is on this machine: what is at an address is copied first, and what
    `mvar fetch` got is found by its name. An address that ends as a file does is one; any other is a saved folder's, or
    a run's.

    Raises:
        UserError: it cannot be copied.
    """
    root = plain(str(path)).rstrip("/")
    if not is_url(root):
        return fetched(path if root == str(path).rstrip("/") else root)
    above, _, name = root.rpartition("/")
    if Path(name.partition("?")[0]).suffix in (".ckpt", *RELEASED):
        return local_copy(above, name, "checkpoint")
    try:
        config = local_copy(root, CONFIG, "checkpoint")
    except NotThere:
        try:
            config = local_copy(inside := f"{root}/{IN_RUN}", CONFIG, "checkpoint")
        except NotThere:
            raise UserError(f"checkpoint {root}: has no {CONFIG}, nor one in a {IN_RUN}/; check the address") from None
        root = inside
    for part in (TOKENIZER, *([MODEL] if Record.parse(read_json(config), f"{root}/{CONFIG}").model else [])):
        local_copy(root, part, "checkpoint")
    return local_root(root)


def saved_in(path: Path) -> Path:
    """The saved folder that a path stands for: of a run's folder the ``model/`` in it, of anything else itself."""
    inside = standing(path / IN_RUN)
    return inside if kind_of(path / CONFIG) != "file" and kind_of(inside / CONFIG) == "file" else path


def is_released(path: str | Path) -> bool:
    """Whether a path is read as a released file, the one kind that does not tell its scales, or as a checkpoint of ours
    (a saved folder, a run's folder, Lightning's file). All that takes either asks here. What other trainers leave is
    read as released: their folders, and Lightning's files without our record."""
    path = Path(path)
    if kind_of(path) == "folder":
        theirs = any(kind_of(path / name) == "file" for name in (".metadata", *IN_FOLDER))
        return theirs and kind_of(saved_in(path) / CONFIG) is None
    if path.suffix == ".ckpt" and kind_of(path) == "file":
        try:
            content = read_torch(path, whole=False)
        except UserError:
            return False  # who opens it is told
        return isinstance(content, dict) and LIBRARY not in content and "state_dict" in content
    return (path.suffix in RELEASED and not is_part(path)) or path.name.endswith(OF_PARTS)


def with_key(path: str | PathLike[str]) -> tuple[str | PathLike[str], str | None]:
    """A path or address, and of ``PATH#KEY`` the key: which weights of a file that holds several. A path that is there
    as it is has none."""
    file, mark, key = str(path).rpartition("#")
    if not (mark and file and key) or "/" in key or kind_of(Path(path)) is not None:
        return path, None
    return file, key


def check_no_key(path: str | PathLike[str], key: str | None) -> None:
    """Raise `UserError` for a key to a checkpoint of ours, which holds one model."""
    if key is not None:
        raise UserError(f"{path}#{key}: is no released file that holds several weights; leave #{key} out")


def is_part(path: Path) -> bool:
    """Whether a file is the weights or the record of a saved folder."""
    return path.name in (CONFIG, MODEL, TOKENIZER) and kind_of(path.parent / CONFIG) == "file"


def _open_folder(path: Path) -> Opened:
    if kind_of(path / CONFIG) is None:
        raise UserError(f"{path}: not a checkpoint folder, it has no {CONFIG} (nor has a {IN_RUN}/ in it)")
    plain = read_json(path / CONFIG)
    record = Record.parse(plain, str(path / CONFIG))
    checksums = plain.get("crc32", {})
    if not isinstance(checksums, dict):
        raise UserError(f"{path / CONFIG}: its entry 'crc32' is not a dict")
    if not isinstance(half := plain.get("half", False), bool):
        raise UserError(f"{path / CONFIG}: its entry 'half' is not true or false")
    return Opened(str(path), record, {"tokenizer": path / TOKENIZER, "model": path / MODEL}, checksums, half=half)


def _open_lightning(path: Path, whole: bool) -> Opened:
    content = read_torch(path, whole)
    if not isinstance(content, dict) or LIBRARY not in content or "state_dict" not in content:
        raise UserError(
            f"{path}: not a Lightning checkpoint of this suite (no {LIBRARY!r} and 'state_dict' in it); "
            "released files come in with `mvar import`"
        )
    record = Record.parse(content[LIBRARY], str(path))
    state = content["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path}: its 'state_dict' holds something else than names and tensors")
    state = plain_names(state, str(path))
    parts = {part: _part(state, part) for part in ("tokenizer", "model")}
    return Opened(str(path), record, parts, training={name: content[name] for name in content if name != "state_dict"})


def unwrap_names(checkpoint: dict[str, Any]) -> None:
    """Take wrappers' prefixes off the names in what Lightning has read, before it looks for them."""
    for part in ("state_dict", "current_model_state"):  # the second: beside averaged weights
        if isinstance(checkpoint.get(part), dict):
            checkpoint[part] = plain_names(checkpoint[part], "this checkpoint")


def _part(state: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _check_target(path: Path) -> None:
    kind = kind_of(path)
    if kind not in (None, "folder"):
        raise UserError(f"{path}: is a {kind}; give a folder for the checkpoint")
    if kind == "folder" and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # renames would pass over a protected one
    if kind == "folder" and any(path.iterdir()):
        if kind_of(path / CONFIG) != "file":
            raise UserError(f"{path}: holds something else than a checkpoint; give a new or empty folder")
        Record.parse(read_json(path / CONFIG), str(path / CONFIG))
