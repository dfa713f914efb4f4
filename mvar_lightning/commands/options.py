"""Options that several commands share: where the model comes from, how tokens are chosen, which classes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mvar_lightning.checkpoints.source import Source
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from mvar_lightning.attention import CachePolicy
    from mvar_lightning.pyramid import Size
    from mvar_lightning.sampling import SamplingSettings, Selector


def add_source(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model."""
    source = parser.add_argument_group("model", "a checkpoint, or --official with both released files")
    words = "a run's folder, a saved folder, or a Lightning checkpoint"
    source.add_argument("--checkpoint", metavar="PATH", help=words)
    source.add_argument(
        "--official", choices=("var", "mvar", "markov_var", "hmar"), help="architecture of released files"
    )
    source.add_argument("--model", metavar="FILE", help="released transformer, e.g. var_d16.pth")
    source.add_argument("--tokenizer", metavar="FILE", help="released tokenizer, e.g. vae_ch160v4096z32.pth")
    add_untold(source)
    source.add_argument("--data", metavar="FOLDER", help="shard folder whose class names may be used for classes")
    source.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is")
    words = "auto: bf16 on a GPU, 32 on a CPU"
    source.add_argument("--precision", default="auto", choices=("auto", "32", "bf16"), help=words)


def add_refiner(parser: argparse.ArgumentParser) -> None:
    """Arguments for a second model, which finishes what the first drafts."""
    group = parser.add_argument_group("two models (CoDe)", "of one tokenizer and any families")
    group.add_argument("--refiner", metavar="CHECKPOINT", help="draws the scales from --from-scale on")
    group.add_argument("--from-scale", type=int, metavar="N", help="the refiner's first scale, counted from 0")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """The argument for weights of few bits."""
    words = "int8: faster on CPUs, a quarter of the memory; -weights: memory alone, any device"
    parser.add_argument("--quantize", choices=("int8", "int8-weights", "int4-weights"), help=words)


def add_refinement(parser: argparse.ArgumentParser) -> None:
    """Arguments for a head that draws some of a map's tokens anew."""
    group = parser.add_argument_group("refinement in passes (HMAR)")
    group.add_argument("--refinement", metavar="CHECKPOINT", help="a run of RefinementModule beside this model")
    words = "tokens that each draw leaves, by scale from 0 (2 x 2: 1,3; 3 x 3: 1,1,2,5)"
    group.add_argument("--refinement-passes", type=passes_of, nargs="+", metavar="1:1,3", help=words)


def passes_of(text: str) -> tuple[int, list[int]]:
    """A scale and its numbers from text like 1:1,3."""
    scale, colon, counts = text.partition(":")
    if not colon or not scale.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a scale and numbers of tokens, like 1:1,3")
    return int(scale), list(side_lengths(counts))


def refinement_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a request says of a refinement. Raises `UserError` for a scale that is given twice."""
    passes: dict[int, list[int]] = {}
    for scale, counts in args.refinement_passes or []:
        if scale in passes:
            raise UserError(f"``refinement_passes`` {scale}: is given twice; give each scale once")
        passes[scale] = counts
    return {"refinement": args.refinement, "refinement_passes": passes or None}


def add_cache_policy(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which keys and values are kept from scale to scale."""
    group = parser.add_argument_group("keys and values (ScaleKV)", "an approximation, for models that keep some")
    words = "layers keep this share of all tokens on average, e.g. 0.1 (all)"
    group.add_argument("--cache-budget", type=float, metavar="SHARE", help=words)
    words = "layers that keep nearly everything, counted from 0 (0; `mvar analyze attention` measures which)"
    group.add_argument("--cache-drafters", type=side_lengths, metavar="0,1", help=words)


