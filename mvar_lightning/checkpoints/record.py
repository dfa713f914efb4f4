"""The plain record that stands beside the weights: what to build, of which format, and the tokenizer's hash."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvar_lightning.checkpoints.assign import on_meta
from mvar_lightning.errors import UserError, check_types
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.transformer import AXES

SLACK = 1000
"""So many weights more than a file's are built and told by name; no time is lost by them."""

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
        class_names: of the model's classes, in the order of their indices; empty where nobody told.
    """

    tokenizer: dict[str, Any]
    tokenizer_hash: str
    model: dict[str, Any] | None = None
    class_names: tuple[str, ...] = ()

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
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        return plain if self.model is None else {**plain, "model": self.model, **names}

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
            there = theirs.model.get(key)
            if key in AXES and isinstance(there, dict) and there.get("class") == value["class"]:
                there = AXES[key].from_config(there).config()  # arguments that came since then have their defaults
            if value != there:
                raise UserError(
                    f"this checkpoint has {key} {there}, but the run has {value}: "
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
            raise UserError(f"{source}: a checkpoint of {reprlib.repr(plain['library'])}, not of {LIBRARY}")
        if plain["format"] != FORMAT:
            found = reprlib.repr(plain["format"])
            raise UserError(f"{source}: format {found}; this version reads {FORMAT}; install the one that wrote it")
        model = plain.get("model") if plain["kind"] == "next_scale" else None
        wanted = {"tokenizer": dict, "tokenizer_hash": str} | ({"model": dict} if plain["kind"] == "next_scale" else {})
        for name, kind in wanted.items():
            if not isinstance(plain.get(name), kind):
                raise UserError(f"{source}: its entry {name!r} is missing or not a {kind.__name__}")
        names = plain.get("class_names", []) if model is not None else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{source}: its entry 'class_names' is not a list of names")
        if names and model is not None and len(names) != model.get("num_classes"):
            raise UserError(f"{source}: {len(names)} class names for {reprlib.repr(model.get('num_classes'))} classes")
        return cls(plain["tokenizer"], plain["tokenizer_hash"], model, tuple(names))

    def build_tokenizer(self, tensors: int) -> MultiScaleTokenizer:
        """The tokenizer on the meta device, for as many tensors as a file has; see `Opened.empty_tokenizer`."""
        config = self.tokenizer
        check_types(MultiScaleTokenizer.__init__, config)
        _check_numbers(config, ("num_res_blocks", "phi_layers"), tensors)
        return on_meta(lambda: MultiScaleTokenizer(**config), most=tensors + SLACK)

    def build_model(self, tensors: int) -> NextScaleTransformer:
        """The transformer on the meta device, for as many tensors as a file has; see `Opened.empty_model`."""
        config = self.model
        assert config is not None, "a tokenizer alone has no model"
        others = ("attention", "history", "blocks", "quantized")
        check_types(NextScaleTransformer.__init__, {key: value for key, value in config.items() if key not in others})
        _check_numbers(config, ("depth",), tensors)
        model = on_meta(lambda: NextScaleTransformer.from_config(config), most=tensors + SLACK)
        scales = model.pyramid.scales
        if scales != self.tokenizer.get("scales"):
            raise UserError(f"the model's scales {scales} are not the tokenizer's {self.tokenizer.get('scales')}")
        return model


def _check_numbers(config: Mapping[str, Any], names: Sequence[str], tensors: int) -> None:
    """Of each of these things a part has at least one tensor; more of them are not even listed."""
    for name in names:
        if config.get(name, 0) > tensors:
            raise UserError(f"{name} {config[name]}: the file has {tensors} tensors")
