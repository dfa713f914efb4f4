#!/usr/bin/env bash
# Expected: shards whose samples have their picture as .jpg or as .png are read whole by Hugging Face `datasets`, or
#   refused, wherever in the shard the first .png stands. webdataset itself reads them ("jpg;png").
# Happens: the columns are those of the first five samples of the first shard. From the sixth on, a picture of another
#   suffix is dropped without a word: the row is there, with its label, and its image is None. Suffixes in capitals
#   (.JPG, or ImageNet's .JPEG) count as others, while webdataset lowers them. Among the first five it is a ValueError.
# Version: datasets 5.2.0, webdataset 1.0.2
# Source: huggingface/datasets issues 7055 (the refusal) and 6900 (missing fields become None)
# Why it matters: shards for image models often mix suffixes, as they copy the files byte for byte. The number of rows
#   and the labels are right, so nobody looks for the pictures that are gone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    datasets==5.2.0 webdataset==1.0.2 pillow==13.0.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
venv/bin/python - <<'EOF'
import io
import tarfile
from importlib.metadata import version

import webdataset as wds
from datasets import load_dataset
from PIL import Image

print(*(f"{name} {version(name)}" for name in ("datasets", "webdataset", "pillow")))


def make(name, suffixes):
    with tarfile.open(name, "w") as tar:
        for i, suffix in enumerate(suffixes):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (i, 0, 0)).save(picture, "PNG" if suffix == "png" else "JPEG")
            for end, data in (("cls", b"%d" % i), (suffix, picture.getvalue())):
                member = tarfile.TarInfo(f"{i:04d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return name


def with_datasets(shard, **options):
    try:
        rows = load_dataset("webdataset", data_files={"train": shard}, split="train", **options)
        return [(row["cls"], row["jpg"] is not None) for row in rows]
    except ValueError as error:
        return f"ValueError: {str(error)[:60]}..."


def with_webdataset(shard):
    stream = wds.WebDataset(shard, shardshuffle=False, empty_check=False).decode("pil").to_tuple("cls", "jpg;png")
    return [(label, picture is not None) for label, picture in stream]


failed = False
whole, cut = [(i, True) for i in range(8)], [(i, i < 5) for i in range(8)]
for title, suffixes, expected in (
    ("5 jpg, 3 png", ["jpg"] * 5 + ["png"] * 3, cut),
    ("5 jpg, 3 JPG", ["jpg"] * 5 + ["JPG"] * 3, cut),
    ("4 jpg, 4 png", ["jpg"] * 4 + ["png"] * 4, "ValueError"),
):
    shard = make(title.replace(", ", "-").replace(" ", "") + ".tar", suffixes)
    other, own = with_datasets(shard), with_webdataset(shard)
    print(f"{title} (label, has a picture)", f"webdataset {own}", f"datasets   {other}", sep="\n  ")
    same = other.startswith(expected) if isinstance(other, str) else other == expected
    if own != whole or not same or (expected is cut and with_datasets(shard, streaming=True) != cut):
        failed = True
        print("CHANGED")
raise SystemExit(failed)
EOF
