"""`mvar import`, `export` and `info`: published files to a checkpoint folder, and back; what a checkpoint is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvar_lightning.commands.options import add_quantize, add_untold, untold_of
from mvar_lightning.errors import UserError

CHECKPOINT = "a run's folder, a saved folder, or a Lightning .ckpt"
SHOWN_CLASSES = 10


def add_parser(subparsers: Any) -> None:
    """Add `import`, `export` and `info` to the parser of `mvar`."""
    parser = subparsers.add_parser("import", help="turn published weights into a checkpoint folder")
    parser.add_argument(
        "--architecture", required=True, choices=("var", "mvar", "markov_var", "hmar"), help="of the file"
    )
    parser.add_argument("--model", required=True, metavar="FILE", help="the transformer, e.g. var_d16.pth")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer, vae_ch160v4096z32.pth")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder for the checkpoint")
    add_untold(parser)
    parser.set_defaults(run=run_import)
    parser = subparsers.add_parser("export", help="write a checkpoint under the names of the published models")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    words = "where the transformer goes (.pth, .safetensors)"
    parser.add_argument("--model", metavar="FILE", help=words)
    parser.add_argument("--tokenizer", metavar="FILE", help="where the tokenizer goes")
    words = "instead of the two files: a saved folder of the suite, of weights alone"
    parser.add_argument("--folder", metavar="FOLDER", help=words)
    words = "with --folder: round the weights to float16, in half of the space"
    parser.add_argument("--half", action="store_true", help=words)
    add_quantize(parser)
    words = "instead: encode, decode and transformer as ONNX graphs of any batch, for onnxruntime and others"
    parser.add_argument("--onnx", metavar="FOLDER", help=words)
    parser.add_argument("--pt2", metavar="FOLDER", help="instead: the same as programs of torch.export")
    parser.set_defaults(run=run_export)
    parser = subparsers.add_parser("info", help="architecture, sizes and tokenizer hash of a checkpoint")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.set_defaults(run=run_info)


def run_import(args: argparse.Namespace) -> int:
    """Import, save and describe."""
    from mvar_lightning.checkpoints import import_official, save
    from mvar_lightning.checkpoints.classes import names_or_imagenets

    model, tokenizer = import_official(args.model, args.tokenizer, args.architecture, **untold_of(args))
    save(args.out, model, tokenizer, class_names=names_or_imagenets((), model.num_classes))
    print(describe(args.out))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Export both files, or a folder."""
    from mvar_lightning.checkpoints import export_official, load, save
    from mvar_lightning.checkpoints.folder import open_checkpoint
    from mvar_lightning.checkpoints.programs import export_programs
    from mvar_lightning.transformer.quantized import quantize

    forms = {form: getattr(args, form) for form in ("onnx", "pt2") if getattr(args, form) is not None}
    files = args.model is not None or args.tokenizer is not None
    if len(forms) + files + (args.folder is not None) != 1 or ((args.half or args.quantize) and not args.folder):
        raise UserError(
            "mvar export: give one, ``model`` FILE and ``tokenizer`` FILE, or ``folder`` FOLDER (and ``half`` or "
            "``quantize``), or ``onnx`` FOLDER, or ``pt2`` FOLDER"
        )
    model, tokenizer = load(args.checkpoint)
    for form, folder in forms.items():
        names = open_checkpoint(args.checkpoint, whole=False).record.class_names
        export_programs(folder, model, tokenizer, form, names)
        print(f"wrote {', '.join(sorted(path.name for path in Path(folder).iterdir()))} to {folder}")
        return 0
    if args.folder is not None:
        names = open_checkpoint(args.checkpoint, whole=False).record.class_names
        if args.quantize is not None:
            if model is None:
                raise UserError(
                    f"{args.checkpoint}: a checkpoint of a tokenizer alone; there is nothing to ``quantize``"
                )
            quantize(model, args.quantize)
        save(args.folder, model, tokenizer, args.half, names)
        print(describe(args.folder))
        return 0
    if args.model is None or args.tokenizer is None:
        raise UserError("mvar export: give both, ``model`` FILE and ``tokenizer`` FILE")
    if model is None:
        raise UserError(f"{args.checkpoint}: a checkpoint of a tokenizer alone; there is no transformer to export")
    for target in (args.model, args.tokenizer):
        if Path(target).resolve() == Path(args.checkpoint).resolve():
            raise UserError(f"{target}: is the checkpoint itself, which would be lost; name another file")
    export_official(model, tokenizer, args.model, args.tokenizer)
    print(f"wrote {args.model} and {args.tokenizer}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Print the description."""
    print(describe(args.checkpoint))
    return 0


def describe(path: str) -> str:
    """A few aligned lines about a checkpoint, from its record: of a folder no weights are loaded.

    Raises `UserError` where there is none.
    """
    from mvar_lightning.checkpoints.folder import open_checkpoint
    from mvar_lightning.sampling.scorer import is_scorer

    if is_scorer(path):
        return _aligned({"checkpoint": path, **_scorer_lines(path)})
    opened = open_checkpoint(path, whole=False)
    lines = {"checkpoint": path, "kind": opened.record.kind}
    if opened.record.model is not None:
        lines |= _model_lines(opened.empty_model(), opened.record.class_names)
    tokenizer: Any = opened.empty_tokenizer()
    config, (channels, height, width) = tokenizer.config, tokenizer.image_shape
    others = "" if channels == 3 else f" of {channels} channels"
    lines |= {
        "tokenizer": f"{height} x {width} pixels{others}, {tokenizer.vocab_size} codes of length "
        f"{tokenizer.code_dim}, scales {tokenizer.pyramid}",
        "tokenizer sizes": f"channels {config['channels']} x {config['channel_multipliers']}, "
        f"{config['num_res_blocks']} residual blocks, {config['phi_layers']} phi layers, "
        f"{_parameters(tokenizer):,} parameters",
        "tokenizer hash": opened.record.tokenizer_hash,
    }
    return _aligned(lines)


def _aligned(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _scorer_lines(path: str) -> dict[str, str]:
    from mvar_lightning.sampling.scorer import load_scorer

    scorer = load_scorer(path)
    sizes = {name: scorer.config[name] for name in ("channels", "embedding", "hidden")}
    return {
        "kind": "scorer (for --selector)",
        "maps": f"scales {scorer.pyramid}, codes of length {scorer.code_dim}, {scorer.num_classes} classes",
        "sizes": ", ".join(f"{name} {value}" for name, value in sizes.items()),
        "parameters": f"{_parameters(scorer):,}",
        "tokenizer hash": scorer.tokenizer_hash,
    }


def _model_lines(model: Any, class_names: Sequence[str]) -> dict[str, str]:
    from mvar_lightning.checkpoints.official import architecture_of

    try:
        architecture = architecture_of(model)
    except UserError:
        architecture = "own (none of the published ones)"
    pyramid = model.pyramid
    shown = ", ".join([*class_names[:SHOWN_CLASSES], *(["..."] if len(class_names) > SHOWN_CLASSES else [])])
    return {
        "architecture": architecture,
        "attention": repr(model.strategy),
        "history": repr(model.history_design),
        "blocks": repr(model.block_design),
        "depth": f"{model.depth} (width {model.width}, heads {model.heads})",
        "scales": f"{pyramid} ({pyramid.num_tokens} tokens)",
        "classes": f"{model.num_classes}{f' ({shown})' if shown else ''}",
        "parameters": f"{_parameters(model):,}{f' (weights in {model.quantized})' if model.quantized else ''}",
    }


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
