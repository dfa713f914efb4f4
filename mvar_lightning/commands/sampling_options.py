"""What `mvar sample`, `edit` and `import` share: where the model comes from, how tokens are chosen, which classes."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from mvar_lightning.sampling import GuidanceSchedule
    from mvar_lightning.tokenizer import MultiScaleTokenizer
    from mvar_lightning.transformer import NextScaleTransformer

NO_CLASS = -1


@dataclass(frozen=True)
class Source:
    """Where a model is read from: a checkpoint of ours, or a released pair of files."""

    checkpoint: str | None
    official: str | None
    model: str | None
    tokenizer: str | None
    untold: dict[str, Any] = field(default_factory=dict)

    def load(self, device: torch.device) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
        """The pair on ``device``. Raises `UserError` for a missing, damaged or unsuitable file."""
        from mvar_lightning import checkpoints

        if self.checkpoint is not None:
            model, tokenizer = checkpoints.load(self.checkpoint, device)
            if model is None:
                raise UserError(f"checkpoint {self.checkpoint}: holds a tokenizer alone; give one of a trained model")
            return model, tokenizer
        assert self.model is not None and self.tokenizer is not None and self.official is not None
        model, tokenizer = checkpoints.import_official(self.model, self.tokenizer, self.official, **self.untold)
        return model.to(device), tokenizer.to(device)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model."""
    source = parser.add_argument_group("model", "a checkpoint, or --official with both released files")
    source.add_argument(
        "--checkpoint", metavar="PATH", help="a run's folder, a saved folder, or a Lightning checkpoint"
    )
    source.add_argument("--official", choices=("var", "mvar", "markov_var"), help="architecture of released files")
    source.add_argument("--model", metavar="FILE", help="released transformer, e.g. var_d16.pth")
    source.add_argument("--tokenizer", metavar="FILE", help="released tokenizer, e.g. vae_ch160v4096z32.pth")
    add_untold(source)
    source.add_argument("--data", metavar="FOLDER", help="shard folder whose class names may be used for classes")
    source.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is")
    source.add_argument(
        "--precision", default="auto", choices=("auto", "32", "bf16"), help="auto: bf16 on a GPU, 32 on a CPU"
    )


def add_untold(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Arguments for what the weights of released files do not tell."""
    parser.add_argument(
        "--patch-nums", type=side_lengths, metavar="1,2,3", help="its scales (known for 680, 2240 and 9451 tokens)"
    )
    parser.add_argument("--kernel-size", type=int, default=7, metavar="K", help="MVAR's neighborhood (7)")
    parser.add_argument(
        "--first-neighborhood-scale",
        type=int,
        metavar="N",
        help="MVAR's first scale with a neighborhood, counted from 0 (default: the last but one)",
    )


def untold_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `import_official`."""
    return {name: getattr(args, name) for name in ("patch_nums", "kernel_size", "first_neighborhood_scale")}


def side_lengths(text: str) -> tuple[int, ...]:
    """Side lengths from a list like 1,2,3."""
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between them, like 1,2,3") from None


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how tokens are chosen."""
    settings = parser.add_argument_group("sampling")
    settings.add_argument("--cfg", type=float, default=1.5, help="guidance at the last scale; 0 is off (1.5)")
    settings.add_argument(
        "--guidance", default="linear", choices=("linear", "constant"), help="over the scales: growing, or the same"
    )
    settings.add_argument(
        "--guided-scales", type=scale_range, metavar="A-B", help="guide these alone, counted from 0 (all of them)"
    )
    settings.add_argument("--top-k", type=int, default=900, help="most probable tokens kept; 0 is off (900)")
    settings.add_argument("--top-p", type=float, default=0.96, help="share of probability kept; 1 is off (0.96)")
    settings.add_argument("--temperature", type=float, default=1.0, help="divides the logits (1.0)")
    settings.add_argument("--more-smooth", action="store_true", help="mix codes: nicer to look at, not for FID")
    settings.add_argument("--seed", type=int, default=0, help="another one gives other images (0)")


def scale_range(text: str) -> tuple[int, int]:
    """First and last scale from text like 2-7."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: give the first and the last scale, like 2-7")
    return int(first), int(last)


