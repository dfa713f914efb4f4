"""What a fault is, how its folder is made, and how its outcome is judged."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import re
import shlex
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .harness import Answer, Harness, broken_promise

Step = Callable[[Path], object]
"""Changes the folder of a case before the command runs."""
Check = Callable[[Path, Answer], str | None]
"""Says what is wrong with a result, or None."""

RIGHT, REFUSED, EITHER = "right", "refused", "either"
SECONDS = 20.0
MEMORY_MB = 800.0
NOBODY = 65534


@dataclass(frozen=True)
class Fault:
    """One case: a folder, a command in it, and what may come out.

    Attributes:
        assets: names below the folder of assets that are copied into the case's own.
        steps: what is done to the copies.
        argv: the command's arguments; empty where `code` is run.
        want: "right" (status 0 and `check` content), "refused" (one line), or "either".
        names: pattern that a refusal must mention: the thing that is wrong.
        may_change: patterns of earlier files that the command may replace.
        settings: of `Harness.ask`.
        same_as: files that must equal those of an undisturbed run of `again` in a fresh folder.
        again: a second command, run after the first whatever became of it; its answer is judged.
    """

    id: str
    kind: str
    command: str
    phase: str
    assets: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    argv: tuple[str, ...] = ()
    code: str | None = None
    want: str = REFUSED
    names: str = ""
    check: Check | None = None
    may_change: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    again: tuple[str, ...] = ()
    same_as: tuple[str, ...] = ()
    any_first: bool = False


def fault(
    kind: str,
    phase: str,
    slug: str,
    assets: str,
    argv: str | Iterable[str],
    *steps: Step,
    command: str = "",
    again: str = "",
    **more: Any,
) -> Fault:
    """A fault from short forms: assets and arguments in one text each."""
    words = tuple(shlex.split(argv)) if isinstance(argv, str) else tuple(argv)
    name = command or command_of(words)
    identity = f"{kind}/{name.replace(' ', '-')}/{slug}"
    return Fault(
        identity,
        kind,
        name,
        phase,
        tuple(assets.split()),
        steps,
        words,
        again=tuple(shlex.split(again)),
        **more,
    )


def command_of(words: tuple[str, ...]) -> str:
    two = {"evaluate", "analyze", "shards", "tokens", "bench"}
    return " ".join(words[: 2 if words and words[0] in two else 1]) or "api"


# --- steps -----------------------------------------------------------------------------------------------------------


def put(name: str, content: bytes | str) -> Step:
    def step(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return step


def edit(name: str, change: Callable[[bytes], bytes]) -> Step:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_json(name: str, change: Callable[[Any], Any]) -> Step:
    """`change` works in place, or returns the new content."""

    def step(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        changed = change(content)
        (folder / name).write_text(json.dumps(content if changed is None else changed))

    return step


def set_json(name: str, place: str, value: Any) -> Step:
    """One value at a dotted place; the value `...` takes it away."""

    def change(content: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        for part in parents:
            content = content[part]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return edit_json(name, change)


def move(old: str, new: str) -> Step:
    def step(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)

    return step


def copy(old: str, new: str) -> Step:
    def step(folder: Path) -> None:
        source, target = folder / old, folder / new
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

    return step


def remove(name: str) -> Step:
    def step(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    return step


def link(name: str, target: str) -> Step:
    def step(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)

    return step


def make_folder(name: str) -> Step:
    return lambda folder: (folder / name).mkdir(parents=True, exist_ok=True)


def mode(name: str, bits: int) -> Step:
    return lambda folder: (folder / name).chmod(bits)


def open_to_all(folder: Path) -> None:
    """Everything in the case's folder belongs to the other user."""
    import os

    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


# --- checks ----------------------------------------------------------------------------------------------------------


def both(*checks: Check) -> Check:
    def check(folder: Path, answer: Answer) -> str | None:
        return next((said for one in checks if (said := one(folder, answer))), None)

    return check


