"""Selectors: of several maps drawn for a scale, one goes on.

The maps come from one distribution, guided and filtered, so the transformer runs once for all of them. The first is the
one that would be drawn without a selector, from the same maps before it.

B images, b images of a part of them, l tokens of one scale, M maps, V vocabulary, Z code dim, hw latent map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import torch
from torch import Tensor

from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.sampling.draws import ImageNoise, sample_maps
from mvar_lightning.sampling.scorer import Scorer, shared_scorer
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.transformer import NextScaleTransformer

MOST_CANDIDATES = 1024

NUMBERS_AT_ONCE = 2**26
"""So many numbers of latent maps (256 MiB) are held at a time."""


@dataclass(frozen=True)
class Drawn:
    """Maps drawn for one scale of some images.

    Args:
        scale: counted from 0.
        label_B: int64; the model's num_classes is "no class".
        logits_BlV: guided, neither filtered nor divided by the temperature; all maps of an image are drawn from them.
        idx_BMl: tokens of the maps.
        codes_BMlZ: their codes.
        f_hat_BZhw: the quantized latent before this scale.
        tokenizer: whose tokens they are.
    """

    scale: int
    label_B: Tensor
    logits_BlV: Tensor
    idx_BMl: Tensor
    codes_BMlZ: Tensor
    f_hat_BZhw: Tensor
    tokenizer: MultiScaleTokenizer

    @cached_property
    def f_hat_BMZhw(self) -> Tensor:
        """The quantized latent after each of the maps."""
        maps = self.idx_BMl.shape[1]
        before_NZhw = self.f_hat_BZhw.repeat_interleave(maps, dim=0)
        after_NZhw = self.tokenizer.quantizer.accumulate(before_NZhw, self.codes_BMlZ.flatten(0, 1), self.scale)
        return after_NZhw.unflatten(0, (-1, maps))


class Selector(AxisMember, ABC):
    """Which of several maps goes on.

    Args:
        candidates: maps drawn for each of these scales.
        scales: where there is a choice, counted from 0; all if not given.
        temperature: 0 takes the best; else one is drawn by softmax(scores / temperature).
        among: draw among so many of the best alone.

    Raises:
        UserError: nothing to choose from, scales or numbers that cannot be.
    """

    def __init__(
        self,
        candidates: int = 4,
        scales: Sequence[int] | None = None,
        temperature: float = 0.0,
        among: int | None = None,
    ) -> None:
        name = type(self).__name__
        check_kind("candidates", candidates, int, "a whole number")
        if not 2 <= candidates <= MOST_CANDIDATES:
            raise UserError(
                f"{name}: ``candidates`` {candidates}; give 2 to {MOST_CANDIDATES}: of one there is no choice"
            )
        given = list(scales) if isinstance(scales, (list, tuple, range)) else None
        if scales is not None and (
            not given or any(type(s) is not int for s in given) or sorted({*given}) != given or given[0] < 0
        ):
            raise UserError(f"{name}: scales {scales!r}; give some, counted from 0, each once and in order")
        if type(temperature) not in (int, float) or not 0 <= temperature < float("inf"):
            raise UserError(f"{name}: temperature {temperature!r}; must be 0 (the best one) or positive")
        if among is not None and (type(among) is not int or temperature == 0 or not 2 <= among <= candidates):
            raise UserError(f"{name}: among {among}; give 2 to {candidates}, and a temperature to draw by")
        self.candidates, self.scales, self.temperature, self.among = candidates, given, float(temperature), among

    @abstractmethod
    def scores(self, drawn: Drawn) -> Tensor:
        """One number for each map, float (B, M): the largest is the best. Of an image alone, whatever its batch."""

    def check(self, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
        """Raise `UserError` where this selector does not fit a model and its tokenizer."""
        last = model.pyramid.num_scales - 1
        if self.scales is not None and self.scales[-1] > last:
            raise UserError(f"{type(self).__name__}: scales {self.scales}; the model has 0 to {last}")

    def identity(self) -> str:
        """What images made with it follow from."""
        return repr(self)

    def pick(self, score_BM: Tensor, uniform_B: Tensor) -> Tensor:
        """Which map goes on, int64 (B,); of equal ones the first.

        Args:
            uniform_B: a number in [0, 1) for each image.
        """
        if self.temperature == 0:
            return score_BM.argmax(dim=1)
        order_BM = score_BM.argsort(dim=1, descending=True, stable=True)[:, : self.among]
        share_BM = (score_BM.gather(1, order_BM) / self.temperature).softmax(dim=1).cumsum(dim=1)
        place_B1 = torch.searchsorted(share_BM, uniform_B[:, None] * share_BM[:, -1:], right=True)
        return order_BM.gather(1, place_B1.clamp_(max=order_BM.shape[1] - 1))[:, 0]


class MostLikely(Selector):
    """The map that is most likely under the guided distribution that it was drawn from; needs no training.

    What filters and the temperature add to a map's log-likelihood is the same for all maps of an image, up to a factor.
    """

    def scores(self, drawn: Drawn) -> Tensor:
        picked_BlM = drawn.logits_BlV.gather(-1, drawn.idx_BMl.transpose(1, 2))
        return picked_BlM.float().sum(dim=1)


class BestOfScales(Selector):
    """The map that a trained network takes for the most real one (LSRS, arXiv 2512.03796).

    Args:
        candidates, scales, temperature, among: as of `Selector`.
        scorer: folder of a saved `Scorer`, or of its run, or the network itself.

    Raises:
        UserError: as `Selector`; no scorer is there.
    """

    def __init__(
        self,
        candidates: int = 4,
        scales: Sequence[int] | None = None,
        scorer: str | Scorer = "",
        temperature: float = 0.0,
        among: int | None = None,
    ) -> None:
        super().__init__(candidates, scales, temperature, among)
        self.scorer = scorer if isinstance(scorer, Scorer) else str(scorer)
        if not scorer:
            raise UserError("BestOfScales: give the folder of its ``scorer``; recipes/scorer/ trains one")
        self.network()

    def network(self) -> Scorer:
        """Raises `UserError` where it is not there any more."""
        return self.scorer if isinstance(self.scorer, Scorer) else shared_scorer(self.scorer)

    def check(self, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
        super().check(model, tokenizer)
        scorer = self.network()
        scorer.check_tokenizer(tokenizer)
        if scorer.num_classes != model.num_classes:
            raise UserError(
                f"``selector``: the scorer knows {scorer.num_classes} classes, the model {model.num_classes}"
            )

    def identity(self) -> str:
        named = {**vars(self), "scorer": self.network().digest()}  # wherever it lies
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in named.items())})"

    def scores(self, drawn: Drawn) -> Tensor:
        scorer = self.network().to(drawn.label_B.device)
        f_hat_NZhw = drawn.f_hat_BMZhw.flatten(0, 1)
        label_N = drawn.label_B.repeat_interleave(drawn.idx_BMl.shape[1])
        # in full precision, so that few bits decide nothing
        with evaluating(scorer), torch.autocast(f_hat_NZhw.device.type, enabled=False):
            score_N = scorer(f_hat_NZhw, label_N, torch.full_like(label_N, drawn.scale))
        return score_N.view(drawn.idx_BMl.shape[:2])


Exchange = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(scale, idx_Bl, codes_BlZ) -> both, as sampling shall go on with them."""


