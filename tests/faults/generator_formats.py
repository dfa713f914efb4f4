"""Containers as other programs write them: tars, NumPy archives, state dicts. Much of it is valid and judged by value."""
# ruff: noqa: E501, PERF401 - one case a row

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .assets import SIDE, color, var_recipe, write_yaml
from .fault import EITHER, REFUSED, RIGHT, Fault, Step, fault, put, says, set_json
from .generator_files import EVALUATE, TRAIN

# --- tars --------------------------------------------------------------------------------------------------------------

Member = tuple[str, bytes]


def picture(label: int, number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color(label, number)).save(buffer, kind)
    return buffer.getvalue()


def samples(count: int = 8, name: str = "{n:04d}", image: str = "png", text: str = "{label}") -> list[Member]:
    members = []
    for n in range(count):
        key = name.format(n=n)
        members += [(f"{key}.cls", text.format(label=n % 2).encode()), (f"{key}.{image}", picture(n % 2, n))]
    return members


def tar(
    members: Iterable[Member],
    form: int = tarfile.USTAR_FORMAT,
    change: Callable[[tarfile.TarInfo], object] = lambda info: None,
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            file.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


def special(kind: bytes) -> bytes:
    """A shard with one member that is a folder, a link or a device."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        odd = tarfile.TarInfo("odd")
        odd.type, odd.linkname = kind, "elsewhere"
        file.addfile(odd)
        for name, data in samples():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LOAD = """
import sys
from mvar_lightning import ShardsDataModule, UserError
try:
    data = ShardsDataModule(None, train_shards="train.tar", val_shards=["{name}"], num_classes=2, epoch_samples=8,
                            image_size=8, resize_ratio=1.0, num_workers=0, batch_size=4)
    for batch in data.ordered_dataloader("val"):
        for image, label in zip(batch["image"], batch["label"]):
            value = image.float()
            value = (value + 1) * 127.5 if value.min() < 0 else value
            print("SAMPLE", int(label), *[round(float(v)) for v in value.mean((1, 2))])
except UserError as error:
    print(f"mvar: error: {{error}}", file=sys.stderr)
    sys.exit(2)
"""


def loaded(count: int):
    """So many validation samples, each with its label and its colors."""

    def check(folder: Path, answer) -> str | None:
        found = sorted(
            tuple(map(int, line.split()[1:])) for line in answer.out.splitlines() if line.startswith("SAMPLE")
        )
        if len(found) != count:
            return f"{len(found)} samples, not {count}"
        wrong = [row for row in found if (row[1] < row[3]) != bool(row[0])]
        if wrong:
            return f"label {wrong[0][0]} for an image of color {wrong[0][1:]}"
        greens = sorted(row[2] for row in found)
        return None if len(set(greens)) == count else f"samples come twice: {greens}"

    return check


def many_dots() -> list[Member]:
    """Keys with dots: web datasets take all after the first dot for the ending."""
    return samples(name="run.1/{n:04d}")


VALID_TARS: dict[str, Callable[[], bytes]] = {
    "pax": lambda: tar(samples(), tarfile.PAX_FORMAT),
    "gnu": lambda: tar(samples(), tarfile.GNU_FORMAT),
    "pax-long-names": lambda: tar(samples(name="folder-" + "x" * 150 + "/{n:04d}"), tarfile.PAX_FORMAT),
    "gnu-long-names": lambda: tar(samples(name="folder-" + "x" * 150 + "/{n:04d}"), tarfile.GNU_FORMAT),
    "unicode-names": lambda: tar(samples(name="Straße-猫-{n:04d}"), tarfile.PAX_FORMAT),
    "spaces": lambda: tar(samples(name="my image {n:04d}")),
    "leading-dot-slash": lambda: tar(samples(name="./{n:04d}")),
    "folders": lambda: tar(samples(name="a/b/c/{n:04d}")),
    "dotted-folder": lambda: tar(many_dots()),
    "image-first": lambda: tar([m for n in range(8) for m in reversed(samples()[2 * n : 2 * n + 2])]),
    "newline-label": lambda: tar(samples(text="{label}\n")),
    "padded-label": lambda: tar(samples(text=" {label} \r\n")),
    "zeros-label": lambda: tar(samples(text="00{label}")),
    "upper-endings": lambda: tar(samples(image="PNG")),
    "more-members": lambda: tar(
        [
            m
            for n in range(8)
            for m in [*samples()[2 * n : 2 * n + 2], (f"{n:04d}.json", b"{}"), (f"{n:04d}.txt", b"a cat")]
        ]
    ),
    "folder-member": lambda: special(tarfile.DIRTYPE),
    "link-member": lambda: special(tarfile.SYMTYPE),
    "device-member": lambda: special(tarfile.CHRTYPE),
    "old-dates": lambda: tar(samples(), change=lambda info: setattr(info, "mtime", 0)),
    "no-mode": lambda: tar(samples(), change=lambda info: setattr(info, "mode", 0)),
    "owner": lambda: tar(samples(), tarfile.PAX_FORMAT, lambda info: setattr(info, "uid", 2**30)),
    "split-names": lambda: tar([(name.replace("png", "jpeg"), data) for name, data in samples()]),
    "trailing-zeros": lambda: tar(samples()) + bytes(100 * 512),
    "fraction-date": lambda: tar(samples(), tarfile.PAX_FORMAT, lambda info: setattr(info, "mtime", 1.5)),
}
WRONG_TARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty-file": (lambda: b"", REFUSED),
    "empty-tar": (lambda: tar([]), REFUSED),
    # as a tar that was cut between two members, so nobody can say that it is whole
    "no-end": (lambda: tar(samples()).rstrip(b"\0") + b"\0" * (-len(tar(samples()).rstrip(b"\0")) % 512), REFUSED),
    "gzip": (lambda: gzip.compress(tar(samples())), EITHER),
    "zip": (lambda: b"PK\3\4" + bytes(2000), REFUSED),
    "no-labels": (lambda: tar(m for m in samples() if not m[0].endswith("cls")), REFUSED),
    "no-images": (lambda: tar(m for m in samples() if m[0].endswith("cls")), REFUSED),
    "label-word": (lambda: tar(samples(text="ant")), REFUSED),
    "label-float": (lambda: tar(samples(text="{label}.0")), REFUSED),
    "label-negative": (lambda: tar(samples(text="-1")), REFUSED),
    "label-large": (lambda: tar(samples(text="7")), REFUSED),
    "label-huge": (lambda: tar(samples(text="9" * 5000)), REFUSED),
    "label-empty": (lambda: tar(samples(text="")), REFUSED),
    "label-binary": (lambda: tar([(n, b"\xff\xfe" if n.endswith("cls") else d) for n, d in samples()]), REFUSED),
    "other-images": (lambda: tar(samples(image="gif")), REFUSED),
    "all-images-bad": (lambda: tar([(n, d if n.endswith("cls") else b"bad") for n, d in samples()]), REFUSED),
    "labels-apart": (lambda: tar(sorted(samples(), key=lambda m: m[0][-3:])), EITHER),
    "doubled": (lambda: tar(samples(4) + samples(4)), EITHER),
    "two-images": (lambda: tar([m for n in range(8) for m in [*samples()[2 * n : 2 * n + 2], (f"{n:04d}.jpg", picture(n % 2, n, "JPEG"))]]), EITHER),
    "two-parts": (lambda: tar(samples(4)) + tar([(f"b{n}", d) for n, d in samples(4)]), EITHER),
    "apple-doubles": (lambda: tar([m for n in range(8) for m in [(f"._{n:04d}.png", b"\0\5\x16\7"), *samples()[2 * n : 2 * n + 2]]]), EITHER),
}  # fmt: skip


UNREADABLE = {"label-word", "label-float", "label-empty", "label-binary", "label-huge", "all-images-bad"}


def tars(rng: random.Random) -> list[Fault]:
    made = []
    ordinary = put("train.tar", tar(samples()))
    for name, data in VALID_TARS.items():
        odd = put("odd.tar", data())
        made.append(
            fault(
                "tars",
                "loading",
                name,
                "",
                "",
                ordinary,
                odd,
                code=LOAD.format(name="odd.tar"),
                want=RIGHT,
                check=loaded(8),
            )
        )
    for name, (data, want) in WRONG_TARS.items():
        odd = put("odd.tar", data())
        skipped = name in UNREADABLE  # up to ten are left out and named
        made.append(
            fault(
                "tars",
                "loading",
                name,
                "",
                "",
                ordinary,
                odd,
                code=LOAD.format(name="odd.tar"),
                want=EITHER if skipped else want,
                check=says(r"odd\.tar") if skipped else None if name == "doubled" else loaded(8),
                names="odd",
            )
        )
        argv = bare_train("odd.tar", "train.tar")
        made.append(
            fault("tars", "training", name, "recipes/var.yaml tok", argv, ordinary, odd, want=want, names="odd")
        )
    for place in (
        "train {0..1}.tar",
        "odd::x.tar",
        "odd#1.tar",
        "odd%20.tar",
        "odd?.tar",
        "[odd].tar",
        "odd@2.tar",
        "-odd.tar",
        "odd.tar.gz",
        "odd",
        "pipe.tar",
        "file:odd.tar",
        "ödd.tar",
        "odd;x.tar",
        "odd&x.tar",
        "odd$HOME.tar",
        "odd'.tar",
    ):
        want = EITHER if set(place) & set("{:") or place == "odd" else RIGHT
        made.append(
            fault(
                "tars",
                "loading",
                f"named-{place.replace('/', '|')}",
                "",
                "",
                ordinary,
                put(place, tar(samples())),
                code=LOAD.format(name=place.replace("'", "\\'")),
                want=want,
                check=loaded(8),
                names="odd|train",
            )
        )
    return made


def bare_train(train: str, val: str) -> str:
    place = f"--data.path=null --data.train_shards={train} --data.val_shards={val} --data.num_classes=2"
    return f"train recipes/var.yaml {place} --data.epoch_samples=8"


# --- NumPy ---------------------------------------------------------------------------------------------------------------


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def pixels(count: int = 20, side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def moments(size: int = 8) -> dict[str, np.ndarray]:
    random_row = np.random.default_rng(0).normal(size=size)
    return {"mu": random_row, "sigma": np.eye(size)}


def fid_is(value: float | None = None, low: float = 0.0, high: float = 1e6):
    """The report's Frechet distance is a finite number, in this range."""

    def check(folder: Path, answer) -> str | None:
        import json
        import re

        text = (folder / "out/images.json").read_text()
        if "NaN" in text or "Infinity" in text:
            return "NaN or Infinity in images.json"
        found = re.search(r'"fid"[^}]*?(-?[\d.]+(?:e-?\d+)?)', text, re.DOTALL)
        number = float(found.group(1)) if found else None
        json.loads(text)
        if number is not None and not low - 1e-3 <= number <= high:
            return f"FID {number}, not in [{low}, {high}]"
        return None

    return check


SAME = fid_is(high=0.01)
IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (lambda: npz(True, arr_0=pixels()), RIGHT),
    "fortran": (lambda: npz(arr_0=np.asfortranarray(pixels())), RIGHT),
    "labels-too": (lambda: npz(arr_0=pixels(), arr_1=np.zeros(20, np.int64)), RIGHT),
    "more-arrays": (lambda: npz(arr_0=pixels(), note=np.array("made by hand")), RIGHT),
    "one-image": (lambda: npz(arr_0=pixels(1)), EITHER),
    "no-image": (lambda: npz(arr_0=pixels(0)), REFUSED),
    "no-pixels": (lambda: npz(arr_0=np.zeros((20, 0, 0, 3), np.uint8)), REFUSED),
    "float": (lambda: npz(arr_0=pixels() / 255), REFUSED),
    "float-255": (lambda: npz(arr_0=pixels().astype(np.float32)), REFUSED),
    "int64": (lambda: npz(arr_0=pixels().astype(np.int64)), REFUSED),
    "int8": (lambda: npz(arr_0=pixels().view(np.int8)), REFUSED),
    "bool": (lambda: npz(arr_0=pixels() > 100), REFUSED),
    "channels-first": (lambda: npz(arr_0=pixels().transpose(0, 3, 1, 2)), REFUSED),
    "gray": (lambda: npz(arr_0=pixels()[..., 0]), REFUSED),
    "one-channel": (lambda: npz(arr_0=pixels()[..., :1]), REFUSED),
    "alpha": (lambda: npz(arr_0=np.concatenate([pixels(), pixels()[..., :1]], -1)), REFUSED),
    "one-picture": (lambda: npz(arr_0=pixels()[0]), REFUSED),
    "five-dimensions": (lambda: npz(arr_0=pixels()[None]), REFUSED),
    "other-name": (lambda: npz(images=pixels()), REFUSED),
    "no-array": (lambda: npz(), REFUSED),
    "text": (lambda: npz(arr_0=np.array(["a", "b"])), REFUSED),
    "record": (lambda: npz(arr_0=np.zeros(20, [("r", "u1"), ("g", "u1")])), REFUSED),
    "other-size": (lambda: npz(arr_0=pixels(side=12)), REFUSED),
    "not-square": (lambda: npz(arr_0=pixels()[:, :6]), REFUSED),
    "npy-renamed": (lambda: npy(pixels()), REFUSED),
    "objects": (lambda: npz(arr_0=np.array([pixels(1)[0], None], object)), REFUSED),
    "version-3": (lambda: version_three(), RIGHT),
    "text-member": (lambda: zip_of({"arr_0.npy": b"not an array"}), REFUSED),
    "cut-member": (lambda: zip_of({"arr_0.npy": npy(pixels())[:3000]}), REFUSED),
    "wrong-shape-member": (lambda: zip_of({"arr_0.npy": npy(pixels()).replace(b"(20, 8, 8, 3)", b"(90, 8, 8, 3)")}), REFUSED),
    "huge-shape-member": (lambda: zip_of({"arr_0.npy": npy(pixels()).replace(b"(20, 8, 8, 3), }     ", b"(2000000, 8, 8, 3), }")}), REFUSED),
    "folder-members": (lambda: zip_of({"samples/arr_0.npy": npy(pixels())}), REFUSED),
    "twice": (lambda: zip_of([("arr_0.npy", npy(pixels())), ("arr_0.npy", npy(pixels()))]), EITHER),
}  # fmt: skip
MOMENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (lambda: npz(**moments()), RIGHT),
    "float32": (lambda: npz(**{k: v.astype(np.float32) for k, v in moments().items()}), RIGHT),
    "big-endian": (lambda: npz(**{k: v.astype(">f8") for k, v in moments().items()}), RIGHT),
    "fortran": (lambda: npz(mu=moments()["mu"], sigma=np.asfortranarray(moments()["sigma"])), RIGHT),
    "row": (lambda: npz(mu=moments()["mu"][None], sigma=moments()["sigma"]), EITHER),
    "integers": (lambda: npz(mu=np.zeros(8, np.int64), sigma=np.eye(8, dtype=np.int64)), EITHER),
    "half": (lambda: npz(**{k: v.astype(np.float16) for k, v in moments().items()}), EITHER),
    "complex": (lambda: npz(mu=moments()["mu"] + 1j, sigma=moments()["sigma"]), REFUSED),
    "nan-mean": (lambda: npz(mu=np.full(8, np.nan), sigma=np.eye(8)), REFUSED),
    "inf-sigma": (lambda: npz(mu=np.zeros(8), sigma=np.full((8, 8), np.inf)), REFUSED),
    "not-symmetric": (lambda: npz(mu=np.zeros(8), sigma=np.triu(np.ones((8, 8)))), REFUSED),
    "negative": (lambda: npz(mu=np.zeros(8), sigma=-np.eye(8)), REFUSED),
    "negative-variance": (lambda: npz(mu=np.zeros(8), sigma=np.diag([1.0] * 7 + [-5])), REFUSED),
    "other-size": (lambda: npz(**moments(5)), REFUSED),
    "sizes-differ": (lambda: npz(mu=np.zeros(8), sigma=np.eye(7)), REFUSED),
    "diagonal": (lambda: npz(mu=np.zeros(8), sigma=np.ones(8)), REFUSED),
    "scalar": (lambda: npz(mu=np.float64(0), sigma=np.float64(1)), REFUSED),
    "mean-alone": (lambda: npz(mu=np.zeros(8)), REFUSED),
    "sigma-alone": (lambda: npz(sigma=np.eye(8)), REFUSED),
    "empty": (lambda: npz(mu=np.zeros(0), sigma=np.zeros((0, 0))), REFUSED),
    "text": (lambda: npz(mu=np.array("0"), sigma=np.array("1")), REFUSED),
    "zero-sigma": (lambda: npz(mu=np.zeros(8), sigma=np.zeros((8, 8))), EITHER),
    "huge-values": (lambda: npz(mu=np.full(8, 1e200), sigma=np.eye(8) * 1e300), EITHER),
}  # fmt: skip


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def version_three() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pixels(), version=(3, 0))
    return zip_of({"arr_0.npy": buffer.getvalue()})