def source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments name. Raises `UserError` where they name none or two."""
    if (args.checkpoint is None) == (args.official is None):
        raise UserError("model: give either --checkpoint PATH or --official var|mvar|markov_var with its files")
    if args.official is not None and (args.model is None or args.tokenizer is None):
        raise UserError(f"--official {args.official}: give both files, --model FILE and --tokenizer FILE")
    return Source(args.checkpoint, args.official, args.model, args.tokenizer, untold_of(args))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `generate` and `edit`. Raises `UserError` for values out of range."""
    from mvar_lightning.sampling import SamplingSettings

    top_k, guidance = None if args.top_k == 0 else args.top_k, _guidance_of(args)
    SamplingSettings(guidance, top_k, args.top_p, args.temperature, args.more_smooth)
    return {
        "cfg": guidance,
        "top_k": top_k,
        "top_p": args.top_p,
        "temperature": args.temperature,
        "more_smooth": args.more_smooth,
    }


def _guidance_of(args: argparse.Namespace) -> GuidanceSchedule:
    from mvar_lightning.sampling import ConstantGuidance, CutoffGuidance, LinearGuidance

    linear = args.guidance == "linear"
    if args.guided_scales is not None:
        first, last = args.guided_scales
        return CutoffGuidance(args.cfg, first, last, linear=linear)
    return LinearGuidance(args.cfg) if linear else ConstantGuidance(args.cfg)


def choose_device(name: str) -> torch.device:
    """The device called ``name``. Raises `UserError` for a GPU that is not there."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: there is no usable GPU here; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def choose_precision(name: str, device: torch.device) -> str:
    """``32`` or ``bf16``; auto is bf16 on a GPU."""
    return name if name != "auto" else "bf16" if device.type == "cuda" else "32"


def computing(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which the model computes in ``precision``."""
    import torch

    return contextlib.nullcontext() if precision == "32" else torch.autocast(device.type, dtype=torch.bfloat16)


def prepare(model: NextScaleTransformer, precision: str, *, compiled: bool = False, graphs: bool = False) -> None:
    """Make a loaded model ready for `computing` in ``precision``, in place; compile its blocks and record its scales if
    asked for. Raises `UserError` as `record_scales`."""
    from mvar_lightning.transformer.bf16 import weights_in_bf16
    from mvar_lightning.transformer.compiled import compile_blocks
    from mvar_lightning.transformer.scale_graphs import record_scales

    if precision == "bf16":
        weights_in_bf16(model)
    if compiled:
        compile_blocks(model)
    if graphs:
        record_scales(model)


def class_names(data: str | None, num_classes: int) -> Sequence[str]:
    """Class names of a shard folder, none without one. Raises `UserError` where they do not fit the model."""
    from mvar_lightning.data.index import read_index

    if data is None:
        return ()
    names = read_index(data).class_names
    if len(names) != num_classes:
        raise UserError(f"--data {data}: has {len(names)} classes, the model {num_classes}; give its own data folder")
    return names


def class_indices(text: str | None, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Classes from text such as ``3,7``, ``0-9``, ``cat,dog`` or ``none``; all of them where there is no text.

    Raises:
        UserError: a class that the model does not have, or a name that is not known.
    """
    if text is None:
        return list(range(num_classes))
    indices = [index for part in text.split(",") for index in _class_part(part.strip(), num_classes, names)]
    return list(dict.fromkeys(indices))


def _class_part(part: str, num_classes: int, names: Sequence[str]) -> Sequence[int]:
    if part in names:
        return [names.index(part)]
    if part == "none":
        return [NO_CLASS]
    first, dash, last = part.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        known = f"--data names {', '.join(names[:5])}, ..." if names else "to use names give --data FOLDER"
        raise UserError(f"class {part!r}: must be an index from 0 to {num_classes - 1} or a known name; {known}")
    chosen = range(int(first), int(last if dash else first) + 1)
    if not chosen or chosen[-1] >= num_classes:
        raise UserError(f"class {part}: the model knows classes 0 to {num_classes - 1}")
    return chosen
