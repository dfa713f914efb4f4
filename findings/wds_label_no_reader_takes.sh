#!/usr/bin/env bash
# Expected: a writer of WebDataset shards refuses a label in KEY.cls that no reader takes for a number, or stores it as
#   one: array([3]) as MedMNIST's (N, 1) labels give it row by row, 3.0 as a table with gaps gives it, True.
# Happens: TarWriter stores what `str` says, "[3]", "3.0" or "True", without a word. Its own decoder, and the loader of
#   Hugging Face `datasets`, then stop at the first sample; with the usual `handler=ignore_and_continue` the decoder
#   yields an empty dataset instead. np.int64(3) and array(3) are stored as "3".
# Version: webdataset 1.0.2, datasets 5.2.0
# Source: webdataset's API pages, `webdataset.writer` (cls: str, ASCII) and `webdataset.autodecode` (cls: int)
# Why it matters: class-conditional models are trained from such labels. Shards of a million images are written before
#   the first is read, and a tolerant reader then trains on nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 datasets==5.2.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
venv/bin/python - <<'EOF'
from importlib.metadata import version

import numpy as np
import webdataset as wds
from datasets import load_dataset

print(*(f"{name} {version(name)}" for name in ("webdataset", "datasets", "numpy")))
medmnist = np.array([[3], [0]], np.uint8)  # train_labels: N x 1
LABELS = {
    "int64": (np.int64(3), b"3", True),
    "0-d": (np.array(3), b"3", True),
    "medmnist": (medmnist[0], b"[3]", False),
    "float": (3.0, b"3.0", False),
    "bool": (True, b"True", False),
}


def outcome(read):
    try:
        return read()
    except Exception as error:
        return type(error).__name__


failed = False
for name, (label, stored, readable) in LABELS.items():
    shard = f"{name}.tar"
    with wds.TarWriter(shard) as tar:
        tar.write({"__key__": "a", "txt": "an image", "cls": label})

    def stream(**options):
        return wds.WebDataset(shard, shardshuffle=False, empty_check=False, **options)

    raw = next(iter(stream()))["cls"]
    strict = outcome(lambda: [sample["cls"] for sample in stream().decode()])
    tolerant = outcome(lambda: [s["cls"] for s in stream().decode(handler=wds.ignore_and_continue)])
    other = outcome(lambda: load_dataset("webdataset", data_files={"train": shard}, split="train")["cls"][:])
    print(f"{label!r}: stored {raw}, decoded {strict}, tolerantly {tolerant}, datasets {other}")
    if readable:
        same = (strict, tolerant, other) == ([3], [3], [3])
    else:
        same = strict == "DecodingError" and tolerant == [] and isinstance(other, str)
    if raw != stored or not same:
        failed = True
        print("CHANGED")
raise SystemExit(failed)
EOF
