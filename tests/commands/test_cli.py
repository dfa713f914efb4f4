"""The command `mvar` itself: quick to start, and every mistake of its arguments ends with status 2."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mvar_lightning import UserError, __version__
from mvar_lightning.cli import COMMANDS, build_parser, main

HEAVY = ("torch", "lightning", "numpy", "matplotlib", "webdataset", "yaml", "rich")


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mvar_lightning.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 2
    assert done.stdout.splitlines()[-1] == "heavy: []"
    for command in ("train", "sweep", "fit", "validate", "test", "sample", "edit", "import", "export", "info"):
        assert f"    {command} " in done.stdout


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["train", "sweep", "fit", "validate", "test", "sample", "edit", "evaluate", "analyze", "reconstruct"]
    names += ["analyze", "import", "export", "info", "shards", "tokens", "bench"]
    for name in names:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert f"usage: mvar {name}" in capsys.readouterr().out
    assert len(COMMANDS) <= len(names)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and __version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["train"], ["sample", "--count", "x"], ["shards"]])
def test_arguments_of_the_wrong_form_end_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


def test_unknown_arguments_are_refused_where_no_overrides_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "x", "--model.depth=8"]) == 2
    assert capsys.readouterr().err == "mvar: error: unknown arguments: --model.depth=8 (see mvar --help)\n"
    assert build_parser().parse_known_args(["train", "r.yaml", "--model.depth=8"])[1] == ["--model.depth=8"]


def test_traceback_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError):
        main(["--traceback", "info", "nothing/there"])
    monkeypatch.setenv("MVAR_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["info", "nothing/there"])


@pytest.mark.slow
def test_a_mistake_is_one_line_on_the_real_stderr(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {class_path: mvar_lightning.WARModule}\n")
    command = [sys.executable, "-m", "mvar_lightning.cli", "train", "r.yaml"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "mvar: error: recipe r.yaml: model: WARModule is no LightningModule (did you mean VARModule?)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
