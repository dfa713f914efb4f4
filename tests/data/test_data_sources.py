"""Lists and ImageNet's archives as sources of images."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mvar_lightning.data.check import check
from mvar_lightning.data.making import imagenet
from mvar_lightning.data.making.embedded import load_source
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import read_list
from mvar_lightning.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02085620")
SHOWN = (2, 0, 1, 1, 0)
"""Labels of the five validation images."""

DEVKIT_NUMBERS = {"n01440764": 3, "n01443537": 1, "n02085620": 2, "n00001740": 4}
"""The development kit's own order; the last is one of its synsets above the classes."""


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
    elif kind == "named":
        path = folder / "val.txt"
        path.write_text("".join(f"ILSVRC2012_val_{n + 1:08d}.JPEG {wnid}\n" for n, wnid in enumerate(wnids)))
    elif kind == "numbers":
        path = folder / "ILSVRC2012_validation_ground_truth.txt"
        path.write_text(numbers)
    elif kind == "devkit folder":
        path = folder / "ILSVRC2012_devkit_t12"
        (path / "data").mkdir(parents=True)
        (path / "data" / "meta.mat").write_bytes(meta_mat())
        (path / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)
    else:
        path = folder / imagenet.DEVKIT
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta_mat())
            add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", numbers.encode())
    return path


def meta_mat() -> bytes:
    synsets = np.array(
        [(number, wnid, "words") for wnid, number in DEVKIT_NUMBERS.items()],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")],
    )
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets[:, None]})
    return mat.getvalue()


@pytest.mark.parametrize("kind", ["wnids", "named", "kaggle", "devkit", "devkit folder"])
def test_imagenet_archives_are_read_in_place(kind: str, archives: Path) -> None:
    truth = write_truth(archives, kind)
    source = load_source(archives, ground_truth=truth if kind in ("wnids", "named") else None)
    assert source.class_names == WNIDS
    assert [example.label for example in source.train] == [0] * 4 + [1] * 4 + [2] * 4
    assert [example.load() for example in source.train] == [jpeg(number) for number in range(12)]
    shown = sorted((label, number) for number, label in enumerate(SHOWN))
    assert [example.label for example in source.val] == [label for label, _ in shown]
    assert [example.load() for example in source.val] == [jpeg(100 + number) for _, number in shown]
    assert [example.label for example in source.train[3:5]] == [0, 1]


def test_bare_numbers_are_refused_since_their_order_is_not_that_of_the_classes(archives: Path) -> None:
    truth = write_truth(archives, "numbers")
    with pytest.raises(UserError, match="an order of its own"):
        load_source(archives)
    with pytest.raises(UserError, match="an order of its own"):
        truth.write_text("".join(f"ILSVRC2012_val_{n + 1:08d}.JPEG {label}\n" for n, label in enumerate(SHOWN)))
        (archives / "meta.mat").write_bytes(meta_mat())  # says what the kit's numbers mean, not what Caffe's do
        load_source(archives)


def test_numbers_are_told_by_the_kits_own_table_alone(archives: Path) -> None:
    truth = write_truth(archives, "numbers")
    (archives / "meta.mat").write_bytes(meta_mat())
    assert sorted(example.label for example in load_source(archives).val) == sorted(SHOWN)
    truth.write_text("".join(f"{label}\n" for label in SHOWN))  # sorted order, counted from 0
    with pytest.raises(UserError, match=r"line 2: '0' is not a class number of the development kit"):
        load_source(archives)
    (archives / "meta.mat").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"its meta\.mat is not the development kit's"):
        load_source(archives)


def test_a_damaged_kit_is_told(archives: Path) -> None:
    kit = write_truth(archives, "devkit")
    whole = kit.read_bytes()
    kit.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        load_source(archives)
    with tarfile.open(kit, "w:gz") as tar:
        add(tar, "readme.txt", b"")
    with pytest.raises(UserError, match=r"lacks meta\.mat"):
        load_source(archives)
    kit.unlink()
    (archives / "ILSVRC2012_devkit_t12").mkdir()
    with pytest.raises(UserError, match="lacks data/ILSVRC2012_validation_ground_truth"):
        load_source(archives)


