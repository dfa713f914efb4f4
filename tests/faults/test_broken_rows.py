"""Rows of a hostile user: arrays of other writers, stops that reach a sweep alone, names given twice."""

from __future__ import annotations

import gzip
import io
import signal
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvar_lightning.data.images import SampleError
from mvar_lightning.data.making.embedded import load_source
from mvar_lightning.data.making.sources import Source
from mvar_lightning.data.tar import label_of
from mvar_lightning.errors import UserError
from mvar_lightning.sampling.class_choice import class_indices

from .harness import Answer, Started, ask, broken_promise, start

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(24) % 2


def shards_of(folder: Path, **arrays: object) -> Source:
    """The source that an npz of these arrays is."""
    np.savez(folder / "set.npz", **arrays)  # type: ignore[arg-type]
    return load_source(str(folder / "set.npz"), 0.1, 0, None)


def refused(answer: Answer, *words: str) -> None:
    assert broken_promise(answer) is None and answer.status == 2, answer.err
    assert all(word in answer.line for word in words), answer.line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": PIXELS[::-1]}, "images and data could both be the images"),
        ({"label_names": np.array(["cat", "dog"])}, "labels and label_names could both be the labels"),
        ({"class_names": np.array(["a", "a"])}, "'a' is empty or comes twice"),
        ({"class_names": np.array("cat")}, "0 dimensions"),
        ({"labels": LABELS.astype(np.uint64) + np.uint64(2**63)}, "number the classes from 0"),
    ],
)
def test_arrays_of_two_meanings_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        shards_of(tmp_path, **{"images": PIXELS, "labels": LABELS, **changes})


def test_class_names_of_bytes_are_text(tmp_path: Path) -> None:
    made = shards_of(tmp_path, images=PIXELS, labels=LABELS, class_names=np.array([b"cat", b"dog"]))
    assert made.class_names == ("cat", "dog")


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes()


