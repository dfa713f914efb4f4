"""Images that come as arrays: IDX files (MNIST, Fashion-MNIST, KMNIST), npz and npy (MedMNIST, Keras, many labs).

N images, HW pixels, C channels.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from mvar_lightning.data.images import MAX_PIXELS
from mvar_lightning.data.making.sources import Example, FileExamples, LazyExamples, Source, split_by_class
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import in_a_line
from mvar_lightning.tools.tensors import open_arrays, read_array

ARRAY_SUFFIXES = (".npz", ".npy")

FASHION = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
"""Where Debian's package puts the files, and where those who have them from elsewhere may."""

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""Third byte of the magic number -> numpy's type; numbers are big-endian."""

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test", "t10k")}
"""What files and arrays of a split are called."""

_IDX_NAME = re.compile(r".+[-.]idx\d(-[^.]+)?(\.gz)?")

IMAGES, LABELS = ("images", "image", "x", "data"), ("labels", "label", "y", "targets")


def fashion() -> Source:
    """Fashion-MNIST: 70,000 gray images of 28 x 28, 10 classes; its 10,000 test images are the validation.

    Raises:
        UserError: its files are in none of the places in `FASHION`.
    """
    for folder in FASHION:
        if find_idx(folder):
            return read_idx(folder, FASHION_CLASSES)
    raise UserError(
        f"data set fashion: its four IDX files are not in {FASHION[0]}; apt-get install dataset-fashion-mnist "
        f"(Debian, Ubuntu), or put them into {FASHION[1]}"
    )


def find_idx(folder: Path) -> list[Path]:
    """The IDX files of a folder, gzip or not, in the order of their names."""
    try:
        return sorted(path for path in folder.iterdir() if _IDX_NAME.fullmatch(path.name) and path.is_file())
    except OSError:  # no folder, or none that may be read: who looks for images there says so
        return []


def read_idx(folder: Path, class_names: tuple[str, ...] = ()) -> Source:
    """A folder of IDX files named as MNIST's are: ``train-images-idx3-ubyte.gz``, ``t10k-labels-idx1-ubyte`` and so on.

    Args:
        folder: with images and labels of ``train``, and of ``t10k``, ``test`` or ``val``.
        class_names: the numbers of the labels if not given.

    Raises:
        UserError: a file is missing, cut short, of another format or not of images and labels.
    """
    where = f"folder {folder}"
    plain = {path.name.removesuffix(".gz"): path for path in reversed(find_idx(folder))}  # packed and not: one file
    found = {name: partial(load_idx, plain[file]) for name, file in _known_names(plain, where).items()}
    return _source(found, where, class_names, (0.1, 0))


def load_idx(path: Path) -> NDArray[Any]:
    """The array of one IDX file (http://yann.lecun.com/exdb/mnist), gzip or not.

    Raises:
        UserError: wrong magic number, more or fewer bytes than its sizes say, unreadable.
    """
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            magic = file.read(4)
            kind, dimensions = (magic[2], magic[3]) if len(magic) == 4 else (0, 0)
            if magic[:2] != b"\0\0" or kind not in IDX_TYPES or not 1 <= dimensions <= 4:
                raise UserError(f"{path}: is no IDX file (its first four bytes are {magic.hex(' ')})")
            lengths = file.read(4 * dimensions)
            sizes = [int.from_bytes(lengths[at : at + 4], "big") for at in range(0, len(lengths), 4)]
            expected = math.prod(sizes) * np.dtype(IDX_TYPES[kind]).itemsize
            content = bytearray()
            # one byte more than are due, so that longer files are seen; never what a damaged header dreams of
            while len(content) <= expected and (piece := file.read(min(2**20, expected + 1 - len(content)))):
                content += piece
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if len(lengths) < 4 * dimensions or len(content) != expected:
        raise UserError(f"{path}: {expected:,} bytes are due for {sizes}, others are there; it is cut short or damaged")
    return np.frombuffer(content, IDX_TYPES[kind]).reshape(sizes)


