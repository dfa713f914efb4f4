"""The quantizer's forward against the straightforward form that holds all distances of a scale at once.

    python -m benchmarks quantizer

Both sides take the same latents, codebook and phi, run in turn in one process, and must give the same tokens. Medians
are compared; the times belong to this machine, the ratio is what carries over. Memory is the most that the work's
tensors hold at once, temporaries included, as torch's own allocator tells (on a CPU through the profiler).

B batch, L all tokens, V vocabulary, Z code dim, N rows of a scale, s side of a scale's map, hw latent map.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import write_figures
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid
from mvar_lightning.tokenizer import MultiScaleQuantizer

SIDES = ("straightforward", "ours")


@dataclass(frozen=True)
class Shapes:
    """What is quantized."""

    image_size: int = 256
    vocab_size: int = 4096
    code_dim: int = 32
    batch: int = 8

    @property
    def pyramid(self) -> ScalePyramid:
        return ScalePyramid(PUBLISHED_SIDES[self.image_size])


class StraightforwardQuantizer(nn.Module):
    """The formula as one would write it down: channel-first maps, ``F.interpolate``, one (N, V) matrix a scale.

    The matrix is filled in place (sums of squares, then one ``addmm_``): a version with temporaries would be slower
    and take more.
    """

    def __init__(self, quantizer: MultiScaleQuantizer) -> None:
        super().__init__()
        self.pyramid, self.beta = quantizer.pyramid, quantizer.beta
        self.codebook, self.phi, self.phi_index = quantizer.codebook, quantizer.phi, quantizer.phi_index

    def forward(self, f_BZhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L), f_hat with f's gradient (B, Z, h, w), and the loss."""
        target_BZhw = f_BZhw.detach()
        rest_BZhw, f_hat_BZhw = target_BZhw.clone(), torch.zeros_like(target_BZhw)
        loss, tokens = f_BZhw.new_zeros(()), []
        for scale, shape in enumerate(self.pyramid.shapes):
            idx_Bss = self._nearest(F.interpolate(rest_BZhw, size=shape, mode="area"))
            h_BZhw = self._contribution(idx_Bss, scale)
            f_hat_BZhw = f_hat_BZhw + h_BZhw
            rest_BZhw = rest_BZhw - h_BZhw.detach()
            loss = loss + F.mse_loss(f_hat_BZhw, target_BZhw) + self.beta * F.mse_loss(f_hat_BZhw.detach(), f_BZhw)
            tokens.append(idx_Bss.flatten(1))
        straight_through_BZhw = (f_hat_BZhw.detach() - target_BZhw) + f_BZhw
        return torch.cat(tokens, dim=1), straight_through_BZhw, loss / self.pyramid.num_scales

    @torch.no_grad()
    def _nearest(self, map_BZss: Tensor) -> Tensor:
        codes_VZ = self.codebook.weight
        rows_NZ = map_BZss.permute(0, 2, 3, 1).reshape(-1, codes_VZ.shape[1])
        distance_NV = rows_NZ.square().sum(dim=1, keepdim=True) + codes_VZ.square().sum(dim=1)
        distance_NV.addmm_(rows_NZ, codes_VZ.T, alpha=-2)
        return distance_NV.argmin(dim=1).view(map_BZss.shape[0], *map_BZss.shape[2:])

    def _contribution(self, idx_Bss: Tensor, scale: int) -> Tensor:
        map_BZss = self.codebook(idx_Bss).permute(0, 3, 1, 2)
        shape, last = self.pyramid.shapes[scale], self.pyramid.last_shape
        h_BZhw = F.interpolate(map_BZss, size=last, mode="bicubic") if shape != last else map_BZss.contiguous()
        phi = cast(Any, self.phi[self.phi_index[scale]])
        conv_BZhw = F.conv2d(h_BZhw, phi.weight, phi.bias, padding=1)
        return h_BZhw * (1 - phi.ratio) + conv_BZhw * phi.ratio


