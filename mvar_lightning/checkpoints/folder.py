"""The suite's own checkpoints: a folder (``config.json`` and safetensors), or what Lightning writes (``.ckpt``).

A folder holds ``config.json``, ``tokenizer.safetensors`` and, unless it is of a tokenizer alone, ``model.safetensors``.
Where a checkpoint is asked for, a run's folder stands for the ``model/`` in it. Nothing is unpickled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvar_lightning.checkpoints.assign import M, check_fit, fill, on_meta, shapes_of
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, check_pair, fingerprint
from mvar_lightning.tools.files import read_json, read_safetensors, read_torch, write_json, write_tensors
from mvar_lightning.transformer import NextScaleTransformer

CONFIG, MODEL, TOKENIZER = "config.json", "model.safetensors", "tokenizer.safetensors"

IN_RUN = "model"
"""Where a run's folder keeps its weights."""

RELEASED = (".pth", ".pt", ".bin", ".safetensors")
"""How released files end."""

COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of parameters."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose record is read and whose tensors are read when asked for."""

    source: str
    record: Record
    parts: Mapping[str, Path | dict[str, Tensor]]

    def tensors(self, part: str) -> dict[str, Tensor]:
        found = self.parts[part]
        return read_safetensors(found) if isinstance(found, Path) else found

    def tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer, checked against the recorded hash."""
        tokenizer = _filled(
            self.record.build_tokenizer(self.source), self.tensors("tokenizer"), self.source, "tokenizer"
        )
        found = fingerprint(tokenizer)
        if found != self.record.tokenizer_hash:
            raise UserError(
                f"{self.source}: the tokenizer's weights and configuration have the hash {found[:12]}, the checkpoint "
                f"was written with {self.record.tokenizer_hash[:12]}: one of its parts was changed since"
            )
        return tokenizer

    def model(self) -> NextScaleTransformer:
        """The transformer of a checkpoint that has one."""
        return _filled(self.record.build_model(self.source), self.tensors("model"), self.source, "model")


def save(path: str | Path, model: NextScaleTransformer | None, tokenizer: MultiScaleTokenizer) -> None:
    """Write a checkpoint folder; it appears at ``path`` only once it is whole.

    Args:
        path: a new or empty folder, or an earlier checkpoint, which is replaced.
        model: None saves a tokenizer alone.
        tokenizer: the one that belongs to the model.

    Raises:
        UserError: model and tokenizer do not fit together, or ``path`` holds something else.
    """
    path = Path(path)
    if model is not None:
        check_pair(model, tokenizer)
    _check_target(path)
    record = Record(tokenizer.config, fingerprint(tokenizer), None if model is None else model.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".aside-", dir=path.parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        write_tensors(new / TOKENIZER, _state(tokenizer))
        if model is not None:
            write_tensors(new / MODEL, _state(model))
        write_json(new / CONFIG, {"library": LIBRARY, **record.as_plain()})
        _swap(path, new, old)


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


def open_checkpoint(path: str | Path) -> Opened:
    """Read a checkpoint's record. Raises `UserError` where there is none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if _is_part(path):
        raise UserError(f"{path}: is one file of a saved folder, which is read as a whole; give {path.parent}")
    return _open_folder(saved_in(path)) if path.is_dir() else _open_lightning(path)


def saved_in(path: Path) -> Path:
    """The saved folder that a path stands for: of a run's folder the ``model/`` in it, of anything else itself."""
    run = not (path / CONFIG).is_file() and (path / IN_RUN / CONFIG).is_file()
    return path / IN_RUN if run else path


def is_released(path: str | Path) -> bool:
    """Whether a path is read as a released file, the one kind that does not tell its scales, or as a checkpoint of ours
    (a saved folder, a run's folder, Lightning's file). All that takes either asks here."""
    path = Path(path)
    return path.suffix in RELEASED and not path.is_dir() and not _is_part(path)


def _is_part(path: Path) -> bool:
    """Whether a file is the weights or the record of a saved folder."""
    return path.name in (CONFIG, MODEL, TOKENIZER) and (path.parent / CONFIG).is_file()


