"""How tokens are chosen: the settings that every way of sampling shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from mvar_lightning.sampling.filters import check_filters
from mvar_lightning.sampling.guidance import GuidanceSchedule, LinearGuidance


@dataclass(frozen=True)
class SamplingSettings:
    """Validated when made.

    Attributes:
        guidance: strength of classifier-free guidance at each scale.
        top_k, top_p: filters; None is off. A top_k above the vocabulary keeps all.
        temperature: divides the guided logits before they are filtered.
        more_smooth: feed mixtures of codes back instead of the codes drawn; for looks only (VAR).
    """

    guidance: GuidanceSchedule = field(default_factory=LinearGuidance)
    top_k: int | None = 900
    top_p: float | None = 0.96
    temperature: float = 1.0
    more_smooth: bool = False

    def __post_init__(self) -> None:
        check_filters(self.top_k, self.top_p, self.temperature)
