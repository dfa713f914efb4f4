"""Commands that are killed, run twice at once, or go on with other settings."""
# ruff: noqa: E501 - one case a row

from __future__ import annotations

import random
import shlex
from pathlib import Path

import yaml

from .assets import var_recipe
from .fault import (
    EITHER,
    REFUSED,
    RIGHT,
    Fault,
    both,
    fault,
    has_files,
    move,
    put,
    remove,
    says,
    shards_hold,
)
from .generator_files import EDIT, EVALUATE, GO_ON, LONG, RECIPE, SAMPLE, TOKENS, TRAIN
from .generator_places import EXPORT, IMPORT_VAR, OFFICIAL, SHARDS, WRITERS

# the process gets a signal at the n-th time that it opens a file below its folder to write, or renames one
KILLED = """
import os, signal, sys
from pathlib import Path
left, here = {count}, os.getcwd()
def watch(event, arguments):
    global left
    writes = event in ("os.rename", "os.remove", "os.mkdir")
    if event == "open" and isinstance(arguments[2], int):
        writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if not writes or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    if not os.path.abspath(os.fsdecode(arguments[0])).startswith(here):
        return
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.{signal})
sys.addaudithook(watch)
from mvar_lightning.cli import main
sys.exit(main({argv!r}))
"""

SAME = {
    "sample": ("out/*",),
    "edit": ("out/*",),
    "shards": ("out/*",),
    "tokens": ("out/*",),
    "import": ("out/*",),
    "export": (),  # an archive of torch holds the name that it was written under
    "reconstruct": ("out.png",),
    "evaluate-images": ("out/images.png", "out/images.md"),
    "evaluate-tokenizer": ("out/tokenizer.md", "out/*.png"),
    "analyze": ("out/*",),
    "train": ("out/model/*",),
}
"""What must equal the results of an undisturbed run, byte for byte."""
MAY_GO = {"out*", ".out*", "*/.*"}


def kills(rng: random.Random) -> list[Fault]:
    made = []
    for slug, assets, argv, _, check in WRITERS:
        for signal in ("SIGKILL", "SIGTERM", "SIGINT"):
            for count in (1, 2, 3, 4, 6, 9, 14):
                code = KILLED.format(count=count, signal=signal, argv=shlex.split(argv))
                made.append(
                    fault(
                        "kills",
                        f"writing {count}",
                        f"{slug}-{signal}-{count}",
                        assets,
                        "",
                        command=slug,
                        code=code,
                        want=RIGHT,
                        check=check,
                        again=argv,
                        same_as=SAME[slug],
                        may_change=tuple(MAY_GO),
                        any_first=True,
                    )
                )
    return made


TWO = """
import json, os, sys, time
children = []
for number, argv in enumerate({both!r}):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "said.out"), (2, "said.err")):
            os.dup2(os.open(f"{{name}}{{number}}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
        time.sleep({pause} * number)
        from mvar_lightning.cli import main
        status = 99
        try:
            status = main(argv)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    children.append(child)
statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
said = [open(f"said.err{{number}}").read() for number in (0, 1)]
for number in (0, 1):
    os.remove(f"said.err{{number}}")
    os.remove(f"said.out{{number}}")
print("STATUSES", *statuses)
for status, text in zip(statuses, said):
    if "Traceback" in text or status not in (0, 2):
        sys.exit("mvar: error: BROKEN " + str(status) + " " + text.strip().splitlines()[-1][:200])
    if status == 2 and "error: " not in text:
        sys.exit("mvar: error: BROKEN status 2 without a line")
if statuses == [2, 2]:
    sys.exit("mvar: error: BROKEN both were refused " + text[-200:])
"""


def pairs(rng: random.Random) -> list[Fault]:
    """Two commands at one folder: each is right or refused, one at least is right, and the result is whole."""
    made = []
    for slug, assets, argv, _, check in WRITERS:
        for pause in (0.0, 0.1) if slug != "train" else (0.0, 0.5):
            code = TWO.format(both=[shlex.split(argv)] * 2, pause=pause)
            made.append(
                fault(
                    "pairs",
                    "at once",
                    f"{slug}-{pause}",
                    assets,
                    "",
                    command=slug,
                    code=code,
                    want=RIGHT,
                    check=both(says("STATUSES"), check),
                    may_change=("out*",),
                )
            )
        if slug in ("sample", "shards", "tokens", "train"):
            other = {
                "sample": argv + " --seed 1",
                "shards": argv + " --seed 1",
                "tokens": argv + " --seed 1",
                "train": argv + " --model.depth=1",
            }[slug]
            code = TWO.format(both=[shlex.split(argv), shlex.split(other)], pause=0.05)
            made.append(
                fault(
                    "pairs",
                    "at once",
                    f"{slug}-other",
                    assets,
                    "",
                    command=slug,
                    code=code,
                    want=RIGHT,
                    check=both(says("STATUSES"), check),
                    may_change=("out*",),
                )
            )
    return made


