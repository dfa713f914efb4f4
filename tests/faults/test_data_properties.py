"""Whole kinds of damaged or unusual files: the right result or one line, whatever the bytes."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from token_files import write_token_cache

from mvar_lightning.data.check import check
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.images import FORMATS, ImageError, SampleError, decode_rgb, suffix_of
from mvar_lightning.data.index import read_index
from mvar_lightning.data.making.shards import ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Example, Source
from mvar_lightning.data.tar import TarDamage, label_of, read_samples
from mvar_lightning.data.token_data import TokenShardsDataModule
from mvar_lightning.data.tokens.cache import check_cache, open_part, read_cache
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.image_sources import open_images

Folders = pytest.TempPathFactory


def quick(examples: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=checks, database=None)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def shard() -> bytes:
    """Four samples and the end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(4):
            for name, data in ((f"{number}.cls", b"%d" % number), (f"{number}.png", png(number))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


END_OF_DATA = 4 * 4 * 512
flips = st.lists(st.tuples(st.integers(0, END_OF_DATA + 1023), st.integers(1, 255)), min_size=1, max_size=6)


def flipped(data: bytes, where: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for place, value in where:
        changed[place % len(changed)] ^= value
    return bytes(changed)


class Pipe(io.BytesIO):
    """Read once, as a transfer is."""

    def seekable(self) -> bool:
        return False


def read_all(data: bytes, kind: type[io.BytesIO]) -> tuple[int, int, bool]:
    """Samples, those of them that can be used, and whether the archive was told to be damaged."""
    count = good = 0
    try:
        for raw in read_samples(kind(data), "x.tar"):
            count += 1
            try:
                label_of(raw.label), decode_rgb(raw.image)
                good += not raw.fault
            except SampleError as error:
                assert "\n" not in str(error)
    except TarDamage as damage:
        assert str(damage) and "\n" not in str(damage)
        return count, good, True
    return count, good, False


@quick(150)
@given(place=st.integers(0, END_OF_DATA + 1023), value=st.integers(1, 255), kind=st.sampled_from([io.BytesIO, Pipe]))
def test_a_flipped_byte_loses_no_sample_in_silence(place: int, value: int, kind: type[io.BytesIO]) -> None:
    count, _, told = read_all(flipped(shard(), [(place, value)]), kind)
    behind_the_end = kind is Pipe and place >= END_OF_DATA + 512  # which a transfer is not read for
    assert told or count == 4 or behind_the_end


@quick(150)
@given(where=flips, cut=st.none() | st.integers(0, 10240), kind=st.sampled_from([io.BytesIO, Pipe]))
def test_any_bytes_of_a_shard_are_samples_or_told(where, cut, kind) -> None:
    read_all(flipped(shard(), where)[:cut], kind)


@quick(60)
@given(length=st.integers(0, END_OF_DATA + 511), kind=st.sampled_from([io.BytesIO, Pipe]))
def test_every_cut_of_a_shard_is_told(length: int, kind: type[io.BytesIO]) -> None:
    count, good, told = read_all(shard()[:length], kind)
    assert told and count == good <= (length + 511) // 2048  # what is cut may be padding


SIZES = (b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0")
HEADER_FIELDS = {"size": (124, 136), "type": (156, 157), "name": (0, 100), "magic": (257, 265), "link": (157, 257)}


@quick(150)
@given(
    field=st.sampled_from(sorted(HEADER_FIELDS)),
    value=st.binary(min_size=1, max_size=12)
    | st.sampled_from(
        [b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0", b"S", b"L", b"x", b"g", b"K", b"V", b"1"]
    ),
    member=st.integers(0, 7),
    kind=st.sampled_from([io.BytesIO, Pipe]),
)
def test_headers_that_lie_with_a_right_checksum(field: str, value: bytes, member: int, kind) -> None:
    """Sizes beyond the file, negative, sparse, links, extended headers: no memory is taken for what is not there."""
    data = bytearray(shard())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = tar.getmembers()[member].offset
    first, end = HEADER_FIELDS[field]
    data[start + first : start + min(end, first + len(value))] = value[: end - first]
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    tracemalloc.start()
    read_all(bytes(data), kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: Folders) -> Path:
    folder = tmp_path_factory.mktemp("properties") / "shards"
    examples = [Example(str(n), n % 2, lambda n=n: png(n)) for n in range(4)]
    make_shards(ShardsRequest(Source(("a", "b"), examples, examples[:2]), folder))
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: Folders) -> Path:
    folder = tmp_path_factory.mktemp("properties") / "tokens"
    write_token_cache(folder, train=(3, 2), val=(2,))
    return folder


@quick(40)
@given(where=flips, cut=st.none() | st.integers(0, 9000))
def test_check_answers_for_any_bytes(shards: Path, where, cut) -> None:
    path = shards / "train" / "000000.tar"
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, where)[:cut])
    try:
        changed = path.read_bytes() != whole
        assert bool(check(shards, decode=True)) == changed
    finally:
        path.write_bytes(whole)


# -- any JSON

json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
near_values = st.sampled_from(
    [0, -1, 1, 2, 1.5, True, "", 10**18, 2**31, "../x", float("nan"), [], {}, None, "train/0"]
)
TEXTS = ["", "[" * 100_000, '{"a":' * 100_000, "9" * 6000, "1e999", "\x00", "\ud800", "{}", "null", '{"format": 1}']


def paths_of(value: Any, before: tuple = ()) -> Iterator[tuple]:
    yield before
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from paths_of(inner, (*before, key))


def with_value(content: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return content


def one_line(work: Any) -> None:
    try:
        work()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


def use_shards(folder: Path) -> None:
    check(folder)
    data = ShardsDataModule(str(folder), 8, 1, 0)
    data.setup("fit")
    list(data.train_dataloader()), list(data.val_dataloader())


def use_tokens(folder: Path) -> None:
    check_cache(folder)
    data = TokenShardsDataModule(str(folder), 1, 0)
    data.setup("fit")
    list(data.train_dataloader()), list(data.val_dataloader())


USES = {"index.json": use_shards, "tokens.json": use_tokens}


@pytest.mark.parametrize("name", USES)
@quick(120)
@given(draw=st.data())
def test_any_value_in_an_index_is_used_or_told(shards: Path, tokens: Path, name: str, draw: st.DataObject) -> None:
    folder = shards if name == "index.json" else tokens
    text = (folder / name).read_text()
    path = draw.draw(st.sampled_from(list(paths_of(json.loads(text)))))
    near = st.sampled_from(
        [0, -1, 1, 2, 1.5, True, "", 10**18, 2**31, "../x", float("nan"), [], {}, None, "train/000000"]
    )
    changed = with_value(json.loads(text), path, draw.draw(near | json_values))
    try:
        (folder / name).write_text(json.dumps(changed))
        one_line(lambda: USES[name](folder))
    finally:
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("content", TEXTS)
def test_what_is_no_index_is_one_line(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="not a valid index") as error:
        (read_index if name == "index.json" else read_cache)(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# -- token caches


@quick(60)
@given(where=flips, cut=st.none() | st.integers(0, 400), labels=st.booleans())
def test_any_bytes_of_a_part_are_tokens_or_told(tokens: Path, where, cut, labels: bool) -> None:
    path = tokens / "train" / ("000000.labels.npy" if labels else "000000.npy")
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, where)[:cut])
    try:
        assert bool(check_cache(tokens)) == (path.read_bytes() != whole)
        one_line(lambda: use_tokens(tokens))
    finally:
        path.write_bytes(whole)


DTYPES = ("<u2", ">u2", "<u4", "<i4", ">i4", "<i8", "u1", "<f4", "<f8", "?", "<c8", "S4", "<U2", "O", "M8[s]")
dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple) | st.sampled_from([(1, 3, 5), (3,), (2, 4, 5, 3)])