def zip_of(members: dict[str, bytes] | list[Member]) -> bytes:
    import warnings
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in members.items() if isinstance(members, dict) else members:
            file.writestr(name, data)
    return buffer.getvalue()


def arrays(rng: random.Random) -> list[Fault]:
    made = []
    for name, (data, want) in IMAGES.items():
        as_reference = rng.random() < 0.4 or name == "no-image"
        old, side = ("npz/others.npz", "reference") if as_reference else ("npz/images.npz", "images")
        check = fid_is() if want != REFUSED else None
        made.append(
            fault(
                "arrays",
                "reading",
                f"{side}-{name}",
                "npz features.ts",
                EVALUATE.replace(old, "odd.npz"),
                put("odd.npz", data()),
                want=want,
                check=check,
                names=r"odd\.npz|others|images",
            )
        )
    for name in ("compressed", "fortran", "labels-too", "version-3"):
        made.append(
            fault(
                "arrays",
                "reading",
                f"equal-{name}",
                "npz features.ts",
                EVALUATE.replace("npz/others.npz", "odd.npz"),
                put("odd.npz", IMAGES[name][0]()),
                want=RIGHT,
                check=SAME,
            )
        )
    for name, (data, want) in MOMENTS.items():
        made.append(
            fault(
                "arrays",
                "reading",
                f"moments-{name}",
                "npz features.ts",
                EVALUATE.replace("npz/others.npz", "odd.npz"),
                put("odd.npz", data()),
                want=want,
                check=fid_is(),
                names=r"odd\.npz",
            )
        )
    return made + token_parts()


