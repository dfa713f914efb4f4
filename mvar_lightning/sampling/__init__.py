"""From class labels to images: one loop over the scales for every strategy, and zero-shot editing."""

from mvar_lightning.sampling.draws import ImageNoise, filter_logits, sample_tokens
from mvar_lightning.sampling.editing import edit, inpaint_mask, outpaint_mask
from mvar_lightning.sampling.guidance import ConstantGuidance, CutoffGuidance, GuidanceSchedule, LinearGuidance
from mvar_lightning.sampling.sampler import Generated, SamplingSettings, generate, sample_pyramid
from mvar_lightning.sampling.scorer import Scorer, load_scorer, save_scorer
from mvar_lightning.sampling.selectors import BestOfScales, Drawn, MostLikely, Selector

__all__ = [
    "BestOfScales",
    "ConstantGuidance",
    "CutoffGuidance",
    "Drawn",
    "Generated",
    "GuidanceSchedule",
    "ImageNoise",
    "LinearGuidance",
    "MostLikely",
    "SamplingSettings",
    "Scorer",
    "Selector",
    "edit",
    "filter_logits",
    "generate",
    "inpaint_mask",
    "load_scorer",
    "outpaint_mask",
    "sample_pyramid",
    "sample_tokens",
    "save_scorer",
]