# --- going on with other settings --------------------------------------------------------------------------------------


def changed(**values: object):
    """The recipe with other values, by their dotted places below init_args or the trainer."""

    def step(folder: Path) -> None:
        recipe = var_recipe()
        for place, value in values.items():
            section, name = place.split("__")
            target = recipe[section] if section == "trainer" else recipe[section]["init_args"]
            target[name] = value
        (folder / "recipes/var.yaml").write_text(yaml.safe_dump(recipe))

    return step


def goes_on(rng: random.Random) -> list[Fault]:
    made = []

    def twice(
        slug: str, assets: str, first: str, second: str, want: str = REFUSED, names: str = "out", **more: object
    ) -> None:
        made.append(fault("resumed", "a second run", slug, assets, first, again=second, want=want, names=names, **more))  # type: ignore[arg-type]

    for flag in (
        "--seed 1",
        "--cfg 3",
        "--top-k 2",
        "--top-p 0.5",
        "--temperature 2",
        "--guidance constant",
        "--more-smooth",
        "--guided-scales 0-0",
    ):
        twice(f"sample{flag.replace(' ', '-')}", "var", SAMPLE.format("var"), SAMPLE.format("var") + " " + flag)
    twice("sample-other-model", "var mvar", SAMPLE.format("var"), SAMPLE.format("mvar"))
    twice(
        "sample-more",
        "var",
        SAMPLE.format("var"),
        SAMPLE.format("var").replace("count 1", "count 3"),
        RIGHT,
        check=has_files("out/0*.png", 6),
        may_change=("out/grid.png", "out/sampling.json"),
    )
    twice(
        "sample-less",
        "var",
        SAMPLE.format("var").replace("count 1", "count 2"),
        SAMPLE.format("var"),
        RIGHT,
        may_change=("out/grid.png", "out/sampling.json"),
    )
    twice(
        "sample-other-classes",
        "var",
        SAMPLE.format("var") + " --classes 0",
        SAMPLE.format("var") + " --classes 1",
        RIGHT,
        check=has_files("out/0*.png", 2),
        may_change=("out/grid.png", "out/sampling.json"),
    )
    twice(
        "sample-to-npz",
        "var",
        SAMPLE.format("var"),
        SAMPLE.format("var") + " --format npz",
        RIGHT,
        check=has_files("out/samples.npz", 1),
        may_change=("out/*.json", "out/grid.png"),
    )
    twice(
        "sample-batch",
        "var",
        SAMPLE.format("var"),
        SAMPLE.format("var") + " --batch-size 1",
        RIGHT,
        check=has_files("out/0*.png", 2),
        may_change=("out/*.json", "out/grid.png"),
    )
    for flag in ("--seed 1", "--resize 8", "--samples-per-shard 3", ""):
        twice(f"shards{flag.replace(' ', '-')}", "images", SHARDS, f"{SHARDS} {flag}")
    twice("shards-fresh", "images", SHARDS, SHARDS + " --fresh", EITHER, check=shards_hold(20))
    for flag in (
        "--seed 1",
        "--views 2",
        "--crop center",
        "--batch-size 8",
        "--resize-ratio 1.5",
        "--precision bf16-mixed",
    ):
        twice(f"tokens{flag.replace(' ', '-')}", "tok shards", TOKENS, f"{TOKENS} {flag}")
    twice("tokens-other-tokenizer", "tok tok2 shards", TOKENS, TOKENS.replace("tok ", "tok2 "))
    twice("tokens-again", "tok shards", TOKENS, TOKENS, RIGHT, check=has_files("out/*/*.npy", 16))
    twice("import-again", OFFICIAL, IMPORT_VAR, IMPORT_VAR)
    twice("evaluate-other-images", "npz features.ts", EVALUATE, EVALUATE.replace("npz/images", "npz/others"))
    twice(
        "evaluate-again",
        "npz features.ts",
        EVALUATE,
        EVALUATE,
        RIGHT,
        check=has_files("out/images.*", 3),
        may_change=("out/images.*",),
    )
    twice("edit-again", "var ant.png", EDIT, EDIT, EITHER, may_change=("out/*",))
    twice(
        "edit-other-seed",
        "var ant.png",
        EDIT,
        EDIT + " --seed 3",
        EITHER,
        may_change=("out/before_after.png", "out/coarse_to_fine.png"),
    )
    twice("export-again", "var", EXPORT, EXPORT, EITHER, may_change=("out*",))
    run = TRAIN + " --run-folder out"
    made += [continued(slug, want, check, **values) for slug, want, check, values in RUN_CHANGES]
    made += [
        fault(
            "resumed",
            "a second run",
            "train-again",
            RECIPE + " runs/var",
            TRAIN,
            want=RIGHT,
            check=says("val/loss"),
            may_change=("runs/var/*",),
        ),
        fault(
            "resumed",
            "a second run",
            "train-moved",
            RECIPE + " runs/var",
            TRAIN + " --run-folder elsewhere",
            move("runs/var", "elsewhere"),
            want=RIGHT,
            check=says("val/loss"),
            may_change=("elsewhere/*",),
        ),
        fault(
            "resumed",
            "a second run",
            "train-other-tokenizer",
            LONG + " tok2",
            GO_ON,
            remove("tok"),
            move("tok2", "tok"),
            names="tok",
            want=REFUSED,
        ),
        fault(
            "resumed",
            "a second run",
            "train-tokenizer-run-as-run",
            RECIPE + " runs/tok",
            TRAIN + " --run-folder runs/tok --trainer.max_epochs=2",
            names="runs/tok",
            want=REFUSED,
        ),
        fault(
            "resumed",
            "a second run",
            "train-over-own-files",
            RECIPE,
            run,
            put("out/thesis.txt", "three years of work"),
            want=EITHER,
            check=has_files("out/thesis.txt", 1),
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "train-fresh-over-own-files",
            RECIPE,
            run + " --fresh",
            put("out/thesis.txt", "three years of work"),
            want=EITHER,
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "train-fresh-at-data",
            RECIPE,
            TRAIN + " --run-folder shards --fresh",
            want=EITHER,
            names="shards",
        ),
        fault(
            "resumed",
            "a second run",
            "train-fresh-here",
            RECIPE,
            TRAIN + " --run-folder . --fresh",
            want=EITHER,
            names="run folder",
        ),
        fault(
            "resumed",
            "a second run",
            "sample-over-own-files",
            "var",
            SAMPLE.format("var"),
            put("out/grid.png", "mine"),
            put("out/note.txt", "mine"),
            want=EITHER,
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "edit-over-own-files",
            "var ant.png",
            EDIT,
            put("out/before_after.png", "mine"),
            want=EITHER,
            may_change=("out/before_after.png",),  # its name is documented, and it is drawn anew each time
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "tokens-over-own-files",
            "tok shards",
            TOKENS,
            put("out/note.txt", "mine"),
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "import-over-own-files",
            OFFICIAL,
            IMPORT_VAR,
            put("out/note.txt", "mine"),
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "shards-over-own-files",
            "images",
            SHARDS,
            put("out/note.txt", "mine"),
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "export-over-own-file",
            "var",
            EXPORT,
            put("out.pth", "mine"),
            want=EITHER,
            names="out",
        ),
        fault(
            "resumed",
            "a second run",
            "shards-fresh-over-own-files",
            "images",
            SHARDS + " --fresh",
            put("out/note.txt", "mine"),
            names="out",
        ),
    ]
    return made