def read_arrays(path: Path, val_fraction: float = 0.1, seed: int = 0) -> Source:
    """A file of arrays: an npz with ``train_images``, ``train_labels``, ``val_images``, ``val_labels`` (MedMNIST),
    ``x_train``, ``y_train``, ``x_test``, ``y_test`` (Keras) or ``images``, ``labels``, which are split by class;
    an npy of images beside one of labels (``images.npy``, ``labels.npy``). An npz may hold ``class_names``.

    Images are N x H x W or N x H x W x C with one, three or four channels of uint8, or one of uint16; labels whole
    numbers, N or N x 1.

    Raises:
        UserError: arrays that are missing or of other shapes or types; nothing is unpickled.
    """
    where = f"arrays {path}"
    try:
        if path.suffix.lower() == ".npy":
            images, labels = (path.with_name(path.name.replace("images", kind)) for kind in ("images", "labels"))
            if "images" not in path.name or not labels.is_file():
                raise UserError(f"{where}: name it ...images.npy, and put its labels beside it as ...labels.npy")
            loaded = {"images": np.load(images, mmap_mode="r"), "labels": np.load(labels)}
            if any(isinstance(array, NpzFile) for array in loaded.values()):
                raise UserError(f"{where}: it or its labels are an npz; name it so")
            return _source(
                {name: partial(_same, array) for name, array in loaded.items()}, where, (), (val_fraction, seed)
            )
        with open_arrays(path) as archive:
            read = partial(read_array, path, archive)
            names = _class_names(read("class_names"), where) if "class_names" in archive.files else ()
            known = _known_names(archive.files, where)
            loads = {name: partial(read, found) for name, found in known.items()}
            return _source(loads, where, names, (val_fraction, seed))
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{where}: does not fit into memory, or its headers are damaged ({error})") from None
    except Exception as error:  # a damaged archive or header makes numpy and zipfile fail in any way
        raise UserError(f"{where}: cannot be read ({in_a_line(error)})") from None


def _class_names(names: NDArray[Any], where: str) -> tuple[str, ...]:
    """Texts, or bytes as some writers have them. Raises `UserError` for others and for a name that comes twice."""
    if names.ndim != 1:
        raise UserError(f"{where}, class_names: have {names.ndim} dimensions; give a list of names")
    texts = tuple(name.decode("utf-8") if isinstance(name, bytes) else str(name) for name in names.tolist())
    if twice := [name for number, name in enumerate(texts) if not name or name in texts[:number]]:
        raise UserError(f"{where}, class_names: {twice[0]!r} is empty or comes twice; give each class a name")
    return texts


def _known_names(names: Iterable[str], where: str) -> dict[str, str]:
    """What is there by its known name. Raises `UserError` where two are the same, of which one would be lost."""
    found: dict[str, str] = {}
    for name in names:
        if (known := _known_name(name)) in found:
            raise UserError(f"{where}: {found[known]} and {name} could both be the {known}; leave one of them there")
        found[known] = name
    return found


