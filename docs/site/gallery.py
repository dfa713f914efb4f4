"""Every picture of docs/img: what it shows, and the command that draws it."""

import shlex

PHOTOS = "--checkpoint runs/var/photos --data data/photos"
GROWING = "--classes 3,7,8 --count 8 --strips webp"
PERTURB = f"mvar analyze perturb {PHOTOS} --images 100 --top-k 0 --top-p 1"
SCALING = "mvar sweep ablations/scaling_{0}\nmvar analyze scaling runs/sweeps/scaling_{0}"


def beside(sweep: str, data: str, images: int, variants: dict[str, str]) -> str:
    """A sweep, and the same images by its tokenizers: a column for each name, of the variant called so."""
    named = [shlex.quote(f"{name}=runs/sweeps/{sweep}/{variant}/seed0") for name, variant in variants.items()]
    lines = [f"mvar reconstruct --data data/{data} --images {images}", *(f"--checkpoint {each}" for each in named)]
    return f"mvar sweep ablations/{sweep}\n" + " \\\n    ".join(lines)


REMEDIES = {"plain": "plain", "cosine": "cosine codes", "restart": "restart of dead codes"}
REMEDIES |= {name: name for name in ("entropy", "default")}
ADVERSARIAL = {"without": "without", "hinge": "hinge", "non-satur.": "non-saturating"}
ADVERSARIAL |= {"LeCam, aug.": "hinge, LeCam, DiffAugment"}

GALLERY = {
    "digits_growing.webp": ("Digits from coarse to fine", f"mvar sample --checkpoint digits {GROWING}"),
    "digits_samples.png": ("Samples of the digits", "mvar train var/digits"),
    "digits_coarse_to_fine.png": ("Reconstructions after each scale", "mvar train tokenizer/digits"),
    "data_path.png": ("The way of the data", "make figures"),
    "axes.png": ("The axes and their members", "make figures"),
    "strategies.png": ("What one query sees", "make figures"),
    "coarse_full.png": ("A strategy of one's own", "make figures"),
    "tokenizer_progressive.png": (
        "Photographs after each scale",
        "mvar evaluate tokenizer --checkpoint runs/tokenizer/photos --data data/photos",
    ),
    "tokenizer_remedies.png": (
        "Tokenizers with and without remedies",
        beside("tokenizer_remedies", "photos", 7, REMEDIES),
    ),
    "tokenizer_remedies_curves.png": ("Their usage of codes over the steps", "mvar sweep ablations/tokenizer_remedies"),
    "tokenizer_adversarial.png": (
        "Tokenizers with discriminators",
        beside("tokenizer_adversarial", "digits", 6, ADVERSARIAL),
    ),
    "analyses_var_photos.png": ("Samples of VAR on photographs", "mvar train var/photos"),
    "analyses_attention_scales.png": ("Attention on each scale", f"mvar analyze attention {PHOTOS}"),
    "analyses_attention_windows.png": ("Attention inside windows", f"mvar analyze attention {PHOTOS}"),
    "analyses_rfa.png": ("Residual-feature alignment", f"mvar analyze rfa {PHOTOS}"),
    "analyses_perturbation.png": ("Damage of one wrong token", PERTURB),
    "analyses_perturbed.png": ("Images with one wrong token", PERTURB),
    "analyses_prefix.png": ("How many scales are seen", "mvar sweep ablations/prefix_scales"),
    "analyses_kernels.png": ("Kernel sizes", "mvar sweep ablations/kernel_sizes"),
    "analyses_scale_groups.png": ("Scale groups", "mvar sweep ablations/scale_groups"),
    "analyses_history.png": ("History", "mvar sweep ablations/history"),
    "analyses_scaling_digits.png": ("Scaling on the digits", SCALING.format("digits")),
    "analyses_scaling_photos.png": ("Scaling on the photographs", SCALING.format("photos")),
}
"""In the order of the page. Sweeps and analyses write them into their folder; docs/analyses.md says from which runs."""