def test_a_set_as_torchvision_leaves_it(tmp_path: Path) -> None:
    """``MNIST/raw`` holds each file packed and unpacked; its parent will do, one of the files will not."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for name, array in (("images-idx3", PIXELS[..., 0]), ("labels-idx1", LABELS.astype(np.uint8))):
            (raw / f"{split}-{name}-ubyte").write_bytes(idx(array))
            (raw / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    for place in (raw, raw.parent):
        source = load_source(place)
        assert [len(source.train), len(source.val), source.class_names] == [24, 24, ("0", "1")]
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte: .* give their folder"):
        load_source(raw / "train-images-idx3-ubyte")


def test_names_that_are_one_number_or_no_line(tmp_path: Path) -> None:
    for name in ("7", "007", "8"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(PIXELS[number]).save(tmp_path / "folders" / name / f"{number}.png")
    source = load_source(tmp_path / "folders")
    assert (source.class_names, len(source.train), len(source.val)) == (("007", "7", "8"), 3, 3)
    (tmp_path / "list.csv").write_text("".join(f"folders/{name}/0.png,{label}\n" for label, name in
                                               (("0", "8"), ("1", "7"), ("01", "007"))))  # fmt: skip
    with pytest.raises(UserError, match="classes 1 and 01 are one number"):
        load_source(tmp_path / "list.csv")
    with pytest.raises(UserError, match=r"class 'a\\nb': its name has a line break") as said:
        shards_of(tmp_path, images=PIXELS, labels=LABELS, class_names=np.array(["a\nb", "c"]))
    assert "\n" not in str(said.value)
    with pytest.raises(UserError, match="labels: are int64 of a single value"):
        shards_of(tmp_path, images=PIXELS, labels=np.int64(1))


def test_numbers_with_underscores_are_no_labels() -> None:
    assert label_of(b" 10\n") == 10
    with pytest.raises(SampleError, match="1_0"):
        label_of(b"1_0")


@pytest.mark.parametrize("classes", ["all,1", "1, all"])
def test_all_classes_and_some(classes: str) -> None:
    with pytest.raises(UserError, match="all takes every class"):
        class_indices(classes, 3)


def test_idx_files_of_two_sets_are_not_mixed(tmp_path: Path) -> None:
    """EMNIST comes as six sets in one folder."""
    for family in ("balanced", "letters"):
        for split in ("train", "test"):
            (tmp_path / f"emnist-{family}-{split}-images-idx3-ubyte").write_bytes(idx(PIXELS[..., 0]))
            (tmp_path / f"emnist-{family}-{split}-labels-idx1-ubyte").write_bytes(idx(LABELS.astype(np.uint8)))
    with pytest.raises(UserError, match=r"emnist-\w+-train-.* could both be the train_"):
        load_source(str(tmp_path), 0.1, 0, None)


def test_arrays_under_the_name_of_the_other_kind(tmp_path: Path) -> None:
    with (tmp_path / "set.npz").open("wb") as file:
        np.save(file, PIXELS)
    refused(ask("shards", "make", "set.npz", "out", cwd=tmp_path), "is a single array")
    with (tmp_path / "images.npy").open("wb") as file:
        np.savez(file, images=PIXELS)
    np.save(tmp_path / "labels.npy", LABELS)
    refused(ask("shards", "make", "images.npy", "out", cwd=tmp_path), "npz")


def test_arrays_that_cannot_be_unpacked(tmp_path: Path) -> None:
    """A zip with a password, and a size in a header that no memory holds."""
    np.savez(tmp_path / "set.npz", images=PIXELS, labels=LABELS)
    content = bytearray((tmp_path / "set.npz").read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + flags] |= 1
    (tmp_path / "locked.npz").write_bytes(content)
    refused(ask("shards", "make", "locked.npz", "out", cwd=tmp_path), "locked.npz", "encrypted")
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (9_999_999, 1000, 1000, 3)}
    np.lib.format.write_array_header_1_0(header, about)
    labels = io.BytesIO()
    np.save(labels, LABELS)
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", labels.getvalue())
    refused(ask("shards", "make", "vast.npz", "out", cwd=tmp_path, memory_mb=2000), "vast.npz: ", "another size")


def await_file(path: Path, begun: Started) -> None:
    """Wait until a case has written a file; that it has ended without is no reason to wait on."""
    while not path.exists() and not begun.ended():
        time.sleep(0.01)


SLOW_TO_STOP = """#!/bin/sh
trap 'touch told; sleep 0.2; touch saved; exit 130' TERM
touch started
while :; do sleep 0.05; done
"""
"""Stands for a run that keeps its place when it is told to stop."""


STOPPED_SWEEP = """
from mvar_lightning.cli import terminable
from mvar_lightning.runs import sweep
with terminable():
    print(sweep._wait(["./run"]))
"""


@pytest.mark.parametrize("often", [False, True])
def test_a_stop_of_the_sweep_reaches_its_run(often: bool, tmp_path: Path) -> None:
    """`kill` tells the sweep alone: the run must hear of it, and have the time to save; nor may it live on unheard of
    where the sweep is told again and again."""
    (tmp_path / "run").write_text(SLOW_TO_STOP)
    (tmp_path / "run").chmod(0o755)
    begun = start(code=STOPPED_SWEEP, cwd=tmp_path, seconds=30)
    await_file(tmp_path / "started", begun)
    begun.send(signal.SIGTERM)  # also where the sweep has not yet come back from starting it
    while often and not (tmp_path / "told").exists() and not begun.ended():
        begun.send(signal.SIGTERM)
        time.sleep(0.02)
    answer = begun.finish()
    assert answer.out.split() == ["130"], answer
    assert (tmp_path / "saved").exists()


def test_moments_do_not_take_the_place_of_images(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        np.savez(tmp_path / f"{name}.npz", arr_0=PIXELS)
    before = (tmp_path / "theirs.npz").read_bytes()
    command = "evaluate images --images ours.npz --reference theirs.npz --features f.ts --out out --save-moments"
    refused(ask(*command.split(), "theirs.npz", cwd=tmp_path), "theirs.npz", "holds images")
    assert (tmp_path / "theirs.npz").read_bytes() == before