def _swap(path: Path, new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``path``, which goes to ``old``; it comes back where that fails."""
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise


def _open_folder(path: Path) -> Opened:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: not a checkpoint folder, it has no {CONFIG} (nor has a {IN_RUN}/ in it)")
    record = Record.parse(read_json(path / CONFIG), str(path / CONFIG))
    return Opened(str(path), record, {"tokenizer": path / TOKENIZER, "model": path / MODEL})


def _open_lightning(path: Path) -> Opened:
    content = read_torch(path)
    if not isinstance(content, dict) or LIBRARY not in content or "state_dict" not in content:
        raise UserError(
            f"{path}: not a Lightning checkpoint of this suite (no {LIBRARY!r} and 'state_dict' in it); "
            "released files come in with `mvar import`"
        )
    record = Record.parse(content[LIBRARY], str(path))
    state = {key.replace(COMPILED, ""): tensor for key, tensor in content["state_dict"].items()}
    parts = {part: _part(state, part) for part in ("tokenizer", "model")}
    return Opened(str(path), record, parts)


def _part(state: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _filled(module: M, state: Mapping[str, Tensor], source: str, part: str) -> M:
    check_fit(state, shapes_of(module), f"{source} ({part})")
    return fill(module, state)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key.replace(COMPILED, ""): tensor for key, tensor in module.state_dict().items()}


def _check_target(path: Path) -> None:
    if path.is_file():
        raise UserError(f"{path}: is a file; give a folder for the checkpoint")
    if path.is_dir() and any(path.iterdir()):
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: holds something else than a checkpoint; give a new or empty folder")
        Record.parse(read_json(path / CONFIG), str(path / CONFIG))


# The plain record that stands beside the weights: what to build, of which format, and the tokenizer's hash.


FORMAT = 1
LIBRARY = "mvar_lightning"
KINDS = ("tokenizer", "next_scale")


@dataclass(frozen=True)
class Record:
    """Describes a checkpoint.

    Args:
        tokenizer: `MultiScaleTokenizer.config`.
        tokenizer_hash: `fingerprint` of the tokenizer's weights.
        model: `NextScaleTransformer.config`, or None where the checkpoint holds a tokenizer alone.
    """

    tokenizer: dict[str, Any]
    tokenizer_hash: str
    model: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        return "tokenizer" if self.model is None else "next_scale"

    def as_plain(self) -> dict[str, Any]:
        """JSON values; `parse` reads them."""
        plain = {
            "format": FORMAT,
            "kind": self.kind,
            "tokenizer": self.tokenizer,
            "tokenizer_hash": self.tokenizer_hash,
        }
        return plain if self.model is None else {**plain, "model": self.model}

    def write_into(self, checkpoint: dict[str, Any]) -> None:
        """Put this into what Lightning is about to save."""
        checkpoint[LIBRARY] = self.as_plain()

    def check_resumed(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to go on from what Lightning has read, before any weight is touched; this is the run's own record.

        Raises:
            UserError: no checkpoint of ours, one of another format version, tokenizer or architecture.
        """
        found = checkpoint.get(LIBRARY)
        if not isinstance(found, dict) or found.get("kind") != "next_scale":
            raise UserError(f"this checkpoint holds no next-scale model of {LIBRARY}; give the right file")
        theirs = Record.parse(found, "this checkpoint")
        if theirs.tokenizer_hash != self.tokenizer_hash:
            raise UserError(
                f"this checkpoint belongs to tokenizer {theirs.tokenizer_hash[:12]}, but the run uses "
                f"{self.tokenizer_hash[:12]}: point model.tokenizer to the one it was trained with, or start a new run"
            )
        assert self.model is not None and theirs.model is not None
        for key, value in self.model.items():
            if value != theirs.model.get(key):
                raise UserError(
                    f"this checkpoint has {key} {theirs.model.get(key)}, but the run has {value}: "
                    "train under another run folder, or fine-tune with model.init_from"
                )

    @classmethod
    def parse(cls, plain: Any, source: str) -> Record:
        """Check and read a record.

        Raises:
            UserError: not a record of ours, of another format version, or incomplete.
        """
        if not isinstance(plain, dict) or "format" not in plain or plain.get("kind") not in KINDS:
            raise UserError(f"{source}: not a checkpoint of {LIBRARY} (no format and kind in it)")
        if plain.get("library", LIBRARY) != LIBRARY:
            raise UserError(f"{source}: a checkpoint of {plain['library']!r}, not of {LIBRARY}")
        if plain["format"] != FORMAT:
            raise UserError(
                f"{source}: format {plain['format']!r}; this version reads {FORMAT}; install the one that wrote it"
            )
        model = plain.get("model") if plain["kind"] == "next_scale" else None
        wanted = {"tokenizer": dict, "tokenizer_hash": str} | ({"model": dict} if plain["kind"] == "next_scale" else {})
        for name, kind in wanted.items():
            if not isinstance(plain.get(name), kind):
                raise UserError(f"{source}: its entry {name!r} is missing or not a {kind.__name__}")
        return cls(plain["tokenizer"], plain["tokenizer_hash"], model)

    def build_tokenizer(self, source: str) -> MultiScaleTokenizer:
        """The tokenizer on the meta device. Raises `UserError` where its configuration is wrong."""
        try:
            return on_meta(lambda: MultiScaleTokenizer(**self.tokenizer))
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{source}: its tokenizer configuration cannot be built: {error}") from error

    def build_model(self, source: str) -> NextScaleTransformer:
        """The transformer on the meta device. Raises `UserError` where its configuration is wrong."""
        config = self.model
        assert config is not None, "a tokenizer alone has no model"
        try:
            model = on_meta(lambda: NextScaleTransformer.from_config(config))
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{source}: its model configuration cannot be built: {error!r}") from error
        if list(model.pyramid.sides) != list(self.tokenizer.get("scales", [])):
            raise UserError(
                f"{source}: the model's scales {list(model.pyramid.sides)} are not the tokenizer's "
                f"{self.tokenizer.get('scales')}"
            )
        return model