def _same(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _known_name(name: str) -> str:
    """``train_images`` for ``x_train``, ``train-images-idx3-ubyte.gz`` and the like, ``images`` where no split is
    named; any other name as it is."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    kind = next((kind for kind, known in (("images", IMAGES), ("labels", LABELS)) if words & set(known)), "")
    split = next((split for split, known in SPLITS.items() if words & set(known)), "")
    return "_".join(filter(None, (split, kind))) if kind else name


Load = Callable[[], NDArray[Any]]


def _source(arrays: Mapping[str, Load], where: str, names: tuple[str, ...], split: tuple[float, int]) -> Source:
    """Of arrays by their known names. Raises `UserError` where one is missing or does not fit."""
    if "images" in arrays:
        images = _images(arrays, "", where)
        values, numbers = _classes(images.labels, names, where)
        return _split(images, values, numbers, where, split)
    held = "val" if "val_images" in arrays else "test"
    train, val = _images(arrays, "train_", where), _images(arrays, f"{held}_", where)
    kinds = [f"{_shape(pixels[0])} of {pixels.dtype}" for pixels in (train.pixels_NHWC, val.pixels_NHWC)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{where}: images for training are {kinds[0]}, of {held} {kinds[1]}; give both alike")
    values, numbers = _classes(np.concatenate([train.labels, val.labels]), names, where)
    if missing := set(np.unique(val.labels)) - set(np.unique(train.labels)):
        raise UserError(f"{where}: class {min(missing)} has {held} images but none for training")
    training, held_out = (
        ArrayExamples(images.pixels_NHWC, [numbers[int(label)] for label in images.labels], f"{where}, {name}")
        for images, name in ((train, "train"), (val, held))
    )
    note = (f"{where}: val is used, test is left out",) if {"val_images", "test_images"} <= set(arrays) else ()
    return Source(values, training, held_out, note)


def _split(
    images: Images, names: tuple[str, ...], numbers: dict[int, int], where: str, split: tuple[float, int]
) -> Source:
    """Each class split by the seed, as folders of images are."""
    labels = [numbers[int(label)] for label in images.labels]
    rows = [[str(row) for row in np.flatnonzero(images.labels == value)] for value in numbers]
    halves = split_by_class(rows, names, *split, where)
    made = []
    for half in (halves.train, halves.val):
        assert isinstance(half, FileExamples)
        chosen = [int(row) for row in half.paths]
        made.append(ArrayExamples(images.pixels_NHWC, [labels[row] for row in chosen], where, chosen))
    return Source(names, made[0], made[1])


class Images(NamedTuple):
    """Checked images and labels of one split."""

    pixels_NHWC: NDArray[np.uint8] | NDArray[np.uint16]
    labels: NDArray[np.int64]


def _images(arrays: Mapping[str, Load], split: str, where: str) -> Images:
    for kind in ("images", "labels"):
        if f"{split}{kind}" not in arrays:
            known = ", ".join(sorted(arrays)[:8]) or "nothing"
            raise UserError(
                f"{where}: no {split}{kind} (there is {known}); images and labels of train and of val or test are due, "
                "or of neither: a share of those is held out"
            )
    pixels, labels = arrays[f"{split}images"](), arrays[f"{split}labels"]()
    name = f"{where}, {split}images"
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{name}: are {pixels.dtype}; give uint8, from 0 to 255, or uint16, from 0 to 65535")
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] not in (1, 3, 4)) or 0 in pixels.shape:
        raise UserError(f"{name}: are {_shape(pixels)}; give N x H x W, or N x H x W x C of 1, 3 or 4 channels")
    if math.prod(pixels.shape[1:3]) > MAX_PIXELS:
        raise UserError(f"{name}: are {_shape(pixels)}; an image has {MAX_PIXELS:,} pixels at most")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{where}, {split}labels: are {labels.dtype} of {_shape(labels)}; give a whole number for each image"
        )
    if pixels.dtype == np.uint16 and pixels.ndim == 4 and pixels.shape[-1] != 1:
        raise UserError(
            f"{name}: are uint16 of {pixels.shape[-1]} channels; 16 bits are kept of one, give others uint8"
        )
    if len(labels) != len(pixels):
        raise UserError(f"{where}: {len(pixels):,} {split}images and {len(labels):,} {split}labels do not match")
    if labels.max() > np.iinfo(np.int64).max:
        raise UserError(f"{where}, {split}labels: go up to {labels.max()}; number the classes from 0")
    return Images(pixels if pixels.ndim == 4 else pixels[..., None], labels.astype(np.int64))


def _shape(array: NDArray[Any]) -> str:
    return " x ".join(map(str, array.shape)) or "a single value"


def _classes(labels: NDArray[np.int64], names: tuple[str, ...], where: str) -> tuple[tuple[str, ...], dict[int, int]]:
    """Names of the classes, and the index of each label; labels that are not used are no classes."""
    values = [int(value) for value in np.unique(labels)]
    if names and (values[0] < 0 or values[-1] >= len(names)):
        raise UserError(f"{where}: has labels from {values[0]} to {values[-1]}, but {len(names)} class names")
    return tuple(names[value] if names else str(value) for value in values), {v: n for n, v in enumerate(values)}


class ArrayExamples(LazyExamples):
    """Rows of an array, each encoded as PNG when it is asked for."""

    def __init__(
        self,
        pixels_NHWC: NDArray[np.uint8] | NDArray[np.uint16],
        labels: Sequence[int],
        name: str,
        rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__(labels)
        self.pixels_NHWC, self.name, self.rows = pixels_NHWC, name, rows

    def example(self, index: int) -> Example:
        row = index if self.rows is None else self.rows[index]
        pixels_HWC = np.ascontiguousarray(self.pixels_NHWC[row])  # a copy: it travels to other processes by itself
        return Example(f"{self.name}, image {row}", self.labels[index], partial(_png, pixels_HWC), "png")


def _png(pixels_HWC: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC).save(
        buffer, "PNG", compress_level=1
    )
    return buffer.getvalue()