def says(pattern: str) -> Check:
    def check(folder: Path, answer: Answer) -> str | None:
        text = answer.out + answer.err
        return None if re.search(pattern, text) else f"does not say {pattern!r}: {text.strip()[-150:]!r}"

    return check


def has_files(pattern: str, count: int) -> Check:
    def check(folder: Path, answer: Answer) -> str | None:
        found = len([path for path in folder.glob(pattern) if path.is_file()])
        return None if found == count else f"{found} files {pattern}, not {count}"

    return check


def stays(name: str, content: bytes) -> Check:
    def check(folder: Path, answer: Answer) -> str | None:
        path = folder / name
        return None if path.is_file() and path.read_bytes() == content else f"{name} was changed"

    return check


def shard_samples(folder: Path) -> list[tuple[str, int, bytes]]:
    """Split, label and image bytes of all samples in a shard folder."""
    samples = []
    for split in ("train", "val"):
        for path in sorted((folder / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for name, data in content.items():
                key, _, ending = name.rpartition(".")
                if ending != "cls":
                    samples.append((split, int(content[f"{key}.cls"]), data))
    return samples


def shards_hold(count: int, name: str = "out", classes: Iterable[str] | None = None, colors: bool = True) -> Check:
    """So many samples, each with the label that its color tells (red 0, blue 1), and these class names."""

    def check(folder: Path, answer: Answer) -> str | None:
        if not (folder / name / "index.json").exists():
            return f"{name}/index.json is missing"
        samples = shard_samples(folder / name)
        if len(samples) != count:
            return f"{len(samples)} samples, not {count}"
        index = json.loads((folder / name / "index.json").read_text())
        if classes is not None and index["class_names"] != list(classes):
            return f"classes {index['class_names']}, not {list(classes)}"
        for _, label, data in samples if colors else ():
            red, _, blue = Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
            if label != int(blue > red):
                return f"an image of class {int(blue > red)} has label {label}"
        return None

    return check


def image_size(name: str, width: int | None = None, height: int | None = None) -> Check:
    def check(folder: Path, answer: Answer) -> str | None:
        if not (folder / name).exists():
            return f"{name} is missing"
        found = Image.open(folder / name).size
        wanted = (width or found[0], height or found[1])
        return None if found == wanted else f"{name}: {found}, not {wanted}"

    return check


# --- judging ---------------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """What each file and link is, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = f"special {stat.S_IFMT(path.stat().st_mode)}"
    return found


def not_whole(path: Path) -> str | None:
    """Why a result under its final name cannot be read, or None."""
    try:
        match path.suffix:
            case ".png":
                Image.open(path).load()
            case ".json":
                json.loads(path.read_text())
            case ".npz":
                with np.load(path) as arrays:
                    [arrays[key] for key in arrays.files]
            case ".npy":
                np.load(path)
            case ".safetensors":
                size = int.from_bytes(path.read_bytes()[:8], "little")
                ends = [
                    v["data_offsets"][1] for k, v in json.loads(path.read_bytes()[8 : 8 + size]).items() if k[0] != "_"
                ]
                if max(ends, default=0) + 8 + size != path.stat().st_size:
                    return f"{path.name} is cut off"
            case ".ckpt" | ".pth":
                if zipfile.ZipFile(path).testzip():
                    return f"{path.name} is damaged"
            case ".tar":
                with tarfile.open(path) as tar:
                    tar.getmembers()
    except Exception as error:
        return f"{path.name} is half-written: {error!r:.80}"
    return None


def harmed(before: dict[str, str], after: dict[str, str], folder: Path, may_change: Iterable[str]) -> str | None:
    """An earlier file that is gone or changed, or a new one that is not whole."""
    allowed = [*may_change, "*.lock", "*/tensorboard/*", "*/.partial-*"]  # what a killed process left may be swept
    for name, content in before.items():
        if after.get(name) != content and not any(fnmatch.fnmatch(name, pattern) for pattern in allowed):
            return f"{name} was {'changed' if name in after else 'removed'}"
    for name in sorted(set(after) - set(before)):
        hidden = any(part.startswith(".") or "partial" in part or "tmp" in part for part in Path(name).parts)
        said = None if hidden or after[name].startswith(("link", "special")) else not_whole(folder / name)
        if said:
            return said
    return None


def judge(fault: Fault, folder: Path, answer: Answer) -> str | None:
    """Why the outcome breaks the promise, or None."""
    said = broken_promise(answer, memory_mb=MEMORY_MB)
    if said == "status 1 without a line" and fault.command in ("shards check", "tokens check"):
        named = re.search(fault.names, answer.out)  # what is wrong is the result of a check
        return None if named and fault.want != RIGHT else f"does not name {fault.names!r}: {answer.out[-200:]}"
    if said and not (fault.settings.get("stderr") and said.endswith("without a line")):  # nowhere to say it
        return said
    if answer.status == 0:
        if fault.want == REFUSED:
            return "took it: status 0"
        return fault.check(folder, answer) if fault.check else None
    if fault.want == RIGHT:
        return f"refused what is valid: {answer.line[:200]}"
    if fault.names and answer.status != 130 and not re.search(fault.names, answer.err):
        return f"does not name {fault.names!r}: {answer.line[:200]}"
    return None


def prepare(fault: Fault, assets: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    for name in fault.assets:
        copy(str(assets / name), name)(folder)
    for step in fault.steps:
        step(folder)


def ask(fault: Fault, harness: Harness, folder: Path) -> Answer:
    settings = {"seconds": SECONDS, **fault.settings}
    if settings.get("cwd"):
        settings["cwd"] = str(folder / settings["cwd"])
    return harness.ask(*fault.argv, code=fault.code, **{"cwd": folder, **settings})


def run(fault: Fault, harness: Harness, assets: Path, folder: Path) -> tuple[str | None, Answer]:
    """Prepare, run and judge one fault in a folder that is empty before."""
    prepare(fault, assets, folder)
    before = snapshot(folder)
    answer = ask(fault, harness, folder)
    said = None
    if fault.again:
        if not fault.any_first and (told := broken_promise(answer, memory_mb=MEMORY_MB)):
            return told, answer
        said = harmed(before, snapshot(folder), folder, fault.may_change)
        first = answer
        answer = harness.ask(*fault.again, cwd=folder, seconds=SECONDS)
        if fault.any_first and answer.status == 2 and whole_already(fault, harness, assets, folder, first):
            return said or broken_promise(answer, memory_mb=MEMORY_MB), answer
    said = said or judge(fault, folder, answer) or harmed(before, snapshot(folder), folder, fault.may_change)
    if said is None and fault.same_as and answer.status == 0:
        said = differs_from_undisturbed(fault, harness, assets, folder)
    return said, answer


def whole_already(fault: Fault, harness: Harness, assets: Path, folder: Path, first: Answer) -> bool:
    """The first run has finished its work, so that the second may be refused."""
    if not fault.same_as:
        return first.status == 0
    return first.status == 0 or differs_from_undisturbed(fault, harness, assets, folder) is None


_undisturbed: dict[tuple[Any, ...], dict[str, str]] = {}


def differs_from_undisturbed(fault: Fault, harness: Harness, assets: Path, folder: Path) -> str | None:
    words = fault.again or fault.argv
    key = (fault.assets, words, fault.same_as, fault.phase if fault.steps else "")
    if key not in _undisturbed:
        calm = folder.with_name("calm")
        shutil.rmtree(calm, ignore_errors=True)
        prepare(fault, assets, calm)
        answer = harness.ask(*words, cwd=calm, seconds=SECONDS)
        assert answer.status == 0, f"{fault.id}: the undisturbed run failed: {answer.err[-300:]}"
        _undisturbed[key] = chosen(calm, fault.same_as)
        shutil.rmtree(calm)
    wanted, found = _undisturbed[key], chosen(folder, fault.same_as)
    different = [name for name in sorted(set(wanted) | set(found)) if wanted.get(name) != found.get(name)]
    return f"differs from an undisturbed run: {', '.join(different)[:150]}" if different else None


def chosen(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    return {name: value for name, value in snapshot(folder).items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
