"""Rows of shards, caches and where they come from."""

from __future__ import annotations

import hashlib
import json
import tarfile

import yaml
from faulty_server import serving

from .assets import tokenizer_recipe, var_recipe, write_yaml
from .rows_kit import (
    Case,
    Members,
    Said,
    first,
    link,
    mistake,
    picture,
    refused,
    row,
    samples,
    write_files,
    write_tar,
)

MODULE = """
def bright(one):  # of 255, whether pixels are bytes or reach from -1 to 1
    return int(one.max()) if one.dtype == torch.uint8 else round((float(one.max()) + 1) * 127.5)

def module(tar, **options):
    given = {"image_size": 8, "batch_size": 2, "num_workers": 0, "resize_ratio": 1.0, "num_classes": 2}
    return m.ShardsDataModule(None, **{"train_shards": tar, "val_shards": tar, **given, **options})
"""
COUNT = (
    MODULE
    + """
data = module("x.tar")
data.setup("fit")
tell([data.train_samples, sum(len(batch["label"]) for batch in data.val_dataloader())])
"""
)


def counted(case: Case, members: Members) -> Said:
    """Samples that a tar has and gives, where no index tells."""
    write_tar(case.folder / "x.tar", members)
    return case.script(COUNT, seconds=20)


@row("shards-equal-keys", "two samples of each key in a tar without an index: four black ones, then four white ones")
def _(case: Case) -> str | None:
    write_tar(case.folder / "x.tar", samples(4) + samples(4, gray=255))
    code = """
data = module("x.tar", epoch_samples=8, shuffle_buffer=1)
seen = []
for _ in range(2):
    seen.append([bright(one) for batch in data.val_dataloader() for one in batch["image"]])
tell(seen)
"""
    said = case.script(MODULE + code)
    if said.value == [[0] * 4 + [255] * 4] * 2:
        return None
    return said.reason if said.value is None else f"brightest pixels of the pictures, pass by pass: {said.value}"


@row("shards-made-on-a-mac", "a tar with a member ._NAME for every member")
def _(case: Case) -> str | None:
    said = counted(case, [one for member in samples(6) for one in (("._" + member[0], b"\0"), member)])
    return None if said.value == [6, 6] else f"six samples: {said.reason}"


def cut_at(case: Case, place: str) -> Said:
    tar = write_tar(case.folder / "x.tar", samples(6))
    with tarfile.open(tar) as opened:
        member = opened.getmembers()[6]
    at = {"header": member.offset + 100, "members": member.offset, "picture": member.offset_data + 9}[place]
    tar.write_bytes(tar.read_bytes()[:at])
    return case.script(COUNT, seconds=20)


@row("shards-cut-between", "a tar cut in a header or between members, without an index")
def _(case: Case) -> str | None:
    return first(*[refused(cut_at(case, place), "x.tar", what=f"cut, {place}") for place in ("header", "members")])


@row("shards-cut-inside", "a tar cut inside a picture, without an index")
def _(case: Case) -> str | None:
    said = cut_at(case, "picture")
    return refused(said, "x.tar", "cut off|cut inside|truncated|incomplete")


@row("shards-names-of-members", "a dot in keys, suffixes in upper case, all pictures before all labels")
def _(case: Case) -> str | None:
    six = samples(6)
    upper = counted(case, [(name.upper(), data) for name, data in six])
    return first(
        None if upper.value == [6, 6] else f"upper case: {upper.reason}",
        refused(counted(case, [(f"img.{name}", data) for name, data in six]), "first dot", what="dots"),
        refused(counted(case, six[::2] + six[1::2]), "side by side|together|sort", what="not side by side"),
    )


@row("shards-labels-of-no-use", "all six labels are hard links, 1.0, or begin with a mark of byte order")
def _(case: Case) -> str | None:
    reasons = []
    for name, label in (("link", None), ("1.0", b"1.0"), ("mark", b"\xef\xbb\xbf1")):
        odd = [(n, (label or link("x")) if n.endswith("cls") else data) for n, data in samples(6)]
        reasons.append(refused(counted(case, odd), "label|link", what=name))
    return first(*reasons)


def checked(case: Case, name: str, members: Members, what: str) -> str | None:
    """`shards check` of a folder whose index agrees with its shards: a problem that names the sample."""
    shards = []
    for split in ("train", "val"):
        tar = write_tar(case.folder / name / split / "000000.tar", members)
        size, digest = tar.stat().st_size, hashlib.sha256(tar.read_bytes()).hexdigest()
        shards.append({"name": f"{split}/000000.tar", "samples": 4, "bytes": size, "sha256": digest})
    content = {"format": "mvar-shards-1", "class_names": ["a", "b"]}
    splits = {one["name"].split("/")[0]: {"shards": [one]} for one in shards}
    (case.folder / name / "index.json").write_text(json.dumps(content | {"splits": splits}))
    answer = case.ask("shards", "check", name, seconds=20)
    if answer.status == 0:
        return f"{what}: sound"
    said = answer.out + answer.err
    if "Traceback" in answer.err:
        return f"{what}: traceback {answer.err.strip().splitlines()[-1][:120]}"
    return None if "0000" in said.replace("000000", "") else f"{what}: the sample is not named: {said[:200]}"


