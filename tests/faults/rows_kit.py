"""What a row of faults is made of: a folder, questions to the product, and the judging of values."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .harness import Answer, Harness, broken_promise

NOBODY = 65534
Members = list[tuple[str, bytes | tarfile.TarInfo]]


class Skip(Exception):
    """This machine does not allow what a row needs."""


@dataclass(frozen=True)
class Said:
    """How a script ended: a value (the JSON it printed last), a `UserError`, or anything else."""

    value: Any = None
    refused: str | None = None
    failed: str | None = None

    @property
    def reason(self) -> str:
        return self.failed or (f"refused: {self.refused}" if self.refused else f"gave {self.value!r}")


@dataclass(frozen=True)
class Case:
    """One row at work: an own folder, the product, and tiny files that this product made."""

    product: Path
    harness: Harness
    assets: Path
    folder: Path

    def take(self, *names: str) -> None:
        """Copies of assets, by the same names."""
        for name in names:
            source, target = self.assets / name, self.folder / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def ask(self, *argv: object, **settings: Any) -> Answer:
        return self.harness.ask(*argv, **{"cwd": self.folder, "seconds": 40, **settings})

    def script(self, code: str, **settings: Any) -> Said:
        """Run Python; what it prints last is its value."""
        answer = self.ask(code=PRELUDE + code, **settings)
        last = (answer.err.strip().splitlines() or [""])[-1]
        if answer.timed_out or answer.status < 0:
            return Said(failed=broken_promise(answer))
        if answer.status == 0:
            return Said(value=json.loads(answer.out.strip().splitlines()[-1]))
        named = re.match(r"(?:\w+\.)*UserError: (.*)", last)
        return Said(refused=named[1]) if named else Said(failed=f"ends in {last[:200] or answer.status}")


PRELUDE = """
import json, os, sys, warnings
from pathlib import Path
import torch
import lightning as L
import mvar_lightning as m
warnings.simplefilter("ignore")
def tell(value): print(json.dumps(value))
"""


@dataclass(frozen=True)
class Row:
    """`function` gives None where the value is right, else the reason in words."""

    id: str
    words: str
    function: Callable[[Case], str | None]


ROWS: list[Row] = []


def row(name: str, words: str) -> Callable[[Callable[[Case], str | None]], Callable[[Case], str | None]]:
    def add(function: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
        ROWS.append(Row(name, words, function))
        return function

    return add


def tail(answer: Answer) -> str:
    return " | ".join(answer.err.strip().splitlines()[-2:])[-300:]


def mistake(answer: Answer, *words: str, what: str = "") -> str | None:
    """None for one line and a status that is not 0; each of the words (or one of "a|b") stands in it."""
    what = f"{what}: " if what else ""
    if answer.status == 0 and not answer.timed_out:
        return f"{what}status 0"
    broken = broken_promise(answer)
    if broken:
        return f"{what}{broken}"
    line = answer.line.lower()
    missing = [word for word in words if not any(one.lower() in line for one in word.split("|"))]
    return f"{what}the line does not name {', '.join(missing)}: {answer.line}" if missing else None


def result(answer: Answer, what: str = "") -> str | None:
    """None for status 0."""
    what = f"{what}: " if what else ""
    if answer.status == 0 and not answer.timed_out:
        return None
    return f"{what}{broken_promise(answer) or tail(answer)}"


def first(*reasons: str | None) -> str | None:
    """All that is wrong, one after another; None where nothing is."""
    return "; ".join(reason for reason in reasons if reason) or None


def refused(said: Said, *words: str, what: str = "") -> str | None:
    """None for a `UserError` that says one of the words of each "a|b"."""
    what = f"{what}: " if what else ""
    if said.refused is None:
        return f"{what}{said.reason}"
    missing = [word for word in words if not any(one.lower() in said.refused.lower() for one in word.split("|"))]
    return f"{what}the line does not name {', '.join(missing)}: {said.refused}" if missing else None


# Pictures and tars


def picture(gray: int = 0, form: str = "PNG", side: int = 8, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (gray, gray, gray)).save(buffer, form, **options)
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(data, bytes) else data
            info.name = name
            info.size = len(data) if isinstance(data, bytes) else info.size
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


def link(to: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, to
    return info


def samples(count: int, gray: int = 0) -> Members:
    pairs = [((f"{n:04d}.png", picture(gray)), (f"{n:04d}.cls", b"%d" % (n % 2))) for n in range(count)]
    return [member for pair in pairs for member in pair]


def pictures_of(out: Path) -> dict[str, list[bytes]]:
    """Pictures of a shard folder, by split."""
    found: dict[str, list[bytes]] = {}
    for shard in sorted(out.rglob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                if file is not None and not member.name.endswith(".cls"):
                    found.setdefault(shard.parent.name, []).append(file.read())
    return found


def count(out: Path) -> int:
    return sum(map(len, pictures_of(out).values()))


def classes_of(out: Path) -> list[str]:
    return json.loads((out / "index.json").read_text())["class_names"]


def needs_root() -> None:
    if os.geteuid() != 0:
        raise Skip("becomes another user, which needs root")


def needs_full() -> None:
    if not Path("/dev/full").exists():
        raise Skip("needs /dev/full")
