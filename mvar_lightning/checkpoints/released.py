"""The published files that `mvar fetch` gets: where they lie, under which license, and what they must be."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mvar_lightning.errors import UserError
from mvar_lightning.tools.copies import Progress, download, weights_folder
from mvar_lightning.tools.files import kind_of, sha256_of
from mvar_lightning.tools.remote import check_address, is_url

HUB = "https://huggingface.co"
VAR, MVAR = f"{HUB}/FoundationVision/var/resolve/main", f"{HUB}/CVLUESTC/MVAR/resolve/main"
FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"


@dataclass(frozen=True)
class Released:
    """A published file.

    Args:
        name: what `mvar fetch` calls it.
        address: of the file, at its publisher's.
        what: in words.
        license: as its publisher states it.
        sha256: hex digest, or the beginning that its name has; empty where nobody has told one.
        size: bytes; 0 where they are not known.
    """

    name: str
    address: str
    what: str
    license: str
    sha256: str = ""
    size: int = 0

    @property
    def file(self) -> str:
        return self.address.rpartition("/")[2]

    def source(self, mirror: str | None = None) -> str:
        """Where to get it: from a mirror, by its file's name; or from the publisher's, or its hub's mirror
        (``$HF_ENDPOINT``, as huggingface_hub has it)."""
        if mirror is not None:
            return f"{mirror.rstrip('/')}/{self.file}"
        hub = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        return hub + self.address.removeprefix(HUB) if self.address.startswith(HUB) else self.address


# The tokenizer's digest is that of its Git LFS pointer; VAR-d16's was recorded by users of the file, Inception's and
# VGG's by many, and begin as their names tell. Nobody has published the others'.
FILES = (
    Released(
        "tokenizer",
        f"{VAR}/vae_ch160v4096z32.pth",
        "the tokenizer of all of them",
        "MIT",
        "7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c",
        436_075_834,
    ),
    Released(
        "var-d16",
        f"{VAR}/var_d16.pth",
        "VAR, 256 px",
        "MIT",
        "4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb",
    ),
    *(Released(f"var-d{depth}", f"{VAR}/var_d{depth}.pth", "VAR, 256 px", "MIT") for depth in (20, 24, 30)),
    Released("var-d36", f"{VAR}/var_d36.pth", "VAR, 512 px", "MIT"),
    Released("mvar-d16", f"{MVAR}/mvar-d16.pth", "MVAR, 256 px", "not stated"),
    *(
        Released(f"mvar-finetune-d{depth}", f"{MVAR}/mvar-finetune-d{depth}.pth", "MVAR from VAR, 256 px", "not stated")
        for depth in (16, 20, 24)
    ),
    Released(
        "inception",
        f"{FIDELITY}/weights-inception-2015-12-05-6726825d.pth",
        "Inception for FID",
        "Apache-2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
    ),
    Released(
        "vgg",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "VGG16 for LPIPS",
        "BSD-3-Clause",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
    ),
)

NOT_PUBLISHED = (
    "Markov-VAR: no address of its weights was known when this was written; see github.com/luokairo/Markov-VAR"
)


def released(names: Sequence[str]) -> list[Released]:
    """The files of these names. Raises `UserError` for a name of none."""
    known = {file.name: file for file in FILES} | {file.file: file for file in FILES}
    found = []
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0.6)
            way = f"did you mean {nearest[0]}?" if nearest else "mvar fetch --list lists them"
            raise UserError(f"no released file {name!r}; {NOT_PUBLISHED if 'markov' in name.lower() else way}")
        found.append(known[name])
    return list(dict.fromkeys(found))


def fetch(
    file: Released, folder: str | Path | None = None, mirror: str | None = None, progress: Progress | None = None
) -> tuple[Path, str]:
    """Get a released file, unless it is there; it goes on where it stopped.

    Args:
        file: one of `FILES`.
        folder: where to put it; `tools.copies.weights_folder`, where it is found by its name, if not given.
        mirror: an address below which files of these names lie.
        progress: told how far it is.

    Returns:
        Where it is, and its SHA-256.

    Raises:
        UserError: it cannot be had or written, or is not what it must be; then nothing is kept.
    """
    if mirror is not None and not is_url(mirror):
        raise UserError(f"``mirror`` {mirror}: is no address; give one that has the file {file.file} in it")
    check_address(source := file.source(mirror))
    target = (weights_folder() if folder is None else Path(folder)) / file.file
    if kind_of(target) not in (None, "file"):
        raise UserError(f"{target}: is a {kind_of(target)}; remove it, or give another folder")
    if kind_of(target) == "file":
        digest = sha256_of(target)
        if not digest.startswith(file.sha256):
            raise UserError(
                f"{target}: has the SHA-256 {digest} instead of {file.sha256}; remove it and fetch it again"
            )
        return target, digest
    return target, download(source, target, file.sha256, file.name, progress)
