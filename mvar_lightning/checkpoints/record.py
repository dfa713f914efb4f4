"""The plain record that stands beside the weights: what to build, of which format, and the tokenizer's hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mvar_lightning.checkpoints.assign import on_meta
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer

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
            "library": LIBRARY,
            "format": FORMAT,
            "kind": self.kind,
            "tokenizer": self.tokenizer,
            "tokenizer_hash": self.tokenizer_hash,
        }
        return plain if self.model is None else {**plain, "model": self.model}

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
