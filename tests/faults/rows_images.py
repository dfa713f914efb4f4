"""Rows of images and folders of images."""

from __future__ import annotations

from PIL import Image

from .rows_kit import Case, classes_of, count, first, mistake, picture, pictures_of, result, row, write_files


@row("images-mpo", "JPEGs with further pictures behind the first (MPO) under .jpg, with and without --skip-damaged")
def _(case: Case) -> str | None:
    mpo = picture(50, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "white")])
    write_files(case.folder / "src", {f"cat/{n}.jpg": mpo for n in range(4)})
    reasons = []
    for name, options in (("out", ()), ("skipped", ("--skip-damaged",))):
        answer = case.ask("shards", "make", "src", name, *options)
        wrong = result(answer, name)
        if wrong is None and count(case.folder / name) != 4:
            wrong = f"{name}: {count(case.folder / name)} of 4 images"
        reasons.append(wrong)
    return first(*reasons)


@row("images-linked-folder", "a link to a folder of five images beside five images; a loop of links")
def _(case: Case) -> str | None:
    dog = write_files(case.folder, {f"{where}/{n}.png": picture(n) for where in ("src/dog", "more") for n in range(5)})
    (dog / "src/dog/more").symlink_to(dog / "more")
    (dog / "src/dog/up").symlink_to(dog / "src")
    answer = case.ask("shards", "make", "src", "out", seconds=20)
    found = count(case.folder / "out") if answer.status == 0 else 0
    return result(answer) or (None if found == 10 else f"{found} images of 10, status 0")


TWELVE = """
_, tok = m.load("tok")
torch.manual_seed(0)
model = m.NextScaleTransformer([1, 2], vocab_size=16, code_dim=4, num_classes=12, depth=1, width=16, heads=2)
m.save("twelve", model, tok)
tell(0)
"""


@row("images-numeric-classes", "class folders 0 to 11: their order, and what --classes 10 and 10-11 mean")
def _(case: Case) -> str | None:
    write_files(case.folder / "src", {f"{name}/{n}.png": picture(n) for name in range(12) for n in range(2)})
    wrong = result(case.ask("shards", "make", "src", "out"))
    if wrong:
        return wrong
    names = classes_of(case.folder / "out")
    order = None if names == [str(n) for n in range(12)] else f"numbered as text: {names}"
    case.take("tok")
    case.script(TWELVE)
    made = {}
    for classes in ("10", "10-10"):
        given = ("--data", "out", "--classes", classes, "--count", 1, "--device", "cpu", "--out", classes)
        answer = case.ask("sample", "--checkpoint", "twelve", *given)
        if answer.status:
            return first(order, result(answer, f"--classes {classes}"))
        made[classes] = sorted(path.name[:4] for path in (case.folder / classes).glob("0*.png"))
    same = None if made["10"] == made["10-10"] else f"--classes 10 and 10-10 are different classes: {made}"
    return first(order, same)


@row("images-formats-left-out", "4 PNG and 6 BMP in a class, 5 TIFF in another")
def _(case: Case) -> str | None:
    files = {f"a/{n}.png": picture(n) for n in range(4)} | {f"a/b{n}.bmp": picture(n, "BMP") for n in range(6)}
    write_files(case.folder / "src", files | {f"b/{n}.tiff": picture(n, "TIFF") for n in range(5)})
    answer = case.ask("shards", "make", "src", "out")
    if answer.status == 0 and count(case.folder / "out") == 15:
        return None
    said = (answer.out + answer.err).lower()
    told = "5 .tiff" in said and ("6 .bmp" in said or mistake(answer) is None)  # of a class without any, first
    return None if told else result(answer) or f"{count(case.folder / 'out')} of 15 images, not a word of the others"


@row("images-left-by-tools", ".ipynb_checkpoints and @eaDir in a class, __MACOSX beside the classes")
def _(case: Case) -> str | None:
    good = {f"{name}/{n}.png": picture(n) for name in "ab" for n in range(2)}
    left = ("__MACOSX/1.png", "a/.ipynb_checkpoints/1.png", "a/@eaDir/1.png")
    write_files(case.folder / "src", good | {name: picture(99) for name in left})
    answer = case.ask("shards", "make", "src", "out")
    if answer.status:
        return result(answer)
    names, found = classes_of(case.folder / "out"), count(case.folder / "out")
    said = answer.out + answer.err
    told = all(name in said for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"))
    return first(
        None if names == ["a", "b"] else f"classes {names}",
        None if found == 4 else f"{found} images of 4",
        None if told else "not told",
    )


@row("images-listed-twice", "a list that names an image twice")
def _(case: Case) -> str | None:
    write_files(case.folder, {f"{n}.png": picture(10 * n) for n in range(6)})
    names = [f"{n}.png,a" for n in range(6)] * 2
    (case.folder / "list.csv").write_text("\n".join(names) + "\n")
    answer = case.ask("shards", "make", "list.csv", "out", "--val-fraction", 0.5)
    if answer.status:
        return result(answer) if "Traceback" in answer.err else None  # refused in a line is told, too
    found = pictures_of(case.folder / "out")
    both = set(found.get("train", [])) & set(found.get("val", []))
    return first(
        f"{len(both)} images are in train and in val" if both else None,
        None if count(case.folder / "out") == 6 else f"{count(case.folder / 'out')} samples of 6 images",
    )
