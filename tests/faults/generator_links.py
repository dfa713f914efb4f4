"""Symbolic links, special files, and destinations that are something else."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from .fault import (
    EITHER,
    REFUSED,
    RIGHT,
    Fault,
    copy,
    fault,
    link,
    make_folder,
    move,
    put,
    remove,
    shards_hold,
)
from .generator_files import EDIT, EVALUATE, RECIPE, SAMPLE, TRAIN
from .generator_places import EXPORT, IMPORT_VAR, OFFICIAL, RECONSTRUCT, SHARDS, WRITERS


def fifo(name: str):
    return lambda folder: os.mkfifo(folder / name)


def socket_at(name: str):
    def step(folder: Path) -> None:
        here = Path.cwd()
        os.chdir((folder / name).parent)
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(Path(name).name)
        finally:
            os.chdir(here)

    return step


def hardlink(name: str, old: str):
    return lambda folder: os.link(folder / old, folder / name)


def links(rng: random.Random) -> list[Fault]:
    """Symbolic links of every kind, and files that are no files."""
    made = []
    inputs = (
        ("tok/tokenizer.safetensors", "tok", "info tok"),
        ("tok/config.json", "tok", "info tok"),
        ("var/model.safetensors", "var", SAMPLE.format("var")),
        ("shards/index.json", "shards", "shards check shards"),
        ("shards/train/000001.tar", "shards", "shards check shards"),
        ("cache/val/000000.npy", "cache", "tokens check cache"),
        ("npz/images.npz", "npz features.ts", EVALUATE),
        ("features.ts", "npz features.ts", EVALUATE),
        ("ant.png", "var ant.png", EDIT),
        ("recipes/var.yaml", RECIPE, TRAIN),
        ("official/var.pth", OFFICIAL, IMPORT_VAR),
        ("list.csv", "list.csv images", "shards make list.csv out"),
    )
    for target, assets, argv in inputs:
        slug, last = target.replace("/", "."), target.split("/")[-1]
        names = last.replace(".", r"\.")
        unread = argv.startswith("info") and target.endswith("safetensors")  # it tells what the config says
        kind = dict(names=names, want=EITHER if unread else REFUSED)
        made += [
            fault(
                "links",
                "reading",
                f"{slug}-link",
                assets,
                argv,
                move(target, f"store/{last}"),
                link(target, f"{'../' * target.count('/')}store/{last}"),
                want=RIGHT,
            ),
            fault("links", "reading", f"{slug}-broken", assets, argv, remove(target), link(target, "gone"), **kind),
            fault("links", "reading", f"{slug}-loop", assets, argv, remove(target), link(target, last), **kind),
            fault("links", "reading", f"{slug}-folder", assets, argv, remove(target), make_folder(target), **kind),
            fault("links", "reading", f"{slug}-socket", assets, argv, remove(target), socket_at(target), **kind),
            fault(
                "links", "reading", f"{slug}-device", assets, argv, remove(target), link(target, "/dev/null"), **kind
            ),
        ]
    whole = shards_hold(20, classes=("ant", "bee"))
    walk = dict(want=RIGHT, check=whole)
    made += [
        fault(
            "links",
            "walking",
            "images-loop",
            "images",
            SHARDS,
            link("images/ant/again", ".."),
            want=EITHER,
            check=whole,
            names="again|ant",
        ),
        fault(
            "links",
            "walking",
            "images-broken",
            "images",
            SHARDS,
            link("images/ant/10.png", "gone.png"),
            want=EITHER,
            check=whole,
            names=r"10\.png",
        ),
        fault(
            "links",
            "walking",
            "images-self",
            "images",
            SHARDS,
            link("images/ant/10.png", "10.png"),
            want=EITHER,
            check=whole,
            names=r"10\.png",
        ),
        fault(
            "links",
            "walking",
            "images-fifo",
            "images",
            SHARDS,
            fifo("images/ant/10.png"),
            want=EITHER,
            check=whole,
            names=r"10\.png",
        ),
        fault(
            "links",
            "walking",
            "images-socket",
            "images",
            SHARDS,
            socket_at("images/ant/10.png"),
            want=EITHER,
            check=whole,
            names=r"10\.png",
        ),
        fault(
            "links",
            "walking",
            "images-folder-named-png",
            "images",
            SHARDS,
            make_folder("images/ant/10.png"),
            want=EITHER,
            check=whole,
            names=r"10\.png",
        ),
        fault(
            "links",
            "walking",
            "images-class-link",
            "images",
            SHARDS,
            move("images/bee", "elsewhere"),
            link("images/bee", "../elsewhere"),
            **walk,
        ),
        fault("links", "walking", "images-each-a-link", "images", SHARDS, link_each, **walk),
        fault(
            "links",
            "walking",
            "images-source-link",
            "images",
            SHARDS,
            move("images", "real"),
            link("images", "real"),
            **walk,
        ),
        fault(
            "links",
            "walking",
            "images-hardlink",
            "images",
            SHARDS,
            hardlink("images/ant/10.png", "images/ant/00.png"),
            want=RIGHT,
            check=shards_hold(21),
        ),
        fault(
            "links",
            "walking",
            "images-file-beside-classes",
            "images",
            SHARDS,
            put("images/README.md", "two classes"),
            put("images/.DS_Store", "x"),
            put("images/ant/Thumbs.db", "x"),
            **walk,
        ),
        fault(
            "links",
            "walking",
            "images-hidden-class",
            "images",
            SHARDS,
            make_folder("images/.cache"),
            put("images/.cache/x.txt", "x"),
            **walk,
        ),
        fault(
            "links",
            "walking",
            "images-checkpoints-class",
            "images",
            SHARDS,
            copy("images/ant/00.png", "images/.ipynb_checkpoints/00-checkpoint.png"),
            **walk,
        ),
        fault(
            "links",
            "walking",
            "images-empty-class",
            "images",
            SHARDS,
            make_folder("images/cow"),
            want=EITHER,
            names="cow",
        ),
        fault(
            "links",
            "walking",
            "images-nested-class",
            "images",
            SHARDS,
            move("images/ant/00.png", "images/ant/more/00.png"),
            want=EITHER,
            check=whole,
            names="more|ant",
        ),
        fault(
            "links",
            "walking",
            "samples-folder-with-link",
            "npz features.ts images",
            EVALUATE.replace("npz/images.npz", "images/ant").replace("npz/others.npz", "images/bee"),
            link("images/ant/10.png", "gone.png"),
            want=EITHER,
            names=r"10\.png",
        ),
        fault(
            "links",
            "writing",
            "out-link-to-folder",
            "images",
            SHARDS,
            make_folder("disk"),
            link("out", "disk"),
            want=EITHER,
            check=shards_hold(20, name="out"),
            names="out",
        ),
        fault(
            "links",
            "writing",
            "out-broken-link",
            "images",
            SHARDS,
            link("out", "disk"),
            want=EITHER,
            check=shards_hold(20, name="out"),
            names="out",
        ),
        fault("links", "writing", "out-loop", "images", SHARDS, link("out", "out"), names="out"),
        fault(
            "links",
            "writing",
            "out-inside-source",
            "images",
            SHARDS.replace("out", "images/out"),
            want=EITHER,
            check=shards_hold(20, name="images/out"),
            names="images/out|images",
        ),
        fault("links", "writing", "out-is-source", "images", SHARDS.replace(" out", " images"), names="images"),
        fault(
            "links",
            "writing",
            "export-over-link",
            "var",
            EXPORT,
            put("keep/old.pth", "old"),
            link("out.pth", "keep/old.pth"),
            want=EITHER,
            may_change=("out.pth", "keep/old.pth"),
            names="out",
        ),
        fault(
            "links",
            "writing",
            "reconstruct-over-input",
            "tok ant.png",
            RECONSTRUCT.replace("out.png", "ant.png"),
            names="ant",
        ),
        fault(
            "links",
            "writing",
            "reconstruct-over-input-link",
            "tok ant.png",
            RECONSTRUCT.replace("out.png", "other.png"),
            link("other.png", "ant.png"),
            want=EITHER,
            names="other|ant",
            may_change=("other.png",),
        ),
        fault(
            "links",
            "writing",
            "export-over-source",
            "var",
            "export var --model var/model.safetensors --tokenizer out.pth",
            names=r"var",
        ),
        fault(
            "links",
            "writing",
            "export-one-file-twice",
            "var",
            "export var --model out.pth --tokenizer out.pth",
            names="out",
        ),
        fault(
            "links",
            "writing",
            "export-one-file-by-link",
            "var",
            "export var --model here/out.pth --tokenizer there/out.pth",
            make_folder("here"),
            link("there", "here"),
            names="out",
        ),
        fault(
            "links",
            "writing",
            "moments-over-reference",
            "npz features.ts",
            EVALUATE + " --save-moments npz/others.npz",
            names="others",
        ),
        fault(
            "links",
            "writing",
            "moments-over-images",
            "npz features.ts",
            EVALUATE + " --save-moments npz/images.npz",
            names="images",
        ),
    ]
    for slug, assets, argv, out, _ in WRITERS:
        if slug in ("sample", "edit", "tokens", "import", "analyze", "train"):
            made.append(
                fault(
                    "links",
                    "writing",
                    f"{slug}-out-broken-link",
                    assets,
                    argv,
                    link("out", "nowhere/deeper"),
                    want=EITHER,
                    names="out",
                )
            )
            made.append(fault("links", "writing", f"{slug}-out-loop", assets, argv, link("out", "out"), names="out"))
            made.append(fault("links", "writing", f"{slug}-out-file", assets, argv, put("out", "mine"), names="out"))
            made.append(
                fault(
                    "links",
                    "writing",
                    f"{slug}-out-below-file",
                    assets,
                    argv.replace(" out", " mine/out"),
                    put("mine", "x"),
                    names="mine",
                )
            )
            made.append(fault("links", "writing", f"{slug}-out-fifo", assets, argv, fifo("out"), names="out"))
        else:
            made.append(
                fault(
                    "links",
                    "writing",
                    f"{slug}-out-in-file",
                    assets,
                    argv.replace("out", "mine/out"),
                    put("mine", "x"),
                    names="mine",
                )
            )
            made.append(
                fault(
                    "links",
                    "writing",
                    f"{slug}-out-folder-in-the-way",
                    assets,
                    argv,
                    put(f"{out}/keep/me.txt", "x"),
                    want=EITHER,
                    names="out",
                )
            )
    return made


def link_each(folder: Path) -> None:
    """A folder of links, as a content-addressed store checks files out."""
    (folder / "store").mkdir()
    for number, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        path.rename(folder / "store" / f"{number}")
        path.symlink_to(folder / "store" / f"{number}")
