"""What weights of few bits change: a trained model's logits and greedy tokens beside float32's, on images at hand.

    python -m benchmarks fidelity --checkpoint digits --data data/digits [--images 64]

The same tokens are given to both (teacher forcing), so each row of logits is compared by itself; beside that, images
are drawn greedily, one of a class, where one other token changes all that follow.

B images, L tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.results import write_figures
from mvar_lightning import generate
from mvar_lightning.checkpoints.source import Source
from mvar_lightning.data.reading.loader import loading
from mvar_lightning.errors import check_counts
from mvar_lightning.evaluation.image_sources import open_data
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.quantized import KINDS, quantize


class Answers(NamedTuple):
    """Of one model: logits where the images' tokens are given, and tokens that it draws greedily, guided and not."""

    logits_BLV: Tensor
    guided_BL: Tensor
    plain_BL: Tensor


@torch.no_grad()
def answers(model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, idx_BL: Tensor, label_B: Tensor) -> Answers:
    classes = range(min(model.num_classes, len(label_B)))  # a class has one greedy image
    drawn = [generate(model, tokenizer, classes, cfg=cfg, top_k=1, seeds=classes) for cfg in (1.5, 0.0)]
    logits_BLV = model.eval()(tokenizer.teacher_input(idx_BL), label_B)
    return Answers(logits_BLV, *(images.tokens for images in drawn))


def compare(ours: Answers, exact: Answers) -> dict[str, float]:
    """Shares of equal tokens, and errors of the logits of a token, less their mean, over those logits' own size."""
    centered = [logits - logits.mean(dim=-1, keepdim=True) for logits in (ours.logits_BLV, exact.logits_BLV)]
    error = (centered[0] - centered[1]).square().mean().sqrt() / centered[1].square().mean().sqrt()
    logs = [logits.log_softmax(dim=-1) for logits in (exact.logits_BLV, ours.logits_BLV)]
    equal = {
        "most likely token": (ours.logits_BLV.argmax(dim=-1), exact.logits_BLV.argmax(dim=-1)),
        "drawn greedily, guided": (ours.guided_BL, exact.guided_BL),
        "drawn greedily, plain": (ours.plain_BL, exact.plain_BL),
    }
    found = {name: float((mine == its).float().mean()) for name, (mine, its) in equal.items()}
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).mean()
    return {**found, "logit error": float(error), "divergence, nats a token": float(divergence)}


def measure(checkpoint: str, data: str, images: int) -> dict[str, dict[str, float]]:
    """Figures of each kind of `quantize` against float32, of the first validation images."""
    source, cpu = Source(checkpoint), torch.device("cpu")
    model, tokenizer = source.load(cpu)
    shards = open_data(data, tokenizer.image_size, "val", images, 1.0, "center", channels=tokenizer.image_channels)
    with loading(shards.val_dataloader()) as opened:
        batch = next(iter(opened))
    with torch.no_grad():
        idx_BL = tokenizer.eval().encode(batch["image"].float() / 127.5 - 1)
        exact = answers(model, tokenizer, idx_BL, batch["label"])
        return {
            kind: compare(answers(quantize(source.load(cpu)[0], kind), tokenizer, idx_BL, batch["label"]), exact)
            for kind in KINDS
        }


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a Markdown table, write the figures. Raises `UserError` for a checkpoint or data that are none."""
    check_counts(images=arguments.images)
    found = measure(arguments.checkpoint, arguments.data, arguments.images)
    rows = list(next(iter(found.values())))
    print("\n".join([f"| {arguments.checkpoint} | {' | '.join(found)} |", "|---|" + "---|" * len(found)]))
    for row in rows:
        print(f"| {row} | {' | '.join(f'{figures[row]:.4f}' for figures in found.values())} |")
    options = {name: getattr(arguments, name) for name in ("checkpoint", "data", "images")}
    print(f"{write_figures({**options, 'kinds': found}, 'fidelity', arguments.out)}: all figures")
    return 0
