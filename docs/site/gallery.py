"""Every picture of docs/img: what it shows, and the command that draws it."""

PHOTOS = "--checkpoint runs/var/photos --data data/photos"
GROWING = "--classes 3,7,8 --count 8 --strips webp"
SCALING = "mvar sweep ablations/scaling_{0}\nmvar analyze scaling runs/sweeps/scaling_{0}"

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
        "mvar reconstruct --checkpoint runs/tokenizer/photos --data data/photos",
    ),
    "tokenizer_remedies.png": ("Tokenizers with and without remedies", "mvar sweep ablations/tokenizer_remedies"),
    "tokenizer_remedies_curves.png": ("Their usage of codes over the steps", "mvar sweep ablations/tokenizer_remedies"),
    "tokenizer_adversarial.png": ("Tokenizers with discriminators", "mvar sweep ablations/tokenizer_adversarial"),
    "analyses_var_photos.png": ("Samples of VAR on photographs", "mvar train var/photos"),
    "analyses_attention_scales.png": ("Attention on each scale", f"mvar analyze attention {PHOTOS}"),
    "analyses_attention_windows.png": ("Attention inside windows", f"mvar analyze attention {PHOTOS}"),
    "analyses_rfa.png": ("Residual-feature alignment", f"mvar analyze rfa {PHOTOS}"),
    "analyses_perturbation.png": ("Damage of one wrong token", f"mvar analyze perturb {PHOTOS} --images 100"),
    "analyses_perturbed.png": ("Images with one wrong token", f"mvar analyze perturb {PHOTOS} --images 100"),
    "analyses_prefix.png": ("How many scales are seen", "mvar sweep ablations/prefix_scales"),
    "analyses_kernels.png": ("Kernel sizes", "mvar sweep ablations/kernel_sizes"),
    "analyses_scale_groups.png": ("Scale groups", "mvar sweep ablations/scale_groups"),
    "analyses_history.png": ("History", "mvar sweep ablations/history"),
    "analyses_scaling_digits.png": ("Scaling on the digits", SCALING.format("digits")),
    "analyses_scaling_photos.png": ("Scaling on the photographs", SCALING.format("photos")),
}
"""In the order of the page. Sweeps and analyses write them into their folder; docs/analyses.md says from which runs."""