def test_what_imagenet_lacks_is_told(archives: Path) -> None:
    with pytest.raises(UserError, match="no ground truth beside them"):
        load_source(archives)
    with pytest.raises(UserError, match=r"none\.txt: does not exist"):
        load_source(archives, ground_truth=archives / "none.txt")
    truth = write_truth(archives, "wnids")
    truth.write_text("\n".join([WNIDS[0]] * 3))
    with pytest.raises(UserError, match="no line for ILSVRC2012_val_00000004"):
        load_source(archives, ground_truth=truth)
    truth.write_text("\n".join([WNIDS[0]] * 6))
    with pytest.raises(UserError, match=r"is for 6 images, .* has 5"):
        load_source(archives, ground_truth=truth)
    truth.write_text("\n".join(["n99999999"] * 5))
    with pytest.raises(UserError, match="shows n99999999, a class that the training images do not have"):
        load_source(archives, ground_truth=truth)
    truth.write_text(f"{WNIDS[0]}\ntench\n")
    with pytest.raises(UserError, match=r"line 2: 'tench' is not a WordNet id"):
        load_source(archives, ground_truth=truth)
    truth.write_text("")
    with pytest.raises(UserError, match="is empty"):
        load_source(archives, ground_truth=truth)
    truth.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is no text"):
        load_source(archives, ground_truth=truth)
    (archives / imagenet.VAL).unlink()
    with pytest.raises(UserError, match="is not there"):
        load_source(archives, ground_truth=truth)


def test_the_training_archive_itself_names_its_folder_and_other_archives_are_refused(archives: Path) -> None:
    write_truth(archives, "kaggle")
    assert len(load_source(archives / imagenet.TRAIN).train) == 12
    with pytest.raises(UserError, match="is neither a list"):
        load_source(archives / imagenet.VAL)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", [imagenet.TRAIN, imagenet.VAL])
