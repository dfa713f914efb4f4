"""Generated image folders and shard folders."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvar_lightning.data.index import ShardIndex, ShardInfo, SplitIndex, read_index, sha256_of
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Example, Source


def png_of(number: int, side: int = 8) -> bytes:
    """A flat picture that says its number: red is the low byte, green the high one."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(buffer, "PNG")
    return buffer.getvalue()


def numbered_source(train: int, val: int, classes: int = 3) -> Source:
    def examples(first: int, count: int) -> tuple[Example, ...]:
        numbers = range(first, first + count)
        return tuple(Example(f"number {n}", n % classes, lambda n=n: png_of(n)) for n in numbers)

    return Source(tuple(f"class {label}" for label in range(classes)), examples(0, train), examples(1000, val))


@pytest.fixture
def numbered_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards of pictures numbered 0.. (train) and 1000.. (val)."""

    def make(train: int = 40, val: int = 12, samples_per_shard: int = 10) -> Path:
        folder = tmp_path / f"shards-{train}-{val}-{samples_per_shard}"
        make_shards(ShardsRequest(numbered_source(train, val), folder, ShardLimits(samples_per_shard)))
        return folder

    return make


@pytest.fixture
def rewrite_shard() -> Callable[..., None]:
    """Replaces members of a shard and mends the index, as if the shard had been written that way."""

    def rewrite(folder: Path, name: str, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
        path = folder / name
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w") as tar:
            for member_name, data in (change(*member) for member in members):
                info = tarfile.TarInfo(member_name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        mend_index(folder)

    return rewrite


def mend_index(folder: Path) -> None:
    index = read_index(folder)
    splits = {
        name: SplitIndex(
            tuple(
                ShardInfo(s.name, s.samples, (folder / s.name).stat().st_size, sha256_of(folder / s.name))
                for s in split.shards
            )
        )
        for name, split in index.splits.items()
    }
    (folder / "index.json").write_text(ShardIndex(index.class_names, splits).to_json())


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """FOLDER/CLASS/*: JPEG, PNG and WebP in every mode that files come in."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (20 + label, 24 + number, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            image.save(folder / name / f"{number}.jpg", quality=90)
            image.convert("L").save(folder / name / f"{number}.gray.png")
            image.save(folder / name / f"{number}.webp", lossless=True)
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.save(folder / "ant" / "alpha.png")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(folder / "bee" / "cmyk.jpeg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(folder / "cat" / "turned.JPG", exif=exif)
    (folder / "cat" / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def edit_index() -> Callable[..., None]:
    def edit(folder: Path, change: Callable[[dict], None]) -> None:
        path = folder / "index.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit
