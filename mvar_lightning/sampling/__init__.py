"""From class labels to images: one loop over the scales for every strategy, and zero-shot editing."""

from mvar_lightning.sampling.editing import edit, inpaint_mask, outpaint_mask
from mvar_lightning.sampling.generated import Generated
from mvar_lightning.sampling.guidance import ConstantGuidance, CutoffGuidance, GuidanceSchedule, LinearGuidance
from mvar_lightning.sampling.sampler import (
    ImageNoise,
    SamplingSettings,
    filter_logits,
    generate,
    sample_pyramid,
    sample_tokens,
)

__all__ = [
    "ConstantGuidance",
    "CutoffGuidance",
    "Generated",
    "GuidanceSchedule",
    "ImageNoise",
    "LinearGuidance",
    "SamplingSettings",
    "edit",
    "filter_logits",
    "generate",
    "inpaint_mask",
    "outpaint_mask",
    "sample_pyramid",
    "sample_tokens",
]
