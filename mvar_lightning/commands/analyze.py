"""`mvar analyze`: the papers' analyses of a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands import options
from mvar_lightning.errors import UserError
from mvar_lightning.runs.recipe import data_settings, settle_cutting
from mvar_lightning.tools.files import check_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mvar_lightning.data.image_data import ShardsDataModule
    from mvar_lightning.tokenizer import MultiScaleTokenizer
    from mvar_lightning.transformer import NextScaleTransformer


def add_parser(subparsers: Any) -> None:
    """Add `analyze`, with a subcommand for each analysis."""
    parser = subparsers.add_parser("analyze", help="the papers' analyses of trained models")
    kinds = parser.add_subparsers(title="analyses", required=True, metavar="{attention,rfa,perturb,scaling}")
    attention = kinds.add_parser(
        "attention", help="how much attention each scale spends on which scale, and inside which window (MVAR)"
    )
    rfa = kinds.add_parser("rfa", help="alignment of a scale's residual with the inputs of earlier ones (Markov-VAR)")
    for kind, run in ((attention, run_attention), (rfa, run_rfa)):
        _add_common(kind)
        kind.add_argument("--images", type=int, default=256, metavar="N", help="the first N validation images (256)")
        kind.set_defaults(run=run)
    perturb = kinds.add_parser("perturb", help="damage that one wrong token does, scale by scale (Markov-VAR)")
    _add_common(perturb)
    perturb.add_argument("--images", type=int, default=256, metavar="N", help="images that are sampled (256)")
    options.add_settings(perturb)
    options.add_features(perturb)
    perturb.set_defaults(run=run_perturb)
    scaling = kinds.add_parser("scaling", help="power laws of loss and error rate over the runs of a sweep (VAR)")
    scaling.add_argument(
        "sweep", metavar="DIR", help="folder of a sweep over depths, such as runs/sweeps/scaling_digits"
    )
    scaling.add_argument("--out", metavar="DIR", help="where to write (default: the sweep's folder)")
    scaling.set_defaults(run=run_scaling)


def _add_common(parser: argparse.ArgumentParser) -> None:
    options.add_source(parser)
    options.add_cutting(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write (default: analysis/ in the run, or beside a file)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (16)")


def run_attention(args: argparse.Namespace) -> int:
    from mvar_lightning.evaluation.papers import figures as files
    from mvar_lightning.evaluation.papers.attention_mass import attention_mass

    out = _folder(args)
    model, tokenizer, device = _loaded(args)
    mass = attention_mass(model, tokenizer, _batches(args, model, tokenizer, device))
    drawings = {"attention_scales.png": files.draw_on_scale(mass), "attention_windows.png": files.draw_within(mass)}
    content = {**_about(args, model), **mass.content()}
    return _finish("attention", content, files.attention_markdown(mass), drawings, out)


def run_rfa(args: argparse.Namespace) -> int:
    from mvar_lightning.evaluation.papers import figures as files
    from mvar_lightning.evaluation.papers.alignment import residual_feature_alignment

    out = _folder(args)
    model, tokenizer, device = _loaded(args)
    found = residual_feature_alignment(model, tokenizer, _batches(args, model, tokenizer, device))
    content = {**_about(args, model), **found.content()}
    return _finish("rfa", content, files.alignment_markdown(found), {"rfa.png": files.draw_alignment(found)}, out)


def run_perturb(args: argparse.Namespace) -> int:
    from mvar_lightning.evaluation.features import extractor_of, lpips_of
    from mvar_lightning.evaluation.papers import figures as files
    from mvar_lightning.evaluation.papers.perturbation import perturb
    from mvar_lightning.sampling import SamplingSettings

    out = _folder(args)
    model, tokenizer, device = _loaded(args)
    chosen = options.settings_of(args)
    settings = SamplingSettings(chosen.pop("cfg"), **chosen)
    distance = None
    if args.features != "none":
        data = _data(args, model, tokenizer)
        extractor = extractor_of(args, data, out, device)
        distance = _real_images(extractor, data, device)
    damages, pictures = perturb(
        model,
        tokenizer,
        settings,
        args.images,
        seed=args.seed,
        batch_size=args.batch_size,
        perceptual=lpips_of(args, device),
        distance=distance,
    )
    name, sides = None if distance is None else distance.extractor.name, model.pyramid.sides
    content = {
        **_about(args, model),
        "images": args.images,
        "features": name,
        "fid_reference_images": 0 if distance is None else distance.count(real=True),
        "damages": [damage.content() for damage in damages],
    }
    drawings = {
        "perturbation.png": files.draw_damages(damages, sides, name),
        "perturbed.png": files.draw_perturbed(pictures, sides),
    }
    markdown = files.perturbation_markdown(damages, sides, args.images, name)
    return _finish("perturbation", content, markdown, drawings, out)


def run_scaling(args: argparse.Namespace) -> int:
    from mvar_lightning.evaluation.papers import scaling
    from mvar_lightning.runs.run import DAMAGED
    from mvar_lightning.tools.files import read_json

    folder = Path(args.sweep)
    if not (folder / "sweep.json").is_file():
        raise UserError(f"{folder}: has no sweep.json; give the folder of a finished `mvar sweep`")
    content = read_json(folder / "sweep.json", DAMAGED)
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(runs, list):
        raise UserError(f"{folder / 'sweep.json'}: holds no runs; make it anew with mvar sweep")
    found = scaling.scaling_of(runs)
    content = {"sweep": str(folder), **scaling.scaling_content(found)}
    drawings = {"scaling.png": scaling.draw_scaling(found)}
    return _finish("scaling", content, scaling.scaling_markdown(found), drawings, Path(args.out or folder))


def _folder(args: argparse.Namespace) -> Path:
    """Where to write; a run's folder given as the checkpoint is replaced by its model."""
    options.check_counts(args, "images", "batch_size")
    settle_cutting(args, args.checkpoint, matters=args.data is not None)
    source = Path(args.checkpoint or args.model or ".").resolve()
    if args.checkpoint is not None and (source / "model" / "config.json").is_file():  # a run's folder
        args.checkpoint = str(Path(args.checkpoint) / "model")
    out = Path(args.out) if args.out is not None else options.beside(source).with_name("analysis")
    check_folder(out)
    return out