@quick(60)
@given(dtype=dtypes, shape=shapes, fortran=st.booleans(), version=st.sampled_from([(1, 0), (2, 0), (3, 0)]))
def test_layouts_of_an_array_in_a_token_cache(tokens: Path, dtype, shape, fortran, version) -> None:
    array = np.array(np.zeros(shape), dtype=dtype, order="F" if fortran else "C")
    path, cached = tokens / "train" / "000000.npy", read_cache(tokens)
    whole = path.read_bytes()
    try:
        with path.open("wb") as file:
            np.lib.format.write_array(file, array, version, allow_pickle=True)
        if array.dtype == cached.settings.dtype and shape == (1, 3, 5):
            assert np.array_equal(open_part(cached, cached.parts[0])[0], array)
        else:
            with pytest.raises(UserError, match=r"instead of|no array file"):
                open_part(cached, cached.parts[0])
    finally:
        path.write_bytes(whole)


# -- npz of images


@quick(80)
@given(dtype=dtypes, shape=shapes, fortran=st.booleans(), packed=st.booleans())
def test_layouts_of_images_in_an_npz(tmp_path: Path, dtype, shape, fortran: bool, packed: bool) -> None:
    numbers = np.arange(int(np.prod(shape)) % 251 or 1) % 2
    array = np.array(np.resize(numbers, shape), dtype=dtype, order="F" if fortran else "C")
    (np.savez_compressed if packed else np.savez)(tmp_path / "x.npz", array)
    try:
        source = open_images(tmp_path / "x.npz")
        (image_N3HW,) = source.read(0, 10)
    except UserError as error:
        assert "\n" not in str(error)
        assert array.dtype != np.uint8 or array.ndim != 4 or shape[-1] != 3 or 0 in shape
        return
    assert np.array_equal(image_N3HW.numpy(), array.transpose(0, 3, 1, 2))


