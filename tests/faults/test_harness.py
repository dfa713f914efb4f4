"""The harness finds what it is there to find: a check that cannot fail would promise nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.harness import ask, broken_promise


def test_a_right_answer_keeps_the_promise() -> None:
    answer = ask("--version")
    assert answer.status == 0
    assert answer.out.startswith("mvar_lightning ")
    assert broken_promise(answer) is None


def test_one_line_keeps_the_promise(tmp_path: Path) -> None:
    answer = ask("train", tmp_path / "none.yaml", cwd=tmp_path)
    assert answer.status == 2
    assert "none.yaml" in answer.line
    assert broken_promise(answer) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise KeyError('x')", "traceback"),
        ("import sys; sys.exit(3)", "without a line"),
        ("import sys; sys.stderr.write('mvar: error: a\\nb\\n'); sys.exit(2)", "more than one line"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import time; time.sleep(60)", "did not end"),
        ("held = bytearray(600 * 2**20)", "took"),
    ],
)
def test_a_broken_promise_is_seen(code: str, reason: str) -> None:
    assert reason in (broken_promise(ask(code=code, seconds=3), memory_mb=400) or "")


def test_a_case_gets_its_surroundings(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code = """
import os, sys
print(os.getcwd(), os.environ["THIS"], "PATH" in os.environ)
open("made", "w").write("x" * 100)
try:
    open("large", "w").write("x" * 2**20)
except OSError as error:
    print(error.strerror)
"""
    answer = ask(code=code, cwd=tmp_path, env={"THIS": "that", "PATH": None}, umask=0o027, file_mb=0.5)
    assert answer.out.splitlines() == [f"{tmp_path} that False", "File too large"]
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_case_may_be_another_user() -> None:
    assert ask(code="import os; print(os.getuid())", uid=65534).out == "65534\n"


def test_streams_may_be_closed_full_or_none() -> None:
    code = "import sys; print('x' * 100000); sys.stdout.flush()"
    assert "BrokenPipeError" in ask(code=code, stdout="closed").err
    assert "No space left" in ask(code=code, stdout="full").err
    assert ask(code="import sys; sys.exit(0 if sys.stdout is None else 1)", stdout="shut").status == 0