def _loaded(args: argparse.Namespace) -> tuple[NextScaleTransformer, MultiScaleTokenizer, torch.device]:
    from mvar_lightning.tools.compute import choose_device

    device = choose_device(args.device)
    model, tokenizer = options.source_of(args).load(device)
    return model, tokenizer, device


def _data(args: argparse.Namespace, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> ShardsDataModule:
    """The shards of ``--data``: the model's, as far as its number of classes and its run's recipe tell."""
    from mvar_lightning.evaluation.features import data_of

    if args.data is None:
        raise UserError("--data: the analysis looks at real images; name a shard folder (perturb runs without: "
                        "--features none)")  # fmt: skip
    data = data_of(args, tokenizer.image_size, "val")
    if data.num_classes != model.num_classes:
        raise UserError(f"--data {args.data}: has {data.num_classes} classes, the model {model.num_classes}; "
                        "give the data that it was trained on")  # fmt: skip
    trained_on = _trained_on(args)
    if trained_on and Path(trained_on).resolve() != Path(args.data).resolve():
        print(
            f"--data {args.data}: the model was trained on {trained_on}; the numbers are of a model on foreign images"
        )
    return data


def _trained_on(args: argparse.Namespace) -> str | None:
    """The data folder of the run that a checkpoint lies in; None where there is no run beside it."""
    settings = {} if args.checkpoint is None else data_settings(args.checkpoint)
    path = settings.get("images") or settings.get("path")
    return str(path) if path else None


def _batches(
    args: argparse.Namespace, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Validation images with their labels, the first ``--images`` of them."""
    data = _data(args, model, tokenizer)
    if data.val_samples < args.images:
        print(f"--images {args.images}: {args.data} has {data.val_samples} validation images; all of them are used")
    return _first(data, args.images, device)


def _first(data: ShardsDataModule, images: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    from mvar_lightning.tools.drawing import normalize

    left = images
    for batch in data.ordered_dataloader("val"):
        image_B3HW = normalize(batch["image"][:left].to(device))
        label_B = batch["label"][:left].to(device)
        left -= len(image_B3HW)
        yield image_B3HW, label_B
        if left == 0:
            return


def _real_images(extractor: Any, data: ShardsDataModule, device: torch.device) -> Any:
    from mvar_lightning.metrics import FrechetDistance
    from mvar_lightning.tools.drawing import to_unit

    distance = FrechetDistance(extractor).to(device)
    for batch in data.ordered_dataloader("val"):
        distance.update(to_unit(batch["image"].to(device)), real=True)
    return distance


def _about(args: argparse.Namespace, model: NextScaleTransformer) -> dict[str, Any]:
    return {
        "checkpoint": str(args.checkpoint or args.model),
        "attention": repr(model.strategy),
        "depth": model.depth,
        "data": args.data,
    }


def _finish(name: str, content: dict[str, Any], markdown: str, drawings: dict[str, Any], out: Path) -> int:
    from mvar_lightning.evaluation.papers.figures import write_analysis

    print(markdown)
    for path in write_analysis(name, content, markdown, drawings, out):
        print(f"  {path}")
    return 0
