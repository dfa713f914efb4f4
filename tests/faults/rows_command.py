"""Rows of the command line."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from .harness import Answer
from .rows_checkpoints import STOP
from .rows_kit import Case, first, mistake, needs_full, result, row
from .rows_training import SHORT

SAMPLE = ("sample", "--checkpoint", "var", "--classes", 0, "--count", 1, "--device", "cpu")


@row("stdout-gone", "train and sample into a closed pipe; info into a full device")
def _(case: Case) -> str | None:
    needs_full()
    case.take("var", "tok", "shards", "recipes")
    train = case.ask("train", "recipes/var.yaml", "--run-folder", "run", *SHORT, stdout="closed")
    sample = case.ask(*SAMPLE, stdout="closed")
    full = case.ask("info", "var", stdout="full")
    return first(
        result(train, "train"),
        None if (case.folder / "run/metrics.json").exists() else "train: no report",
        result(sample, "sample"),
        None if (case.folder / "samples/grid.png").exists() else "sample: no grid",
        mistake(full, what="info") or (None if full.status == 2 else f"info: status {full.status}"),
    )


def struck(status: int | None, err: str, what: str) -> str | None:
    """Status 130 and a last line that says what was interrupted."""
    lines = err.strip().splitlines() or [""]
    if status != 130 or "Traceback" in err:
        return f"{what}: status {status}, {lines[-1][:150]!r}"
    said = lines[-1].removeprefix("mvar:").strip()
    return None if len(said.split()) > 2 else f"{what}: prints {lines[-1]!r}"


@row("interrupted", "Ctrl-C during the imports and while saving; SIGTERM while sampling")
def _(case: Case) -> str | None:
    case.take("var", "official")
    process = started(case, "sample", "--checkpoint", "var", "--device", "cpu")
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    reasons = [struck(process.returncode, err, "imports")]
    kill = "lambda: os.kill(os.getpid(), signal.SIGINT)"
    argv = ["import", "--architecture", "var", "--model", "official/var.pth", "--tokenizer", "official/var_tok.pth"]
    argv += ["--patch-nums", "1,2", "--out", "again"]
    code = f"import signal, sys\nfrom pathlib import Path\n{STOP}\nfrom mvar_lightning import cli\n"
    code += f"stop_at('again', 1, {kill})\nsys.exit(cli.main({argv!r}))"
    saving = case.ask(code=code)
    reasons.append(struck(saving.status, saving.err, "saving"))
    given = ("--count", 3000, "--batch-size", 4, "--device", "cpu", "--classes", 0)
    work = case.harness.start("sample", "--checkpoint", "var", *given, cwd=case.folder, seconds=40)
    while not work.ended() and len(list((case.folder / "samples").glob("0*.png"))) < 8:
        time.sleep(0.01)
    work.send(signal.SIGTERM)
    answer = work.finish()
    return first(*reasons, struck(answer.status, answer.err, "SIGTERM"))


def started(case: Case, *argv: str, module: str = "mvar_lightning.cli") -> subprocess.Popen[str]:
    environment = {**case.harness.environment, "PYTHONPATH": str(case.product)}
    command = [sys.executable, "-m", module, *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=case.folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def timed(case: Case, *argv: str, module: str = "mvar_lightning.cli") -> tuple[float, int, str, str]:
    """Processor seconds of a process of its own, its status, and what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = started(case, *argv, module=module)
    out, err = process.communicate(timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, process.returncode, out, err


def soon(told: tuple[float, int, str, str], what: str, most: float, status: int) -> str | None:
    seconds, found, _, err = told
    if found != status or "Traceback" in err:
        return f"{what}: status {found}, {(err.strip().splitlines() or [''])[-1][:150]}"
    return None if seconds <= most else f"{what}: {seconds:.1f} processor seconds until the answer"


@row("bench-help", "help of the attention benchmark")
def _(case: Case) -> str | None:
    told = timed(case, "attention", "--help", module="benchmarks")
    if told[1]:  # before the benchmarks were a package of their own
        told = timed(case, "bench", "attention", "--help")
    return soon(told, "benchmark attention --help", 1.0, 0)


@row("missing-argument", "fit without --config, sample without a model")
def _(case: Case) -> str | None:
    commands = (("fit",), ("sample", "--classes", "1"))
    return first(*[soon(timed(case, *command), " ".join(command), 1.5, 2) for command in commands])


@row("damaged-text", "a recipe that is not UTF-8, damaged run.json and metrics.json")
def _(case: Case) -> str | None:
    case.take("tok", "shards", "recipes", "runs")
    (case.folder / "r.yaml").write_bytes(b"\xff\xfe\x00seed")
    reasons = [mistake(case.ask("train", "r.yaml"), "r.yaml", what="recipe")]
    for name in ("run.json", "metrics.json"):
        file = case.folder / "runs/var" / name
        whole = file.read_bytes()
        for damaged in (b"{", b"[]", b"\xff"):
            file.write_bytes(damaged)
            answer = case.ask("train", "recipes/var.yaml")
            # what can be read anew may be
            reasons.append(None if answer.status == 0 else mistake(answer, "runs/var", what=f"{name} {damaged!r}"))
        file.write_bytes(whole)
    return first(*reasons)


@row("import-that-raises", "--import of a module that raises")
def _(case: Case) -> str | None:
    (case.folder / "mine.py").write_text("raise RuntimeError('no license')")
    return mistake(case.ask("--import", "mine", "info", "x"), "mine", "no license")


@row("names-and-places", "names too long for the file system, a current folder that is gone")
def _(case: Case) -> str | None:
    case.take("var", "tok", "shards", "recipes")
    long = "a" * 300
    (case.folder / "gone").mkdir()
    commands = (
        ("info", long),
        ("train", long),
        ("train", "recipes/var.yaml", "--run-folder", long),
        ("shards", "make", "digits", long),
        ("shards", "check", long),
        (*SAMPLE, "--out", long),
        ("export", "var", "--model", long, "--tokenizer", "t.pth"),
    )
    reasons = [mistake(case.ask(*command), what=" ".join(map(str, command[:2]))[:30]) for command in commands]
    gone = case.harness.ask("info", "x", cwd=case.folder / "gone", delete_cwd=True)
    return first(*reasons, mistake(gone, what="a current folder that is gone"))


@row("litter", "what killed processes left, after the next run")
def _(case: Case) -> str | None:
    case.take("var")
    for number in (1, 2):
        code = f"_, tok = m.load('var')\nstop_at('out', {number}, die)\nm.save('out', None, tok)\ntell(0)"
        case.script(STOP + code)
        case.script("_, tok = m.load('var')\nm.save('out', None, tok)\ntell(0)")
    left = sorted(path.name for path in case.folder.iterdir() if path.name.startswith("."))
    use = "m.ShardsDataModule('data/digits', image_size=8, batch_size=4, num_workers=0).setup('fit')\ntell(0)"
    case.script(f"{STOP}stop_at('digits', 1, die)\n{use}")
    again = case.script(use)
    left += sorted(path.name for path in (case.folder / "data").iterdir() if path.name != "digits")
    return first(again.failed or again.refused, f"left for ever: {left}" if left else None)


@row("misspelt-command", "a command with a typing error")
def _(case: Case) -> str | None:
    answer = case.ask("smaple")
    listed = sum(f"'{name}'" in answer.err for name in ("train", "sweep", "fit", "edit", "import", "export", "info"))
    if listed > 3:
        return f"lists the commands, {len(answer.err)} characters"
    return mistake(answer, "mvar sample")


@row("lightnings-spelling", "--ckpt_path, as Lightning spells it")
def _(case: Case) -> str | None:
    case.take("tok", "shards", "recipes", "runs/long/checkpoints/last.ckpt")
    path = "runs/long/checkpoints/last.ckpt"
    given = ("fit", "--config", "recipes/long.yaml", f"--ckpt_path={path}", "--run-folder", "run")
    answer: Answer = case.ask(*given)
    return None if answer.status == 0 else mistake(answer, "--ckpt-path")


@row("many-classes", "sample without --classes on 40 classes")
def _(case: Case) -> str | None:
    case.take("tok")
    code = """
_, tok = m.load("tok")
model = m.NextScaleTransformer([1, 2], vocab_size=16, code_dim=4, num_classes=40, depth=1, width=16, heads=2)
m.save("forty", model, tok)
tell(0)
"""
    case.script(code)
    answer = case.ask("sample", "--checkpoint", "forty", "--device", "cpu")
    found = len(list((case.folder / "samples").glob("0*.png")))
    return result(answer) or (None if found == 16 else f"{found} images")


@row("edit-cuts", "edit of a 96 x 64 picture on a smaller model")
def _(case: Case) -> str | None:
    case.take("var")
    Image.new("RGB", (96, 64), (200, 30, 30)).save(case.folder / "wide.png")
    given = ("--image", "wide.png", "--box", "0,0,1,1", "--count", 1, "--device", "cpu")
    answer = case.ask("edit", "--checkpoint", "var", *given)
    said = answer.out + answer.err
    return result(answer) or (None if "96" in said and "64" in said else "cut and shrunk without a word")