def token_parts() -> list[Fault]:
    """Parts of a token cache in other layouts of the same numbers, and of other numbers."""
    rewritten: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "int64": lambda a: a.astype(np.int64),
        "big-endian": lambda a: a.astype(">u2"),
        "fortran": np.asfortranarray,
        "float": lambda a: a.astype(np.float32),
        "flat": lambda a: a.reshape(-1, a.shape[-1]),
        "too-large": lambda a: a + 100,
        "one-row-less": lambda a: a[:, :-1],
        "one-token-more": lambda a: np.concatenate([a, a[..., :1]], -1),
        "objects": lambda a: a.astype(object),
    }
    made = []
    for name, change in rewritten.items():
        made.append(
            fault(
                "arrays",
                "reading",
                f"part-{name}",
                "cache tok recipes",
                TRAIN,
                from_cache,
                rewrite("cache/train/000001.npy", change),
                mend,
                want=EITHER if name == "fortran" else REFUSED,
                names="000001|cache",
            )
        )
    for name, change in {
        "two": lambda a: a + 5,
        "negative": lambda a: a - 3,
        "float": lambda a: a.astype(float),
        "short": lambda a: a[:-1],
        "matrix": lambda a: a[None],
    }.items():
        made.append(
            fault(
                "arrays",
                "reading",
                f"labels-{name}",
                "cache tok recipes",
                TRAIN,
                from_cache,
                rewrite("cache/train/000001.labels.npy", change),
                mend,
                names="000001|cache|label",
            )
        )
    return made


def from_cache(folder: Path) -> None:
    """The recipe trains on the token cache."""
    arguments = {"path": "cache", "batch_size": 4, "num_workers": 0}
    data = {"class_path": "mvar_lightning.TokenShards", "init_args": arguments}
    write_yaml(folder / "recipes/var.yaml", {**var_recipe(), "data": data})


def rewrite(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Step:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)), allow_pickle=True)


def mend(folder: Path) -> None:
    """Sizes of the parts as they now are; sums stay as they were, as after a copy by another tool."""
    size = sum((folder / f"cache/train/000001{end}").stat().st_size for end in (".npy", ".labels.npy"))
    set_json("cache/tokens.json", "splits.train.parts.1.bytes", size)(folder)
