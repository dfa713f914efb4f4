"""Lists and ImageNet's archives as sources of images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mvar_lightning.data import imagenet
from mvar_lightning.data.embedded import load_source
from mvar_lightning.data.index import check
from mvar_lightning.data.listing import read_list
from mvar_lightning.data.shards import ShardLimits, write_shards
from mvar_lightning.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02085620")
SHOWN = (2, 0, 1, 1, 0)
"""Labels of the five validation images."""

DEVKIT_NUMBERS = {"n01440764": 3, "n01443537": 1, "n02085620": 2}
"""The development kit's own order."""


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 10 % 256, 40, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Training and validation archive of three classes, as ImageNet's are built, without a ground truth."""
    folder = tmp_path / "imagenet"
    folder.mkdir()
    with tarfile.open(folder / imagenet.TRAIN, "w") as outer:
        for label, wnid in reversed(list(enumerate(WNIDS))):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(4):
                    add(tar, f"{wnid}_{number}.JPEG", jpeg(4 * label + number))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / imagenet.VAL, "w") as tar:
        for number in range(len(SHOWN)):
            add(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", jpeg(100 + number))
    return folder


def write_truth(folder: Path, kind: str) -> Path:
    wnids = [WNIDS[label] for label in SHOWN]
    numbers = "".join(f"{DEVKIT_NUMBERS[wnid]}\n" for wnid in wnids)
    if kind == "wnids":
        path = folder / "labels.txt"
        path.write_text("\n".join(wnids))
    elif kind == "kaggle":
        path = folder / "LOC_val_solution.csv"
        rows = [f"ILSVRC2012_val_{n + 1:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for n, wnid in enumerate(wnids)]
        path.write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    elif kind == "numbers":
        path = folder / "ILSVRC2012_validation_ground_truth.txt"
        path.write_text(numbers)
    else:
        path = folder / imagenet.DEVKIT
        synsets = np.array(
            [(number, wnid, "words") for wnid, number in DEVKIT_NUMBERS.items()],
            dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")],
        )
        mat = io.BytesIO()
        savemat(mat, {"synsets": synsets})
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
            add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", numbers.encode())
    return path


@pytest.mark.parametrize("kind", ["wnids", "kaggle", "devkit"])
def test_imagenet_archives_are_read_in_place(kind: str, archives: Path) -> None:
    truth = write_truth(archives, kind)
    source = load_source(archives, ground_truth=truth if kind == "wnids" else None)
    assert source.class_names == WNIDS
    assert [example.label for example in source.train] == [0] * 4 + [1] * 4 + [2] * 4
    assert [example.load() for example in source.train] == [jpeg(number) for number in range(12)]
    assert [example.label for example in source.val] == list(SHOWN)
    assert [example.load() for example in source.val] == [jpeg(100 + number) for number in range(5)]
    assert [example.label for example in source.train[3:5]] == [0, 1]


def test_bare_numbers_are_refused_since_their_order_is_not_that_of_the_classes(archives: Path) -> None:
    write_truth(archives, "numbers")
    with pytest.raises(UserError, match="an order of its own"):
        load_source(archives)


def test_what_imagenet_lacks_is_told(archives: Path) -> None:
    with pytest.raises(UserError, match="no ground truth beside the archives"):
        load_source(archives)
    with pytest.raises(UserError, match=r"none\.txt does not exist"):
        load_source(archives, ground_truth=archives / "none.txt")
    truth = write_truth(archives, "wnids")
    truth.write_text("\n".join([WNIDS[0]] * 3))
    with pytest.raises(UserError, match="no line for ILSVRC2012_val_00000004"):
        load_source(archives, ground_truth=truth)
    truth.write_text("\n".join(["n99999999"] * 5))
    with pytest.raises(UserError, match=r"a class that .* does not have"):
        load_source(archives, ground_truth=truth)
    truth.write_text("tench\n")
    with pytest.raises(UserError, match="'tench' is not a WordNet id"):
        load_source(archives, ground_truth=truth)
    (archives / imagenet.VAL).unlink()
    with pytest.raises(UserError, match="is not there"):
        load_source(archives, ground_truth=truth)


def test_a_cut_off_archive_is_told(archives: Path) -> None:
    write_truth(archives, "kaggle")
    whole = (archives / imagenet.TRAIN).read_bytes()
    (archives / imagenet.TRAIN).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged or cut off|ends at"):
        source = load_source(archives)
        [example.load() for example in source.train]
    (archives / imagenet.TRAIN).write_bytes(b"nonsense" * 1000)
    with pytest.raises(UserError, match="damaged or cut off"):
        load_source(archives)


def test_imagenet_becomes_shards(archives: Path, tmp_path: Path) -> None:
    write_truth(archives, "devkit")
    index = write_shards(load_source(archives), tmp_path / "out", ShardLimits(5))
    assert index.class_names == WNIDS and index.split("val").samples == 5
    assert check(tmp_path / "out", workers=2, decode=True) == []


# -- lists


def make_list(folder: Path, text: str, name: str = "list.csv", images: int = 6) -> Path:
    for number in range(images):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / name).write_text(text)
    return folder / name


def test_a_list_names_images_and_classes(tmp_path: Path) -> None:
    path = make_list(tmp_path, "path,label\n" + "".join(f"{n}.jpg,{'cat' if n % 2 else 'ant'}\n" for n in range(6)))
    source = load_source(path, val_fraction=0.34)
    assert source.class_names == ("ant", "cat")
    assert (len(source.train), len(source.val)) == (4, 2)
    for example in (*source.train, *source.val):
        number = int(Path(example.name).stem)
        assert example.label == number % 2 and example.load() == jpeg(number)


def test_a_list_may_tell_the_split_and_number_the_classes(tmp_path: Path) -> None:
    rows = [f"{n}.jpg\t{10 if n < 3 else 9}\t{'val' if n in (1, 4) else 'train'}\n" for n in range(6)]
    source = read_list(make_list(tmp_path, "".join(rows), "list.tsv"))
    assert source.class_names == ("9", "10"), "numbers are ordered as numbers"
    assert [(Path(example.name).stem, example.label) for example in source.val] == [("1", 1), ("4", 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no images"),
        ("0.jpg,a\n1.jpg\n", "line 2: 1 cells"),
        ("0.jpg,a\n9.jpg,a\n", r"line 2: image .*9\.jpg does not exist"),
        ("0.jpg,a,train\n1.jpg,a,middle\n", "line 2: split 'middle' is not known"),
        ("0.jpg,a,train\n1.jpg,a\n", "line 2: has no split, other lines have"),
        ("0.jpg,a,train\n1.jpg,a,train\n", "no line is of split val"),
        ("0.jpg,a\n1.jpg,b\n", "each class has one image"),
    ],
)
def test_a_wrong_list_is_told_by_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_list(make_list(tmp_path, text))


def test_a_list_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_source(tmp_path / "none.csv")
    (tmp_path / "image.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="is no text"):
        load_source(tmp_path / "image.txt")
    with pytest.raises(UserError, match="is for ImageNet's archives"):
        load_source(tmp_path, ground_truth="x.txt")
