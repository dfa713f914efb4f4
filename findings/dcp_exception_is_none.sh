#!/usr/bin/env bash
# Expected: a sharded checkpoint with a file missing raises an Exception when torch.distributed.checkpoint loads it, as
#   torch.load does, so that `except Exception` around it can say so in one line.
# Happens: it raises CheckpointException, which comes from BaseException: `except Exception` lets it through, like Ctrl-C.
#   What went wrong is inside, in `failures`: a FileNotFoundError of rank 0, even with one process (`no_dist`).
# Version: torch 2.13.0 (CPU)
# Source: torch/distributed/checkpoint/api.py; https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
# Why it matters: who reads folders that FSDP or another trainer wrote (a copy that broke off, a shard left behind) finds
#   programs ending in a traceback past their own handlers, and clean-up that runs for errors alone not run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
venv/bin/python -W ignore - <<'EOF'
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

print("torch", torch.__version__)
dcp.save({"weight": torch.ones(3)}, checkpoint_id="shards", no_dist=True)
(shard,) = Path("shards").glob("*.distcp")
shard.unlink()
how = "nothing was raised"
try:
    try:
        dcp.load({"weight": torch.zeros(3)}, checkpoint_id="shards", no_dist=True)
    except Exception as error:
        how = f"an Exception: {type(error).__name__}"
except BaseException as error:
    inside = [type(cause).__name__ for cause, _ in getattr(error, "failures", {}).values()]
    how = f"past `except Exception`: {type(error).__name__}, inside {inside}"
as_found = how == "past `except Exception`: CheckpointException, inside ['FileNotFoundError']"
print("as found:" if as_found else "CHANGED: ", how)
raise SystemExit(not as_found)
EOF
