"""Sources that are arrays: IDX as MNIST's, npz as MedMNIST's and Keras's, npy; and what does not fit, in one line."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mvar_lightning.data.index import read_index
from mvar_lightning.data.making import arrays
from mvar_lightning.data.making.arrays import load_idx, read_arrays, read_idx
from mvar_lightning.data.making.embedded import load_source
from mvar_lightning.data.making.shards import ShardsRequest, make_shards
from mvar_lightning.errors import UserError

Array = NDArray[Any]


def pixels(count: int, *shape: int, start: int = 0) -> Array:
    return (np.arange(start, start + count * int(np.prod(shape))) % 251).astype(np.uint8).reshape(count, *shape)


def idx(array: Array, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


LABELS = np.arange(20, dtype=np.uint8) % 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content, packed in (
        ("train-images-idx3-ubyte.gz", idx(pixels(20, 6, 5)), True),
        ("train-labels-idx1-ubyte.gz", idx(LABELS), True),
        ("t10k-images-idx3-ubyte", idx(pixels(8, 6, 5, start=7)), False),
        ("t10k-labels-idx1-ubyte", idx(LABELS[:8]), False),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    return tmp_path


def image_of(example: Any) -> Array:
    return np.asarray(Image.open(io.BytesIO(example.load())))


def test_a_folder_of_idx_files(folder: Path) -> None:
    source = load_source(folder)
    assert source.class_names == ("0", "1", "2", "3")
    assert (len(source.train), len(source.val)) == (20, 8)
    assert [example.label for example in source.train] == LABELS.tolist()
    assert (image_of(source.train[3]) == pixels(20, 6, 5)[3]).all()
    assert (image_of(source.val[7]) == pixels(8, 6, 5, start=7)[7]).all()
    index = make_shards(ShardsRequest(folder, folder / "out"))
    assert index == read_index(folder / "out") and index.split("val").samples == 8


def test_the_data_set_fashion(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "FASHION", (tmp_path / "nowhere", folder))
    source = load_source("fashion")
    assert source.class_names == ("T-shirt/top", "Trouser", "Pullover", "Dress")
    monkeypatch.setattr(arrays, "FASHION", (tmp_path / "nowhere", tmp_path / "neither"))
    with pytest.raises(
        UserError, match=r"data set fashion: its four IDX files are not in .*apt-get install dataset-fashion"
    ):
        load_source("fashion")


@pytest.mark.skipif(not arrays.FASHION[0].is_dir(), reason="needs apt-get install dataset-fashion-mnist")
def test_the_data_set_fashion_as_packaged() -> None:
    source = load_source("fashion")
    assert source.class_names[9] == "Ankle boot"
    assert (len(source.train), len(source.val)) == (60_000, 10_000)
    assert source.train[0].label == 9 and image_of(source.train[0]).shape == (28, 28)


SHAPES: dict[str, tuple[int, ...]] = {"gray": (6, 5), "gray, one channel": (6, 5, 1), "color": (6, 5, 3)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "val_images", "val_labels"),  # MedMNIST
        ("x_train", "y_train", "x_test", "y_test"),  # Keras
    ],
    ids=["medmnist", "keras"],
)
def test_an_npz_of_two_splits(names: tuple[str, ...], shape: tuple[int, ...], tmp_path: Path) -> None:
    train, val = pixels(20, *shape), pixels(8, *shape, start=3)
    held = dict(zip(names, (train, LABELS[:, None], val, LABELS[:8]), strict=True))
    np.savez(tmp_path / "set.npz", **held)
    source = read_arrays(tmp_path / "set.npz")
    assert (image_of(source.train[2]) == train[2].squeeze()).all()
    assert (image_of(source.val[1]) == val[1].squeeze()).all()
    assert [example.label for example in source.val] == LABELS[:8].tolist()


def test_a_third_split_is_left_out_and_told(tmp_path: Path) -> None:
    parts = {f"{split}_images": pixels(8, 4, 4) for split in ("train", "val", "test")}
    labels = {f"{split}_labels": LABELS[:8] for split in ("train", "val", "test")}
    np.savez_compressed(tmp_path / "set.npz", **parts, **labels)
    assert "test is left out" in read_arrays(tmp_path / "set.npz").notes[0]


def test_images_without_splits_are_split_by_class(tmp_path: Path) -> None:
    labels = np.repeat([7, 3], 10)
    names = np.array(list("abcdefgh"))
    np.savez(tmp_path / "set.npz", images=pixels(20, 4, 4), labels=labels, class_names=names)
    source = read_arrays(tmp_path / "set.npz", val_fraction=0.2)
    assert source.class_names == ("d", "h") and (len(source.train), len(source.val)) == (16, 4)
    seen = {image_of(example).tobytes(): example.label for split in (source.train, source.val) for example in split}
    assert seen == {image.tobytes(): int(label == 7) for image, label in zip(pixels(20, 4, 4), labels, strict=True)}


def test_an_npy_beside_its_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "my_images.npy", pixels(20, 4, 4))
    np.save(tmp_path / "my_labels.npy", LABELS)
    assert len(load_source(tmp_path / "my_images.npy").train) == 16
    np.save(tmp_path / "lonely.npy", pixels(20, 4, 4))
    with pytest.raises(UserError, match=r"name it \.\.\.images\.npy, and put its labels beside it"):
        load_source(tmp_path / "lonely.npy")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "float images": ({"images": np.zeros((20, 4, 4))}, "are float64; give uint8"),
    "channels first": ({"images": pixels(20, 3, 8, 8)}, "20 x 3 x 8 x 8; give N x H x W"),
    "volumes": ({"images": pixels(20, 2, 2, 2, 2)}, "20 x 2 x 2 x 2 x 2; give N x H x W"),
    "no images": ({"images": pixels(0, 4, 4)}, "0 x 4 x 4; give"),
    "labels of several classes": ({"labels": np.zeros((20, 14), int)}, "int64 of 20 x 14; give a whole number"),
    "float labels": ({"labels": np.zeros(20)}, "float64 of 20; give a whole number"),
    "fewer labels": ({"labels": LABELS[:19]}, "20 images and 19 labels do not match"),
    "fewer names": ({"class_names": np.array(["a", "b"])}, "has labels from 0 to 3, but 2 class names"),
    "objects": ({"images": np.array([{}, []], object)}, "cannot be read"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG)
def test_arrays_that_do_not_fit(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", **{"images": pixels(20, 4, 4), "labels": LABELS, **change})
    with pytest.raises(UserError, match=reason) as error:
        read_arrays(tmp_path / "set.npz")
    assert str(error.value).removeprefix("arrays ").startswith(f"{tmp_path / 'set.npz'}")


def test_arrays_of_other_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", pixels=pixels(3, 4, 4))
    with pytest.raises(UserError, match=r"no train_images \(there is pixels\)"):
        read_arrays(tmp_path / "set.npz")
    np.savez(tmp_path / "set.npz", x_train=pixels(20, 4, 4), y_train=LABELS, x_test=pixels(2, 4, 4), y_test=[0, 9])
    with pytest.raises(UserError, match="class 9 has test images but none for training"):
        read_arrays(tmp_path / "set.npz")


def test_splits_that_do_not_belong_together(tmp_path: Path) -> None:
    train = {"x_train": pixels(20, 4, 4), "y_train": LABELS}
    np.savez(tmp_path / "set.npz", **train)
    with pytest.raises(UserError, match=r"no test_images .*of train and of val or test are due, or of neither"):
        read_arrays(tmp_path / "set.npz")
    for images, kind in (
        (pixels(8, 5, 4), "5 x 4 x 1 of uint8"),
        (pixels(8, 4, 4).astype("u2"), "4 x 4 x 1 of uint16"),
    ):
        np.savez(tmp_path / "set.npz", **train, x_test=images, y_test=LABELS[:8])
        with pytest.raises(UserError, match=f"for training are 4 x 4 x 1 of uint8, of test {kind}; give both alike"):
            read_arrays(tmp_path / "set.npz")


def test_images_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_PIXELS", 15)
    np.savez(tmp_path / "set.npz", images=pixels(20, 4, 4), labels=LABELS)
    with pytest.raises(UserError, match="20 x 4 x 4; an image has 15 pixels at most"):
        read_arrays(tmp_path / "set.npz")


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another magic number": (lambda content: b"\x89PNG" + content[4:], "first four bytes are 89 50 4e 47"),
    "an unknown type": (lambda content: content[:2] + b"\x07" + content[3:], "is no IDX file"),
    "cut short": (lambda content: content[:-1], "it is cut short or damaged"),
    "too long": (lambda content: content + b"\0", "it is cut short or damaged"),
    "sizes of another file": (lambda content: content[:4] + b"\xff" * 12 + content[16:], "it is cut short or damaged"),
    "empty": (lambda content: b"", "is no IDX file"),
    "half of a header": (lambda content: content[:9], "it is cut short or damaged"),
    "half of a gzip": (lambda content: gzip.compress(content)[:40], "cannot be read"),
}


@pytest.mark.parametrize(("change", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_idx_file(change: Callable[[bytes], bytes], reason: str, folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=reason) as error:
        read_idx(folder)
    assert str(path) in str(error.value)


def test_idx_without_labels(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no test_labels"):
        read_idx(folder)


@pytest.mark.parametrize(("kind", "dtype"), [(9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_every_type_of_idx(kind: int, dtype: str, tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    (tmp_path / "x-idx2").write_bytes(idx(array, kind))
    assert (load_idx(tmp_path / "x-idx2") == array).all()


def test_class_folders_whose_names_look_like_idx_files(tmp_path: Path) -> None:
    for name in ("a-idx", "b-idx1"):
        (tmp_path / name).mkdir()
        for number in range(12):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    assert load_source(tmp_path).class_names == ("a-idx", "b-idx1")


def test_damaged_npz_files_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(20, 8, 8), labels=LABELS)
    content, rng = (tmp_path / "a.npz").read_bytes(), random.Random(0)
    directory = content.index(b"PK\1\2")
    for start in (0, directory):  # also: another version, another compression
        for _ in range(150):
            damaged = bytearray(content)
            damaged[rng.randrange(start, min(start + 300, len(content)))] = rng.randrange(256)
            (tmp_path / "b.npz").write_bytes(damaged)
            with contextlib.suppress(UserError):
                load_source(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", pixels(20, 8, 8))
    (tmp_path / "c.npy").rename(tmp_path / "c.npz")
    with pytest.raises(UserError, match="single array"):
        load_source(tmp_path / "c.npz")
