"""From class labels to images: one loop over the scales for every strategy, and zero-shot editing."""

from mvar_lightning.sampling.draws import ImageNoise, filter_logits, sample_tokens
from mvar_lightning.sampling.editing import edit, inpaint_mask, outpaint_mask
from mvar_lightning.sampling.guidance import ConstantGuidance, CutoffGuidance, GuidanceSchedule, LinearGuidance
from mvar_lightning.sampling.sampler import Generated, SamplingSettings, generate, sample_pyramid

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