def build(shapes: Shapes, device: torch.device) -> tuple[dict[str, Callable[[Tensor], Any]], Tensor]:
    """Both sides on one set of weights, and latents of about the codes' spread."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(shapes.pyramid, shapes.vocab_size, shapes.code_dim, codebook_std=1.0).to(device)
    last = shapes.pyramid.last_shape
    f_BZhw = torch.randn(shapes.batch, shapes.code_dim, *last, device=device, requires_grad=True)
    return {"straightforward": StraightforwardQuantizer(quantizer), "ours": quantizer}, f_BZhw


def parts_of(output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, f_hat with gradient and loss of either side's output."""
    if isinstance(output, tuple) and hasattr(output, "idx_BL"):
        named = cast(Any, output)
        return named.idx_BL, named.f_hat_straight_through_BZhw, named.loss
    return cast(tuple[Tensor, Tensor, Tensor], output)


def forward(side: Callable[[Tensor], Any], f_BZhw: Tensor) -> None:
    side(f_BZhw)


def step(side: Callable[[Tensor], Any], f_BZhw: Tensor) -> None:
    _, f_hat_BZhw, loss = parts_of(side(f_BZhw))
    (f_hat_BZhw.square().mean() + loss).backward()


WORKS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], None]] = {"forward": forward, "forward + backward": step}


def check_equal(sides: dict[str, Callable[[Tensor], Any]], f_BZhw: Tensor) -> dict[str, float]:
    """Share of equal tokens, and largest difference of f_hat over the images whose tokens are all equal.

    Rounding differs, so of millions of distances an almost equal pair may be told apart the other way.
    """
    (plain_BL, plain_BZhw, _), (ours_BL, ours_BZhw, _) = (parts_of(sides[name](f_BZhw)) for name in SIDES)
    same_B = (plain_BL == ours_BL).all(dim=1)
    difference = (plain_BZhw - ours_BZhw)[same_B].detach().abs()
    return {
        "equal_tokens": float((plain_BL == ours_BL).float().mean()),
        "images_with_equal_tokens": float(same_B.float().mean()),
        "largest_difference_of_f_hat": float(difference.max()) if same_B.any() else float("nan"),
    }


def alternate(sides: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each side, run in turn so that a busy moment falls on both."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most bytes of tensors that a work holds at once, temporaries included, beside what was there before.

    On a CPU the running sum of what the profiler reports of the allocator. Kineto's raw events are not part of the
    profiler's public face, but its public tables leave out what an operator frees before it ends.
    """
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in cast(Any, profile.profiler).kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def measure(shapes: Shapes, device: torch.device, repeats: int) -> dict[str, Any]:
    """All figures: times of both sides, ratios, peak memory, and whether they agree."""
    sides, f_BZhw = build(shapes, device)
    rows = []
    for work, run in WORKS.items():
        seconds = alternate({name: partial(run, sides[name], f_BZhw) for name in SIDES}, repeats, device)
        peaks = {name: peak_bytes(partial(run, sides[name], f_BZhw), device) / 2**20 for name in SIDES}
        rows.append(
            {
                "work": work,
                "milliseconds": {name: round(1000 * seconds[name], 2) for name in SIDES},
                "times_as_fast": round(seconds["straightforward"] / seconds["ours"], 3),
                "peak_mebibytes": {name: round(peaks[name], 1) for name in SIDES},
            }
        )
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads, {device.type}",
        "torch": torch.__version__,
        "shapes": {**vars(shapes), "scales": list(shapes.pyramid.sides)},
        "repeats": repeats,
        "memory": "peak of torch's allocator" + ("" if device.type == "cuda" else ", through its profiler"),
        "agreement": check_equal(sides, f_BZhw),
        "rows": rows,
    }


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the figures."""
    shapes = Shapes(arguments.image_size, arguments.vocab_size, arguments.code_dim, arguments.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = measure(shapes, device, arguments.repeats)
    print(f"{figures['machine']}, torch {figures['torch']}, {shapes}")
    print(f"{'':20s} {'straightforward':>24s} {'ours':>24s}")
    for row in figures["rows"]:
        cells = [f"{row['milliseconds'][name]:8.1f} ms {row['peak_mebibytes'][name]:7.1f} MiB" for name in SIDES]
        print(f"{row['work']:20s} {cells[0]:>24s} {cells[1]:>24s}   {row['times_as_fast']:.2f}x as fast")
    print("  ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in figures["agreement"].items()))
    print(f"{write_figures(figures, 'quantizer', arguments.out)}: all figures")
    return 0
