"""`mvar shards` from its arguments to its exit status."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from mvar_lightning.commands import shards
from mvar_lightning.errors import UserError


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
    for arguments in (("--samples-per-shard", "0"), ("--resize", "0"), ("--val-fraction", "2")):
        with pytest.raises(UserError):
            run("make", image_folder, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_the_parser_loads_nothing_heavy():
    code = (
        "import sys, argparse; from mvar_lightning.commands import shards;"
        "shards.add_parser(argparse.ArgumentParser().add_subparsers());"
        "sys.exit(any(name in sys.modules for name in ('torch', 'webdataset', 'PIL', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