@row("check-samples-not-whole", "shards check: a sample without its picture; two members of one name in a sample")
def _(case: Case) -> str | None:
    four = samples(4)
    return first(
        checked(case, "a", four[1:], "no picture"), checked(case, "b", [four[0], *four], "two members of one name")
    )


@row("check-odd-members", "shards check: a link, a label of thousands of digits, a sparse header")
def _(case: Case) -> str | None:
    four, sparse = samples(4), tarfile.TarInfo()
    sparse.type = tarfile.GNUTYPE_SPARSE
    odd = {"link": (four[0][0], link("x.png")), "sparse": (four[0][0], sparse)}
    reasons = [checked(case, name, [member, *four[1:]], name) for name, member in odd.items()]
    return first(*reasons, checked(case, "c", [four[0], (four[1][0], b"7" * 5000), *four[2:]], "label of 5000 digits"))


@row("val-fewer-than-processes", "fewer validation images than processes")
def _(case: Case) -> str | None:
    write_tar(case.folder / "x.tar", samples(3))
    code = """
data = module("x.tar")
data.rank_and_world_size = lambda: (3, 4)
data.setup("fit")
tell(sum(len(batch["label"]) for batch in data.val_dataloader()))
"""
    return refused(case.script(MODULE + code), "3", "4", what="3 images, the fourth of 4 processes")


@row("tokenizer-run-batch", "11 images, --data.batch_size=4, a tokenizer recipe with batches of 32")
def _(case: Case) -> str | None:
    write_files(case.folder / "src", {f"{name}/{n}.png": picture(20 * n) for name in "ab" for n in range(6)})
    case.ask("shards", "make", "src", "shards", "--val-fraction", 0.1)
    large = tokenizer_recipe()
    large["data"]["init_args"]["batch_size"] = 32
    write_yaml(case.folder / "recipes/tok.yaml", large)
    recipe = {**var_recipe(), "tokenizer_recipe": "recipes/tok.yaml"}
    recipe["model"]["init_args"]["tokenizer"] = "runs/tok/model"
    write_yaml(case.folder / "recipes/var.yaml", recipe)
    answer = case.ask("train", "recipes/var.yaml", "--data.batch_size=4")
    return None if answer.status == 0 else mistake(answer, "tok.yaml")


@row("epoch-once-each", "one pass over a set that fits the shuffle buffer")
def _(case: Case) -> str | None:
    pairs = [((f"{n}.png", picture(5 * n)), (f"{n}.cls", b"0")) for n in range(40)]
    for shard in range(4):
        members = [one for pair in pairs[10 * shard : 10 * shard + 10] for one in pair]
        write_tar(case.folder / f"{shard}.tar", members)
    code = """
data = module("{0..3}.tar", shuffle_buffer=40)
data.setup("fit")
seen = [bright(one) for batch in data.train_dataloader() for one in batch["image"]]
tell([len(seen), len(set(seen))])
"""
    said = case.script(MODULE + code)
    if said.value == [40, 40]:
        return None
    return said.reason if said.value is None else f"{said.value[0]} pictures shown, {said.value[1]} different of 40"


@row("recipe-many-names", "a list of 11,000 shard names in a recipe")
def _(case: Case) -> str | None:
    case.take("tok")
    recipe = var_recipe()
    names = [f"x/{n:06d}.tar" for n in range(11_000)]
    recipe["data"]["init_args"] = {"train_shards": names, "val_shards": "x/v.tar", "image_size": 8}
    (case.folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    answer = case.ask("fit", "--config", "r.yaml", seconds=60)
    if "OMEGACONF" in answer.err:
        return f"a way out that is a library's: {answer.line or answer.err.strip().splitlines()[-1][:300]}"
    return mistake(answer)


@row("server-breaks-once", "a server whose first transfer of a shard breaks in the middle")
def _(case: Case) -> str | None:
    write_tar(case.folder / "x.tar", samples(40))
    with serving(case.folder) as server:
        server.breaks = {"/x.tar": 1}
        code = f"""
data = module({server.url + "/x.tar"!r})
tell(sum(len(batch["label"]) for batch in data.val_dataloader()))
"""
        said = case.script(MODULE + code, seconds=30)
    asked = [wanted for path, wanted in server.ranges if path == "/x.tar"]
    if said.value != 40:
        return f"40 samples: {said.reason}"
    return None if any(asked[1:]) else f"read whole again from 0: {len(asked)} requests, not one of them for a range"


@row("pipe-guard", "addresses that a library behind the door would take for a command, or for another door")
def _(case: Case) -> str | None:
    reasons = []
    for address in ("PIPE://true", "pipe:true", "memory://x.tar", "ftp://127.0.0.1:9/x.tar", "https://h/x::file:///x"):
        said = case.script(MODULE + f"tell(len(list(module({address!r}).val_dataloader())))", seconds=20)
        reasons.append(refused(said, "command|not opened", what=address))
    return first(*reasons)