def test_a_cut_off_archive_is_told_wherever_it_was_cut(archives: Path, name: str, share: float) -> None:
    write_truth(archives, "kaggle")
    with tarfile.open(archives / name) as tar:
        last = tar.getmembers()[-1]
    data = (archives / name).read_bytes()[: last.offset_data + -(-last.size // 512) * 512]  # less the end mark
    (archives / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"damaged or cut off|is cut off"):
        load_source(archives)
    (archives / name).write_bytes(data)
    with pytest.raises(UserError, match="no end mark"):
        load_source(archives)


@pytest.mark.parametrize("name", [imagenet.TRAIN, imagenet.VAL])
def test_a_damaged_header_is_not_taken_for_the_end(archives: Path, name: str) -> None:
    write_truth(archives, "kaggle")
    data = bytearray((archives / name).read_bytes())
    with tarfile.open(archives / name) as tar:
        second = tar.getmembers()[1]
    data[second.offset : second.offset + 200] = b"x" * 200
    (archives / name).write_bytes(data)
    with pytest.raises(UserError, match=r"damaged or cut off|not a tar file"):
        load_source(archives)
    (archives / name).write_bytes(b"nonsense" * 1000)
    with pytest.raises(UserError, match="damaged or cut off"):
        load_source(archives)


def test_an_archive_that_shrinks_while_it_is_read(archives: Path) -> None:
    write_truth(archives, "kaggle")
    source = load_source(archives)
    os.truncate(archives / imagenet.TRAIN, 5000)
    with pytest.raises(UserError, match="ends at 5000 bytes"):
        [example.load() for example in source.train]


def unpacked(archives: Path, folder: Path, flat: bool) -> Path:
    """The same images as class folders; validation images in one folder, or by class."""
    with tarfile.open(archives / imagenet.TRAIN) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(folder / "train" / member.name.removesuffix(".tar"), filter="data")
    with tarfile.open(archives / imagenet.VAL) as tar:
        for member in tar:
            place = folder / "val" / ("" if flat else WNIDS[SHOWN[int(member.name[-13:-5]) - 1]])
            tar.extract(member, place, filter="data")
    return folder


@pytest.mark.parametrize("layout", ["flat", "by class", "kaggle"])
def test_archives_and_unpacked_folders_become_the_same_shards(archives: Path, tmp_path: Path, layout: str) -> None:
    truth = write_truth(archives, "devkit")
    index = make_shards(ShardsRequest(load_source(archives), tmp_path / "out", ShardLimits(5)))
    assert index.class_names == WNIDS and index.split("val").samples == 5
    assert check(tmp_path / "out", workers=2, decode=True) == []
    folder = tmp_path / "unpacked"
    if layout == "kaggle":
        unpacked(archives, folder / "ILSVRC" / "Data" / "CLS-LOC", flat=True)
        (folder / "ILSVRC" / "Data" / "CLS-LOC" / "test").mkdir()
        (folder / "ILSVRC" / "Annotations").mkdir()
        write_truth(folder, "kaggle")
        source = load_source(folder)
    else:
        unpacked(archives, folder, flat=layout == "flat")
        source = load_source(folder, ground_truth=truth if layout == "flat" else None)
    assert make_shards(ShardsRequest(source, tmp_path / "again", ShardLimits(5))) == index, "checksums, too"


def test_validation_images_without_labels_are_refused(archives: Path, tmp_path: Path) -> None:
    folder = unpacked(archives, tmp_path / "unpacked", flat=True)
    with pytest.raises(UserError, match="no ground truth beside them; give ground_truth"):
        load_source(folder)


def test_splits_are_not_taken_for_classes(archives: Path, tmp_path: Path) -> None:
    folder = unpacked(archives, tmp_path / "unpacked", flat=False)
    (folder / "test").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "test" / "1.jpg")
    assert load_source(folder).class_names == WNIDS
    (folder / "val").rename(folder / "validation")
    with pytest.raises(UserError, match="holds test, train, validation, which look like splits"):
        load_source(folder)
    (folder / "validation").rename(folder / "val")
    (folder / "annotations").mkdir()
    with pytest.raises(UserError, match=r"which look like splits"):
        load_source(folder)
    (folder / "annotations").rmdir()
    with pytest.raises(UserError, match="has a subfolder for each class"):
        load_source(folder, ground_truth=write_truth(archives, "kaggle"))


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
    rows = [f"{n}.jpg\t{n % 11}\t{'valid' if n in (1, 4) else 'train'}\n" for n in (*range(11), 1, 4)]
    rows = [row for n, row in enumerate(rows)] + ["11.jpg\t1\ttrain\n", "12.jpg\t4\ttrain\n"]
    source = read_list(make_list(tmp_path, "\ufeff" + "".join(rows), "list.tsv", images=13))
    assert source.class_names == tuple(map(str, range(11))), "numbers are ordered as numbers"
    assert [(Path(example.name).stem, example.label) for example in source.val][:2] == [("1", 1), ("4", 4)]


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
        ("0.jpg,a,train\n1.jpg,a,test\n", "line 2: split 'test' is not known"),
        ("0.jpg,1\n1.jpg,2\n", r"number 0 has no image \(next is 1\); number them from 0"),
        ("0.jpg,0\n1.jpg,0\n2.jpg,2\n3.jpg,2\n", "number 1 has no image"),
        ("0.jpg,a,train\n1.jpg,b,val\n", "class 'b' has validation images but none for training"),
        ("0.jpg,a\n\n   \n1.jpg;a\n", "line 4: 1 cells"),
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
    with pytest.raises(UserError, match="is for ImageNet's validation images"):
        load_source(tmp_path, ground_truth="x.txt")
