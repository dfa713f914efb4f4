"""`mvar tokens` from its arguments to a cache: exact, resumable, the same on any number of processes and workers."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_lightning import load
from mvar_lightning.cli import main
from mvar_lightning.data.images import decode_rgb
from mvar_lightning.data.index import ShardIndex, ShardInfo, SplitIndex, read_index, sha256_of
from mvar_lightning.data.tokens.cache import check_cache, open_part, read_cache
from mvar_lightning.data.tokens.making import Views
from mvar_lightning.data.transforms import to_batch
from tests.faults.harness import completed

Make = Callable[..., int]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arguments(tokenizer: Path, shards: Path, out: Path, *more: object) -> list[str]:
    given = [
        "make",
        "--checkpoint",
        tokenizer,
        "--data",
        shards,
        "--out",
        out,
        "--num-workers",
        0,
        "--devices",
        1,
        *more,
    ]
    return [str(one) for one in ["tokens", *given]]


@pytest.fixture
def make(tokenizer: Path, shards: Path, tmp_path: Path) -> Make:
    """Runs `mvar tokens make` in this process; `out` is a name."""

    def run(out: str, *more: object, tokenizer: Path = tokenizer, shards: Path = shards) -> int:
        return main(arguments(tokenizer, shards, tmp_path / out, "--accelerator", "cpu", *more))

    return run


def images_in(folder: Path, split: str) -> list[tuple[str, int, Image.Image]]:
    """Key, label and picture of all samples, in the order of the shards."""
    found = []
    for shard in read_index(folder).split(split).shards:
        with tarfile.open(folder / shard.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in members:
            key, suffix = name.split(".")
            if suffix != "cls":
                found.append((key, int(members[f"{key}.cls"]), decode_rgb(members[name])))
    return found


def tokens_in(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    """Tokens (v, N, L) and labels of a split."""
    cache = read_cache(folder)
    parts = [open_part(cache, part) for part in cache.split(split)]
    return np.concatenate([tokens for tokens, _ in parts], axis=1), [n for _, labels in parts for n in labels.tolist()]


def test_a_cache_holds_what_the_tokenizer_makes_of_the_views(
    make: Make, tokenizer: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("c", "--views", 2, "--flip", "--batch-size", 20) == 0
    assert "96 train images in 2 views, 32 val; 21 tokens each" in capsys.readouterr().out
    assert main(["tokens", "check", str(tmp_path / "c"), "--checkpoint", str(tokenizer)]) == 0
    cache, (_, loaded) = read_cache(tmp_path / "c"), load(tokenizer)
    views = Views(cache.settings)
    for split in ("train", "val"):
        tokens, labels = tokens_in(tmp_path / "c", split)
        images = images_in(shards, split)
        assert labels == [label for _, label, _ in images]
        for view in range(cache.settings.views_of(split)):
            crops = to_batch([views.of(image, split, key)[view] for key, _, image in images])
            assert np.array_equal(tokens[view], loaded.encode(crops).numpy())
    tokens, _ = tokens_in(tmp_path / "c", "train")
    assert (tokens[0] != tokens[1]).any(axis=1).mean() > 0.9


def test_views_are_random_crops_and_odd_ones_are_mirrored(make: Make, tmp_path: Path) -> None:
    make("c", "--views", 4, "--flip")
    settings = read_cache(tmp_path / "c").settings
    ramp = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (30, 1, 3)))
    views = Views(settings).of(ramp, "train", "key")
    falls = [view.getpixel((0, 0)) > view.getpixel((15, 0)) for view in views]
    assert falls == [False, True, False, True]
    assert len({view.tobytes() for view in views}) == 4
    again = Views(settings).of(ramp, "train", "key")
    assert [view.tobytes() for view in views] == [view.tobytes() for view in again]
    assert views[0].tobytes() != Views(settings).of(ramp, "train", "other")[0].tobytes()
    assert len(Views(settings).of(ramp, "val", "key")) == 1


def test_workers_do_not_change_a_byte(make: Make, tmp_path: Path) -> None:
    assert make("one", "--views", 2) == 0
    assert make("two", "--views", 2, "--num-workers", 2) == 0
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert make("other", "--views", 2, "--seed", 1) == 0
    assert content_of(tmp_path / "one") != content_of(tmp_path / "other")


def test_the_encoder_may_run_in_bfloat16_and_then_says_so(make: Make, tmp_path: Path) -> None:
    assert make("full") == make("half", "--precision", "bf16-mixed") == 0
    assert read_cache(tmp_path / "half").settings.precision == "bf16-mixed"
    full, half = (tokens_in(tmp_path / name, "val")[0] for name in ("full", "half"))
    assert 0.7 < (full == half).mean() < 1


def test_a_finished_cache_is_left_alone_and_a_damaged_one_mended(make: Make, tmp_path: Path) -> None:
    make("c")
    whole = content_of(tmp_path / "c")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*.npy")}
    spoiled = tmp_path / "c" / "train" / "000001.npy"
    spoiled.write_bytes(b"x" * spoiled.stat().st_size)
    assert main(["tokens", "check", str(tmp_path / "c")]) == 1
    assert make("c") == 0
    assert content_of(tmp_path / "c") == whole
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {spoiled, spoiled.with_name("000001.labels.npy")}


def test_another_tokenizer_or_other_options_are_refused(
    make: Make, other_tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make("c")
    before = content_of(tmp_path / "c")
    for more, message in (
        ({"tokenizer": other_tokenizer}, "was begun with tokenizer"),
        (("--views", 2), "was begun with views 1, now it is 2"),
        (("--crop", "adm"), "was begun with crop random, now it is adm"),
    ):
        result = make("c", **more) if isinstance(more, dict) else make("c", *more)
        assert result == 2 and message in capfd.readouterr().err
    assert content_of(tmp_path / "c") == before
    assert main(["tokens", "check", str(tmp_path / "c"), "--checkpoint", str(other_tokenizer)]) == 1
    assert "made by tokenizer" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--views", 0), "views 0: must be 1 or more"),
        (("--batch-size", 0), "batch_size 0: must be 1 or more"),
        (("--views", 3, "--crop", "center"), "views 3: with crop center only 1 differ"),
        (("--views", 3, "--crop", "adm", "--flip"), "views 3: with crop adm and flip only 2 differ"),
        (("--flip",), "flip: mirrors odd views"),
        (("--crop", "left"), "crop 'left'"),
        (("--resize-ratio", 0.5), "resize_ratio 0.5"),
        (("--precision", "16"), "precision '16': choose one of 32-true, bf16-mixed"),
        (("--num-workers", -1), "num_workers -1"),
        (("--devices", 0), "devices 0: must be 1 or more"),
        (("--accelerator", "tpu"), "accelerator tpu"),
        (("--data", "nowhere"), "nowhere"),
        (("--checkpoint", "nowhere"), "nowhere: no such checkpoint"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    fails: Callable[..., str], tokenizer: Path, shards: Path, workplace: Path, more: tuple[Any, ...], message: str
) -> None:
    out = workplace / "c"
    assert message in fails(*arguments(tokenizer, shards, out, "--accelerator", "cpu", *more))


def spoil(folder: Path, out: Path, bad: set[int]) -> Path:
    """A copy of shards in which some images of the first training shard are cut off."""
    index = read_index(folder)
    splits: dict[str, SplitIndex] = {}
    for split in index.splits:
        infos = []
        for number, shard in enumerate(index.split(split).shards):
            path = out / shard.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(folder / shard.name) as source, tarfile.open(path, "w") as target:
                for place, member in enumerate(source):
                    data = source.extractfile(member).read()  # type: ignore[union-attr]
                    if split == "train" and number == 0 and place // 2 in bad and not member.name.endswith("cls"):
                        data = data[:40]
                    info = tarfile.TarInfo(member.name)
                    info.size = len(data)
                    target.addfile(info, io.BytesIO(data))
            infos.append(ShardInfo(shard.name, shard.samples, path.stat().st_size, sha256_of(path)))
        splits[split] = SplitIndex(tuple(infos))
    (out / "index.json").write_text(ShardIndex(index.class_names, splits).to_json())
    return out


def test_damaged_images_are_named_and_left_out(
    make: Make, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = spoil(shards, tmp_path / "damaged", {0, 5})
    make("whole", "--views", 2)
    capsys.readouterr()
    assert make("c", "--views", 2, shards=damaged) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out, train/000000: ")]
    keys = [key for key, _, _ in images_in(shards, "train")]
    assert [line.split(": ")[1] for line in told] == [keys[0], keys[5]]
    cache = read_cache(tmp_path / "c")
    assert (cache.samples("train"), cache.damaged, check_cache(tmp_path / "c")) == (94, 2, [])
    whole, part = (tokens_in(tmp_path / name, "train")[0] for name in ("whole", "c"))
    assert np.array_equal(np.delete(whole, [0, 5], axis=1), part)


def test_too_many_damaged_images_stop_the_work(
    make: Make, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = spoil(shards, tmp_path / "damaged", set(range(12)))
    assert make("c", shards=damaged) == 2
    assert "samples are damaged" in capsys.readouterr().err


def test_a_missing_shard_is_told_before_anything_is_written(
    make: Make, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = spoil(shards, tmp_path / "broken", set())
    (broken / "val" / "000001.tar").unlink()
    assert make("c", shards=broken) == 2
    assert "shard val/000001.tar: missing" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, argparse; from mvar_lightning.commands import tokens;"
        "tokens.add_parser(argparse.ArgumentParser().add_subparsers());"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'lightning', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


KILLER = """
import os, signal
from mvar_lightning.data.tokens import making
whole = making.write_array
written = 0
def write_array(path, content):
    global written
    written += path.name.endswith("0000%d.npy" % (written % 10))
    if written == 3:  # in the middle of the third part
        path.with_name(f".partial-{os.getpid()}-{path.name}").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, content)
making.write_array = write_array
"""


@pytest.mark.slow
def test_killed_work_goes_on_with_the_same_command(make: Make, tokenizer: Path, shards: Path, tmp_path: Path) -> None:
    assert make("whole", "--views", 2) == 0
    (tmp_path / "killer.py").write_text(KILLER)
    given = arguments(tokenizer, shards, tmp_path / "c", "--views", 2, "--accelerator", "cpu")
    killed = completed("--import", "killer", *given, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "train").glob("0*.npy")}
    assert {path.name for path in parts} == {f"{n:06d}{kind}.npy" for n in (0, 1) for kind in ("", ".labels")}
    with pytest.raises(ValueError, match="interrupted, run it again"):
        read_cache(tmp_path / "c")
    assert make("c", "--views", 2) == 0
    assert content_of(tmp_path / "c") == content_of(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in parts} == parts


def test_the_number_of_threads_is_put_back(make: Make) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make("c")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
