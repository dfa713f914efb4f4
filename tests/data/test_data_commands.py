"""`mvar shards` from its arguments to its exit status."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest

from mvar_lightning.commands import shards
from mvar_lightning.data import index
from mvar_lightning.data.check import check
from mvar_lightning.errors import UserError
from mvar_lightning.tools.console import Lines


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    shards.add_parser(parser.add_subparsers())
    args = parser.parse_args(["shards", *map(str, arguments)])
    return args.run(args)


def test_make_then_check(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("make", image_folder, out, "--val-fraction", "0.5", "--samples-per-shard", "5", "--resize", "12") == 0
    assert "3 classes" in capsys.readouterr().out
    assert run("check", out) == 0
    assert "sound" in capsys.readouterr().out
    (out / "train" / "000000.tar").unlink()
    assert run("check", out) == 1
    assert "train/000000.tar: missing" in capsys.readouterr().out


def test_make_embedded_digits(tmp_path, capsys):
    assert run("make", "digits", tmp_path / "d") == 0
    assert "1437 train" in capsys.readouterr().out


def test_bad_values_are_user_errors(image_folder, tmp_path):
    for arguments in (
        ("--samples-per-shard", "0"),
        ("--resize", "0"),
        ("--val-fraction", "2"),
        ("--workers", "0"),
        ("--ground-truth", "x.csv"),
    ):
        with pytest.raises(UserError):
            run("make", image_folder, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_the_same_command_goes_on_and_fresh_begins_anew(image_folder, tmp_path, capsys):
    out, bad = tmp_path / "out", image_folder / "bee" / "0.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"no picture")
    with pytest.raises(UserError, match="what is finished is kept"):
        run("make", image_folder, out, "--samples-per-shard", "3")
    with pytest.raises(UserError, match=r"has other resize \(None, now 12\); .* fresh"):
        run("make", image_folder, out, "--samples-per-shard", "3", "--resize", "12")
    bad.write_bytes(good)
    assert run("make", image_folder, out, "--samples-per-shard", "3", "--resize", "12", "--fresh") == 0
    assert "parts were finished" not in capsys.readouterr().err
    assert run("check", out, "--decode", "--workers", "2") == 0


def test_what_was_left_out_is_counted_at_the_end(image_folder, tmp_path, capsys):
    (image_folder / "bee" / "0.jpg").write_bytes(b"no picture")
    assert run("make", image_folder, tmp_path / "out", "--skip-damaged") == 0
    assert "1 images could not be read and are left out, see skipped.txt" in capsys.readouterr().out
    assert "bee/0.jpg: not a readable" in (tmp_path / "out" / "skipped.txt").read_text()


def test_check_tells_labels_that_are_none_and_files_that_cannot_be_read(
    numbered_shards, rewrite_shard, tmp_path, monkeypatch
):
    folder = numbered_shards()
    rewrite_shard(folder, "val/000000.tar", lambda name, data: (name, b"3" if name.endswith(".cls") else data))
    assert check(folder) == []
    problems = check(folder, decode=True)
    assert len(problems) == 3 and "label b'3' is not one of 3 classes" in problems[0]

    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(index, "sha256_of", broken)
    assert check(folder)[0] == "train/000000.tar: cannot be read (Input/output error)"


def test_progress_without_a_terminal_is_a_line_every_so_often(capsys):
    lines = Lines("images", 200, seconds=0)
    lines.advance(50)
    told = capsys.readouterr().err
    assert re.fullmatch(r"50 of 200 images \(25%\), [\d,.]+ a second, \d+ min left\n", told)
    quiet = Lines("images", 200, seconds=60)
    quiet.advance(50)
    assert capsys.readouterr().err == ""


def test_the_parser_loads_nothing_heavy():
    code = (
        "import sys, argparse; from mvar_lightning.commands import shards;"
        "shards.add_parser(argparse.ArgumentParser().add_subparsers());"
        "sys.exit(any(name in sys.modules for name in ('torch', 'webdataset', 'PIL', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