def add_untold(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Arguments for what the weights of released files do not tell."""
    words = "its scales (known for 680, 2240 and 9451 tokens)"
    parser.add_argument("--patch-nums", type=map_sizes, metavar="1,2,3", help=words)
    parser.add_argument("--kernel-size", type=int, default=7, metavar="K", help="MVAR's neighborhood (7)")
    words = "MVAR's first scale with a neighborhood, counted from 0 (default: the last but one)"
    parser.add_argument("--first-neighborhood-scale", type=int, metavar="N", help=words)
    words = "which weights of a model's file that holds several, e.g. ema, or state_dict.generator"
    parser.add_argument("--key", metavar="NAME", help=words)
    parser.add_argument("--tokenizer-key", metavar="NAME", help="the same of the tokenizer's file")


def untold_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `import_official`."""
    return chosen(args, "patch_nums kernel_size first_neighborhood_scale key tokenizer_key")


def side_lengths(text: str) -> tuple[int, ...]:
    """Side lengths from a list like 1,2,3."""
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between them, like 1,2,3") from None


def map_sizes(text: str) -> tuple[Size, ...]:
    """Sizes of maps from a list like 1,2,3, or 1x1,1x2,2x4 (height x width)."""
    try:
        return tuple(map(image_size, text.replace(" ", "").split(",")))
    except argparse.ArgumentTypeError:
        words = "give whole numbers with commas between them, like 1,2,3, or height x width, like 1x1,1x2,2x4"
        raise argparse.ArgumentTypeError(f"{text!r}: {words}") from None


def image_size(text: str) -> Size:
    """A side like 16, or height x width like 16x32."""
    numbers = text.split("x")
    if len(numbers) > 2 or not all(map(str.isdecimal, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r}: give a side like 16, or height and width like 16x32")
    height, width = int(numbers[0]), int(numbers[-1])
    return height if height == width else (height, width)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """The argument that says how many processes share the work."""
    words = "processes of this machine, each on its own GPU (1; under torchrun or srun those that they start)"
    parser.add_argument("--devices", type=int, metavar="N", help=words)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how tokens are chosen."""
    settings = parser.add_argument_group("sampling")
    settings.add_argument("--cfg", type=float, default=1.5, help="guidance at the last scale; 0 is off (1.5)")
    words = "over the scales: growing, or the same"
    settings.add_argument("--guidance", default="linear", choices=("linear", "constant"), help=words)
    words = "guide these alone, counted from 0 (all of them)"
    settings.add_argument("--guided-scales", type=scale_range, metavar="A-B", help=words)
    settings.add_argument("--top-k", type=int, default=900, help="most probable tokens kept; 0 is off (900)")
    settings.add_argument("--top-p", type=float, default=0.96, help="share of probability kept; 1 is off (0.96)")
    settings.add_argument("--temperature", type=float, default=1.0, help="divides the logits (1.0)")
    settings.add_argument("--more-smooth", action="store_true", help="mix codes: nicer to look at, not for FID")
    settings.add_argument("--seed", type=int, default=0, help="another one gives other images (0)")
    group = parser.add_argument_group("of several maps drawn for a scale, one goes on")
    words = "MostLikely, or the folder of a scorer (recipes/scorer/)"
    group.add_argument("--selector", metavar="NAME|PATH", help=words)
    group.add_argument("--candidates", type=int, metavar="N", help="maps drawn for each scale (4)")
    group.add_argument(
        "--selected-scales", type=scale_range, metavar="A-B", help="at these alone, counted from 0 (all)"
    )


def scale_range(text: str) -> tuple[int, int]:
    """First and last scale from text like 2-7."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: give the first and the last scale, like 2-7")
    return int(first), int(last)


def source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments name. Raises `UserError` where they name none or two."""
    second = {name: getattr(args, name, None) for name in ("refiner", "from_scale")}  # of commands that take one
    return Source(args.checkpoint, args.official, args.model, args.tokenizer, untold_of(args), **second)


def settings_of(args: argparse.Namespace) -> SamplingSettings:
    """How tokens are chosen. Raises `UserError` for values out of range."""
    from mvar_lightning.sampling import SamplingSettings
    from mvar_lightning.sampling.guidance import named_schedule

    schedule = named_schedule(args.cfg, args.guidance, args.guided_scales)
    filters = args.top_k or None, args.top_p, args.temperature
    policy, selector = cache_policy_of(args), selector_of(args)
    return SamplingSettings(schedule, *filters, args.more_smooth, policy, selector)


def selector_of(args: argparse.Namespace) -> Selector | None:
    """What chooses among several maps, if anything. Raises `UserError` as the selector, or where none is named."""
    from mvar_lightning.sampling.selectors import named_selector

    chosen: dict[str, Any] = {} if args.candidates is None else {"candidates": args.candidates}
    if args.selected_scales is not None:
        first, last = args.selected_scales
        chosen["scales"] = list(range(first, last + 1))
    if args.selector is None:
        for name in ("candidates", "selected_scales"):
            if getattr(args, name) is not None:
                raise UserError(f"``{name}``: goes with ``selector`` NAME or PATH")
        return None
    return named_selector(args.selector, **chosen)


def cache_policy_of(args: argparse.Namespace) -> CachePolicy | None:
    """What is kept from scale to scale; None is everything. Raises `UserError` as `ScaleKV`."""
    from mvar_lightning.attention import ScaleKV

    budget, drafters = (getattr(args, name, None) for name in ("cache_budget", "cache_drafters"))
    if budget is None and drafters is not None:
        raise UserError("``cache_drafters``: needs ``cache_budget`` SHARE")
    return None if budget is None else ScaleKV(budget, None if drafters is None else list(drafters))


def chosen(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """The arguments of these names, for a request that calls them the same."""
    return {name: getattr(args, name) for name in names.split()}


# Which tokenizer, how images are cut, and what they are compared by.


def add_cutting(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how images are cut to size; `runs.run.settle_cutting` gives their values."""
    default = "default: as the checkpoint's run validates, or"
    parser.add_argument("--crop", choices=("center", "adm"), help=f"of each image ({default} center)")
    words = f"shorter side before the crop, over the image size ({default} 1.125)"
    parser.add_argument("--resize-ratio", type=float, metavar="R", help=words)


def add_features(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what images are compared by."""
    add_extractor(parser, "data|inception|none|FILE", "; none leaves them out")
    parser.add_argument("--lpips", metavar="FILE", help="VGG weights; without them LPIPS is left out")


def add_extractor(parser: argparse.ArgumentParser, choices: str = "data|inception|FILE", more: str = "") -> None:
    """Arguments that say whose features are compared."""
    words = "of Frechet distances: a classifier trained on these shards (data); Inception (weights/NAME.pth, or its "
    parser.add_argument("--features", default="data", metavar=choices, help=f"{words}path); a TorchScript file{more}")
    parser.add_argument("--feature-size", type=int, metavar="N", help="resize images for a TorchScript file")


def add_tokenizer(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Arguments that say which tokenizer, or which ones, for which images, cut how, on which device."""
    words = "a run's folder, a saved folder, a Lightning checkpoint, or a released vae_ch160v4096z32.pth"
    if several:
        words += "; given several times, these are compared, each under its name"
    action, path = ("append", "[NAME=]PATH") if several else ("store", "PATH")
    parser.add_argument("--checkpoint", required=True, action=action, metavar=path, help=words)
    words = "side of the images, or height x width, 16x32 (default: the tokenizer's)"
    parser.add_argument("--image-size", type=image_size, metavar="N", help=words)
    words = "scales of a released file; of maps that are no squares 1x1,1x2,2x4"
    parser.add_argument("--patch-nums", type=map_sizes, metavar="1,2,3", help=words)
    add_cutting(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is")