def epochs_are(count: int):
    """The checkpoint has seen so many steps (four an epoch)."""

    def check(folder: Path, answer) -> str | None:
        import torch

        found = torch.load(folder / "runs/var/checkpoints/last.ckpt", weights_only=False, map_location="cpu")[
            "global_step"
        ]
        return None if found == 4 * count else f"{found} steps, not {4 * count}"

    return check


RUN_CHANGES = (
    ("epochs", EITHER, epochs_are(2), {"trainer__max_epochs": 2}),
    ("learning-rate", EITHER, None, {"trainer__max_epochs": 2, "model__base_lr": 1e-5}),
    ("depth", REFUSED, None, {"trainer__max_epochs": 2, "model__depth": 3}),
    ("width", REFUSED, None, {"trainer__max_epochs": 2, "model__width": 32}),
    ("heads", REFUSED, None, {"trainer__max_epochs": 2, "model__heads": 4}),
    ("attention", REFUSED, None, {"trainer__max_epochs": 2, "model__attention": {"class_path": "mvar_lightning.AdjacentAttention"}}),
    ("batch", EITHER, None, {"trainer__max_epochs": 2, "data__batch_size": 2}),
    ("fewer-epochs", EITHER, None, {"trainer__max_epochs": 0}),
    ("precision", EITHER, None, {"trainer__max_epochs": 2, "trainer__precision": "bf16-mixed"}),
    ("ema-added", EITHER, None, {"trainer__max_epochs": 2, "trainer__callbacks": [{"class_path": "mvar_lightning.callbacks.EMA"}]}),
    ("accumulate", EITHER, None, {"trainer__max_epochs": 2, "trainer__accumulate_grad_batches": 2}),
    ("blocks", REFUSED, None, {"trainer__max_epochs": 2, "model__blocks": {"class_path": "mvar_lightning.LlamaBlocks"}}),
)  # fmt: skip


def continued(slug: str, want: str, check, **values: object) -> Fault:
    names = "recipe|run|checkpoint|model|epoch|" + "|".join(place.split("__")[1] for place in values)
    # what the run has made before must outlive a refusal
    may_change = ("runs/var/*",) if want != REFUSED else ()
    return fault(
        "resumed",
        "a second run",
        f"train-{slug}",
        RECIPE + " runs/var",
        TRAIN,
        changed(**values),
        want=want,
        check=check,
        names=names,
        may_change=may_change,
    )
