#!/usr/bin/env bash
# Expected: WebDataset(shards, shardshuffle=N) draws another order of the shards in each pass, and its `seed` makes the
#   whole stream repeatable, samples behind `.shuffle(N)` included.
# Happens: without any seed, a dataset draws one order when it is made and repeats it in every pass. `seed` fixes that
#   order, but `.shuffle(N)` behind it takes its own seed from the clock, so two equal pipelines differ. Only
#   `detshuffle=True` gives new orders that can be repeated.
# Version: webdataset 1.0.2
# Source: webdataset pull request 502 (orders that repeat); issue 372 (how far the seed reaches)
# Why it matters: shards that lie in some order (by class, by source) reach a next-scale model in the same order in each
#   epoch, which a shuffle buffer only blurs; and a run "with a seed" cannot be repeated.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
from importlib.metadata import version

import webdataset as wds

print("webdataset", version("webdataset"))
SHARDS, EACH = 8, 5
shards = [f"{s:02d}.tar" for s in range(SHARDS)]
for s, name in enumerate(shards):
    with wds.TarWriter(name) as tar:
        for i in range(EACH):
            tar.write({"__key__": f"{s:02d}-{i}", "cls": s})


def make(**options):
    return wds.WebDataset(shards, shardshuffle=SHARDS, empty_check=False, **options)


def keys(dataset):
    return [sample["__key__"] for sample in dataset]


def passes(dataset, count=4):
    orders = [[key[:2] for key in keys(dataset)[::EACH]] for _ in range(count)]
    return orders, len({tuple(order) for order in orders})


failed = False


def check(what, holds):
    global failed
    failed |= not holds
    print("as found:" if holds else "CHANGED: ", what)


for title, options, different in (
    ("no seed", {}, 1),
    ("seed=1", {"seed": 1}, 1),
    ("seed=1, detshuffle=True", {"seed": 1, "detshuffle": True}, 4),
):
    orders, count = passes(make(**options))
    print(f"{title}:", *(" ".join(order) for order in orders), sep="\n  ")
    check(f"{title}: {count} different order(s) in 4 passes", count == different)
check("seed=1, made twice: same order of shards", keys(make(seed=1)) == keys(make(seed=1)))
first, second = (keys(make(seed=1).shuffle(20)) for _ in range(2))
print("seed=1 and .shuffle(20), made twice:", first[:6], second[:6], sep="\n  ")
check("seed=1 and .shuffle(20), made twice: other samples first", first != second)
raise SystemExit(failed)
EOF
