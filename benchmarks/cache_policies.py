"""What a cache policy saves and costs: sampling tokens with all keys and values kept, and with ScaleKV, in turn.

    python -m benchmarks.cache_policies [--image-size 512] [--depth 16] [--batch 4] [--budget 0.1] [--pairs 3]

VAR of random weights, guided, on one thread of a CPU. Wall and processor seconds, the median ratio over the pairs, the
bytes of the buffers, and the process' peak memory in each call (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvar_lightning.attention import CachePolicy, KeepAll, ScaleKV
from mvar_lightning.pyramid import PUBLISHED_SIDES
from mvar_lightning.sampling import ImageNoise, LinearGuidance, SamplingSettings, sample_pyramid
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer

VOCAB, CODE_DIM, CLASSES, CFG = 4096, 32, 1000, 1.5


class Figures(NamedTuple):
    """Of one call."""

    wall: float
    processor: float
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_policies", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--image-size", type=int, default=512, choices=sorted(PUBLISHED_SIDES), help="pixels (512)")
    parser.add_argument("--depth", type=int, default=16, metavar="N", help="of the model (16)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images (4); guided, so twice as many rows")
    parser.add_argument("--budget", type=float, default=0.1, metavar="SHARE", help="of ScaleKV (0.1)")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="of calls (3)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sides = PUBLISHED_SIDES[arguments.image_size]
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "code_dim": CODE_DIM}
    model = NextScaleTransformer(sides, **sizes, num_classes=CLASSES, depth=arguments.depth).eval()
    small: dict[str, Any] = {
        "channels": 32,
        "channel_multipliers": (1, 1),
        "num_res_blocks": 1,
    }  # its decoder is not run
    tokenizer = MultiScaleTokenizer(sides, **sizes, **small).eval()
    policies = {"all kept": KeepAll(), f"ScaleKV({arguments.budget})": ScaleKV(arguments.budget)}
    found: dict[str, list[Figures]] = {name: [] for name in policies}
    for number in range(arguments.pairs):
        for name in list(policies)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(measured(model, tokenizer, policies[name], arguments.batch))
            print(f"{name}: {found[name][-1]}", flush=True)
    print(report(model, policies, found, arguments.batch))
    return 0


def measured(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, policy: CachePolicy, batch: int) -> Figures:
    """One call."""
    settings = SamplingSettings(LinearGuidance(CFG), cache_policy=policy)
    label_B = torch.arange(batch)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wall, processor = time.perf_counter(), time.process_time()
    sample_pyramid(model, tokenizer, label_B, settings, ImageNoise(range(batch), model.pyramid, label_B.device))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Figures(wall, processor, peak_bytes())


def peak_bytes() -> int:
    """Largest resident memory since the peak began; 0 where the system does not tell."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
    return 0


def report(
    model: NextScaleTransformer, policies: dict[str, CachePolicy], found: dict[str, list[Figures]], batch: int
) -> str:
    """A row for each policy, and the ratios of the second to the first."""
    shape: dict[str, Any] = {"batch": 2 * batch, "heads": model.heads, "head_dim": model.width // model.heads}
    shape |= {"device": torch.device("meta"), "dtype": torch.float32}
    plan = model.backend.plan
    held = {name: policy.make(plan, layers=model.depth, **shape).nbytes for name, policy in policies.items()}
    rows = ["| kept | buffers, GiB | peak of the process, GiB | wall s | processor s |", "|---|---|---|---|---|"]
    for name, calls in found.items():
        peak, walls, processors = (
            max(c.peak_bytes for c in calls),
            [c.wall for c in calls],
            [c.processor for c in calls],
        )
        figures = f"{held[name] / 2**30:.3f} | {peak / 2**30:.2f} | {statistics.median(walls):.1f}"
        rows.append(f"| {name} | {figures} | {statistics.median(processors):.1f} |")
    first, second = found.values()
    ratios = [
        statistics.median(getattr(b, what) / getattr(a, what) for a, b in zip(first, second, strict=True))
        for what in ("wall", "processor")
    ]
    whole, less = held.values()
    rows.append(
        f"\nbuffers {less / whole:.3f}x; median of {len(first)} pairs: wall {ratios[0]:.3f}x, "
        f"processor {ratios[1]:.3f}x"
    )
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