# -- pictures

MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "I;16",
    "I;16B",
)
CONTAINERS = ("JPEG", "PNG", "WEBP", "MPO", "GIF", "BMP", "TIFF", "JPEG2000", "ICO", "PPM", "TGA", "AVIF", "DIB", "PCX")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transparent color": {"transparency": 0},
    "transparent palette": {"transparency": b"\0\xff"},
    "transparent triple": {"transparency": (0, 0, 0)},
    "frames": {"save_all": True, "append_images": [Image.new("RGB", (7, 5), "white")]},
    "progressive": {"progressive": True, "quality": 1},
    "lossless": {"lossless": True},
    "interlaced": {"bits": 4, "interlace": True},
    "turned": {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
    "no exif": {"exif": b"Exif\0\0nonsense"},
    "profile": {"icc_profile": b"nonsense"},
}


def pictures() -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    for form in CONTAINERS:
        for mode in MODES:
            for name, options in OPTIONS.items():
                image, buffer = Image.new(mode, (7, 5)), io.BytesIO()
                if mode == "P":
                    image.putpalette([9, 9, 9, 200, 0, 0])
                try:
                    image.save(buffer, form, **options)
                except Exception:
                    continue  # Pillow writes no such picture
                yield f"{form} {mode} {name}", buffer.getvalue(), (5, 7) if name == "turned" else (7, 5)


@pytest.mark.filterwarnings("ignore")
def test_every_mode_and_container_of_pillows_into_shards(tmp_path: Path) -> None:
    """One call writes all; what is no JPEG, PNG or WebP by its content is left out and named."""
    made = list(pictures())
    assert len(made) > 500
    examples = [Example(name, 0, lambda data=data: data) for name, data, _ in made]
    request = ShardsRequest(Source(("x",), examples, examples[:1]), tmp_path / "out", skip_damaged=True, decode=True)
    make_shards(request)
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    readable = [name for name, _, _ in made if name.split()[0] in (*FORMATS, "MPO")]
    assert len(skipped) == len(made) - len(readable)
    assert not [line for line in skipped if line.split()[1] in (*FORMATS, "MPO")]
    assert check(tmp_path / "out", decode=True) == []
    for name, data, size in made:
        if name in readable:
            picture = decode_rgb(data)
            turned = name.split()[0] in ("JPEG", "MPO", "PNG", "WEBP")
            assert picture.mode == "RGB" and picture.size == (size if turned else (7, 5)), name
            assert suffix_of(data) == {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}[name.split()[0]]


@pytest.mark.filterwarnings("ignore")
@quick(120)
@given(form=st.sampled_from(["JPEG", "PNG", "WEBP", "MPO"]), where=flips, cut=st.none() | st.integers(0, 700))
def test_any_bytes_of_a_picture_are_one_or_told(form: str, where, cut) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((9, 8), 50).convert("RGB").save(buffer, form)
    try:
        assert decode_rgb(flipped(buffer.getvalue(), where)[:cut]).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)