class Selection:
    """A selector at work on the images of one call.

    Args:
        selector: of the maps.
        model, tokenizer: that draw them.
        label_B: int64, of all images.
        noise: of all images.
        filters: top_k, top_p and the temperature of the draws.
        exchange: what is done to every map before it is judged, such as putting an edited image's tokens in; it takes
            those of all images.

    Raises:
        UserError: a selector that does not fit the two.
    """

    def __init__(
        self,
        selector: Selector,
        model: NextScaleTransformer,
        tokenizer: MultiScaleTokenizer,
        label_B: Tensor,
        noise: ImageNoise,
        filters: tuple[int | None, float | None, float],
        exchange: Exchange | None = None,
    ) -> None:
        selector.check(model, tokenizer)
        self.selector, self.tokenizer, self.label_B, self.noise = selector, tokenizer, label_B, noise
        self.filters, self.exchange = filters, exchange
        self.sound = torch.ones((), dtype=torch.bool, device=label_B.device)

    def chooses_at(self, scale: int) -> bool:
        return self.selector.scales is None or scale in self.selector.scales

    def choose(self, logits_blV: Tensor, scale: int, images: slice, f_hat_BZhw: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, l) and codes (b, l, Z) of one scale, of the images that these logits are of.

        Args:
            f_hat_BZhw: of all images, before this scale.
        """
        uniform_BlM, pick_B = (each[images] for each in self.noise.of_maps(scale, self.selector.candidates))
        f_hat_bZhw, label_b = f_hat_BZhw[images], self.label_B[images]
        at_once = max(1, NUMBERS_AT_ONCE // (self.selector.candidates * f_hat_bZhw[0].numel()))
        if self.exchange is not None:
            at_once = len(logits_blV)
        parts = []
        for some in (slice(first, first + at_once) for first in range(0, len(logits_blV), at_once)):
            idx_bMl = sample_maps(logits_blV[some], uniform_BlM[some], *self.filters).transpose(1, 2)
            codes_bMlZ = self.tokenizer.quantizer.lookup(idx_bMl)
            if self.exchange is not None:
                pairs = [
                    self.exchange(scale, *pair) for pair in zip(idx_bMl.unbind(1), codes_bMlZ.unbind(1), strict=True)
                ]
                idx_bMl, codes_bMlZ = (torch.stack(each, dim=1) for each in zip(*pairs, strict=True))
            tensors = (label_b[some], logits_blV[some], idx_bMl, codes_bMlZ, f_hat_bZhw[some])
            score_bM = self.selector.scores(Drawn(scale, *tensors, self.tokenizer))
            self.sound &= torch.isfinite(score_bM.sum())
            best_b, rows = (
                self.selector.pick(score_bM.float(), pick_B[some]),
                torch.arange(len(idx_bMl), device=label_b.device),
            )
            parts.append((idx_bMl[rows, best_b], codes_bMlZ[rows, best_b]))
        idx_bl, codes_blZ = (torch.cat(each) for each in zip(*parts, strict=True))
        return idx_bl, codes_blZ


def named_selector(name: str, candidates: int = 4, scales: Sequence[int] | None = None) -> Selector:
    """The selector that a command names: a member of the axis, or the folder of a scorer.

    Raises:
        UserError: as the selector; neither of the two; a member that is made of other arguments.
    """
    if name == BestOfScales.__name__:
        raise UserError(f"``selector`` {name}: give the folder of its scorer instead (recipes/scorer/ trains one)")
    if name in Selector.members:
        member, given = Selector.members[name], {"candidates": candidates, "scales": scales}
        try:
            signature(member).bind(**given)
        except TypeError as error:
            raise UserError(
                f"``selector`` {name}: is made of more than candidates and scales ({error}); give it from Python"
            ) from None
        return member(**given)  # type: ignore[return-value]
    return BestOfScales(candidates, scales, name)
