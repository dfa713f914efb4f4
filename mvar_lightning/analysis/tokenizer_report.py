"""What an evaluation of a tokenizer found: the numbers, as JSON and as Markdown.

K scales, N images, HW pixels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ScaleReport:
    """One scale over all images: its share of the codebook, and the image as it is after it.

    Args:
        side: of the token map.
        tokens_seen: tokens of this scale over all images.
        codes_used: different codes among them.
        codes_possible: min(V, tokens seen).
        perplexity: exp(entropy) of the code frequencies.
        psnr: mean PSNR of the images decoded from this scale and the ones before.
    """

    side: int
    tokens_seen: int
    codes_used: int
    codes_possible: int
    perplexity: float
    psnr: float

    @property
    def usage(self) -> float:
        return self.codes_used / self.codes_possible

    @property
    def bits_per_token(self) -> float:
        """Entropy of the code frequencies."""
        return math.log2(self.perplexity)

    @property
    def entropy_bits(self) -> float:
        """Bits of this scale in one image."""
        return self.side**2 * self.bits_per_token


@dataclass(frozen=True)
class FrechetReport:
    """rFID: distance of the reconstructions to their images; ``floor`` is what other real images get.

    Args:
        features: name of what the distance compares.
        num_features: numbers an image.
        rfid: of ``images`` reconstructions to the same ``images`` images.
        floor, floor_images: of the other split's images; None where there are none.
    """

    features: str
    num_features: int
    rfid: float
    images: int
    floor: float | None = None
    floor_images: int = 0


@dataclass(frozen=True)
class Examples:
    """Images for the pictures, in [0, 1]: originals and reconstructions, and the first few of them after each scale."""

    image_N3HW: Tensor
    again_N3HW: Tensor
    after_NK3HW: Tensor


@dataclass(frozen=True)
class TokenizerReport:
    """Everything that was measured; PSNR, SSIM and LPIPS are means over images."""

    images: int
    image_size: int
    vocab_size: int
    psnr: float
    ssim: float | None
    lpips: float | None
    frechet: FrechetReport | None
    scales: tuple[ScaleReport, ...]
    progressive_images: int
    examples: Examples = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_image(self) -> int:
        return sum(scale.side**2 for scale in self.scales)

    @property
    def fixed_bits(self) -> float:
        """Bits of an image at log2(V) a token."""
        return self.tokens_per_image * math.log2(self.vocab_size)

    @property
    def entropy_bits(self) -> float:
        """Bits of an image under an ideal coder that knows each scale's code frequencies and nothing else."""
        return sum(scale.entropy_bits for scale in self.scales)

    def content(self) -> dict[str, Any]:
        """The numbers as plain values, for JSON."""
        per_scale = [
            asdict(scale) | {"usage": scale.usage, "bits_per_token": scale.bits_per_token} for scale in self.scales
        ]
        return {
            "images": self.images,
            "image_size": self.image_size,
            "vocab_size": self.vocab_size,
            "tokens_per_image": self.tokens_per_image,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "lpips": self.lpips,
            "rfid": None if self.frechet is None else asdict(self.frechet),
            "bits_per_image": {"fixed_rate": self.fixed_bits, "entropy_coded": self.entropy_bits},
            "bits_per_pixel": {
                "fixed_rate": self.fixed_bits / self.image_size**2,
                "entropy_coded": self.entropy_bits / self.image_size**2,
            },
            "progressive_images": self.progressive_images,
            "scales": per_scale,
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Measures of the whole image: name and value."""
        pixels = self.image_size**2
        return [
            ("images", f"{self.images:,} of {self.image_size} x {self.image_size} pixels"),
            ("PSNR", f"{self.psnr:.2f} dB"),
            ("SSIM", "-" if self.ssim is None else f"{self.ssim:.4f}"),
            ("LPIPS", "-" if self.lpips is None else f"{self.lpips:.4f}"),
            *self._frechet_rows(),
            ("tokens an image", f"{self.tokens_per_image:,} of {self.vocab_size:,} codes"),
            ("bits an image, fixed rate", f"{self.fixed_bits:,.0f} ({self.fixed_bits / pixels:.3f} a pixel)"),
            ("bits an image, entropy coded", f"{self.entropy_bits:,.0f} ({self.entropy_bits / pixels:.3f} a pixel)"),
        ]

    def _frechet_rows(self) -> list[tuple[str, str]]:
        found = self.frechet
        if found is None:
            return [("rFID", "-")]
        name = f"{found.features}, {found.num_features} features"
        rows = [(f"rFID ({name})", f"{found.rfid:.3f} on {found.images:,} images")]
        if found.floor is not None:
            rows.append(("FID of other real images", f"{found.floor:.3f} on {found.floor_images:,} images"))
        return rows

    def scale_rows(self) -> list[list[str]]:
        """The table of scales: headings, then one row for each."""
        head = ["scale", "codes used", "possible", "usage", "perplexity", "bits a token", "PSNR after it"]
        body = [
            [
                f"{scale.side} x {scale.side}",
                f"{scale.codes_used:,}",
                f"{scale.codes_possible:,}",
                f"{scale.usage:.1%}",
                f"{scale.perplexity:,.1f}",
                f"{scale.bits_per_token:.2f}",
                f"{scale.psnr:.2f} dB",
            ]
            for scale in self.scales
        ]
        return [head, *body]

    def markdown(self, title: str) -> str:
        lines = [f"# {title}", "", "| measure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in self.rows()]
        head, *body = self.scale_rows()
        lines += ["", *(_line(row) for row in (head, ["---"] + ["---:"] * (len(head) - 1), *body))]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
