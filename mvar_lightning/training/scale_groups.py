"""A training step scale group after scale group: the exact gradient of the whole step in less memory.

Where no query reads keys of another scale, scales are independent given their inputs, and the loss is a sum over them.
So each group's forward and backward pass can run by itself, its activations freed before the next group's. MVAR
instead trains some scales at one step and others at the next (`trainer.py`: 8 steps on scales 1 to 8, one on scale 9,
one on scale 10); that is a `cycle` here.

B batch, L tokens of the pyramid, l tokens of a group, K scales, Z code dim, C width.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mvar_lightning.attention.plan import AttentionPlan
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.training.token_loss import TokenLoss, chunked_token_loss, joined, token_loss
from mvar_lightning.transformer import Inputs, NextScaleTransformer

AUTO_SHARE = 0.25
"""What `auto` takes: a group has at most this share of the tokens, if one scale alone has not more."""

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")


@dataclass(frozen=True)
class ScaleGroups:
    """Which scales a training step runs together.

    Attributes:
        groups: consecutive ranges of scales that cover all of them.
        cycle: if set, a step trains one group alone, and the n-th group comes ``cycle[n]`` steps in a row.
        target: if set, bytes that a group may keep for its backward pass; `within` makes the groups for it.
    """

    groups: tuple[range, ...]
    cycle: tuple[int, ...] | None = None
    target: float | None = None

    @classmethod
    def read(
        cls, said: list[list[int | str]] | float | str | None, cycle: list[int] | None, plan: AttentionPlan
    ) -> ScaleGroups:
        """What a recipe says.

        Args:
            said: None for all scales at once; lists of scales, ``0..7`` standing for a range; a number, the share of
                the whole step's activations that a group may have; ``auto`` for `AUTO_SHARE`; or a size such as
                ``4GB`` that they may have on each device.
            cycle: steps for each group, or None for all groups in every step.
            plan: of the model's attention strategy.

        Raises:
            UserError: groups that do not cover the scales in order, whose queries read each other's keys, or a cycle
                that does not fit them.
        """
        target, num_scales = None, plan.pyramid.num_scales
        if isinstance(said, list):
            groups = _listed(said, num_scales)
        elif said is None:
            groups = (range(num_scales),)
        elif (size := SIZE.fullmatch(str(said))) and float(size[1]) > 0:
            target = float(size[1]) * UNITS[size[2]]
            groups = tuple(range(scale, scale + 1) for scale in range(num_scales))  # until a token's bytes are known
        else:
            share = AUTO_SHARE if said == "auto" else said
            if not isinstance(share, float | int) or not 0 < share <= 1:
                raise UserError(
                    f"scale_groups {said!r}: write auto, a share of the step's activations such as {AUTO_SHARE}, a "
                    f"size that they may have such as 4GB ({', '.join(UNITS)}), or lists of scales such as "
                    "[[0..7], [8], [9]]"
                )
            groups = groups_of_share(plan.pyramid, share)
        for start, scale in ((group.start, scale) for group in groups for scale in group):
            if (first := plan.reads[scale].first_key_scale) < start:
                raise UserError(
                    f"scale_groups: scale {scale} reads keys of scale {first}, which is in an earlier group, so the "
                    "gradient would not be exact; use a strategy that stays in its scale (AdjacentAttention, "
                    "SpatialAttention), or no groups"
                )
        if cycle is not None and target is not None:
            raise UserError(f"scale_groups {said} with scale_cycle {cycle}: a cycle needs groups that are listed")
        if cycle is not None and (len(cycle) != len(groups) or len(groups) < 2 or min(cycle) < 1):
            raise UserError(
                f"scale_cycle {cycle}: give each of the {len(groups)} scale groups its number of steps, at least 1; "
                "MVAR's is scale_groups [[0..7], [8], [9]] with scale_cycle [8, 1, 1]"
            )
        return cls(groups, None if cycle is None else tuple(cycle), target)

    def within(self, kept_of_token: float, images: int, pyramid: ScalePyramid) -> ScaleGroups:
        """As few groups as keep at most `target` bytes each, for a batch of so many images; one scale at least."""
        assert self.target is not None
        share = min(1.0, self.target / (kept_of_token * images * pyramid.num_tokens))
        return replace(self, groups=groups_of_share(pyramid, share))

    def at(self, step: int) -> tuple[range, ...]:
        """Groups of one optimizer step, counted from 0."""
        if self.cycle is None:
            return self.groups
        step %= sum(self.cycle)
        return (self.groups[next(n for n, end in enumerate(accumulate(self.cycle)) if step < end)],)

    @property
    def splits_steps(self) -> bool:
        """Whether a step makes several backward passes."""
        return len(self.groups) > 1 and self.cycle is None

    def __str__(self) -> str:
        names = [str(group[0]) if len(group) == 1 else f"{group[0]}..{group[-1]}" for group in self.groups]
        if self.cycle is None:
            return ", then ".join(names)
        return ", ".join(f"{name} for {steps} steps" for name, steps in zip(names, self.cycle, strict=True))


def groups_of_share(pyramid: ScalePyramid, share: float) -> tuple[range, ...]:
    """Consecutive groups, each as many scales as have at most ``share`` of the tokens, or one scale that has more.

    Activations grow with tokens: at 256 pixels, 0.25 gives scales 0 to 6, 7, 8, and 9, with 155, 100, 169 and 256
    tokens of 680.
    """
    starts = [0]
    for scale in range(1, pyramid.num_scales):
        if pyramid.offsets[scale + 1] - pyramid.offsets[starts[-1]] > share * pyramid.num_tokens:
            starts.append(scale)
    return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], pyramid.num_scales], strict=True))


def loss_of_groups(
    model: NextScaleTransformer,
    x_BLZ: Tensor,
    label_B: Tensor,
    idx_BL: Tensor,
    groups: Sequence[range],
    accumulated: int = 1,
) -> tuple[Tensor, TokenLoss]:
    """Loss of some scale groups, of which all but one have been taken backward when it returns.

    The largest group comes first, while the parameters have no gradients yet. The backward pass of the loss that is
    returned adds the last group's gradient and, through the shared inputs (embeddings, history, modulations), that of
    all groups. So each parameter has its whole gradient only after it, and DDP reduces once. One group over all scales
    is the plain step.

    Args:
        x_BLZ, label_B: as in `NextScaleTransformer.forward`.
        accumulated: batches of this optimizer step; the caller divides what is returned by it.

    Returns:
        The loss, a sum over the groups' tokens divided by B x L, with the gradient that is left; and the figures.
    """
    pyramid, inputs = model.pyramid, model.inputs(x_BLZ, label_B)
    carried = _Carried(inputs)
    losses, figures = [], []
    # stochastic depth must draw for each group what it draws for all scales at once
    devices, drops_paths = [x_BLZ.device] if x_BLZ.device.type == "cuda" else [], model.training and model.drop_path > 0
    *before, last = sorted(groups, key=lambda group: pyramid.span(group).start - pyramid.span(group).stop)
    for group in before:
        with torch.random.fork_rng(devices, enabled=drops_paths):
            # from leaves of its own: this backward pass ends there, and so frees nothing that later groups need
            loss, figure = _loss_of(model, carried.cut(pyramid.span(group)), idx_BL, group)
            with torch.autocast(loss.device.type, enabled=False):
                (loss / accumulated).backward()  # the caller divides only what is returned
        losses.append(loss.detach())
        figures.append(figure)
        del loss  # and the graph with it, before the next group's is built
    # the last group reads the inputs themselves, so that its backward pass reaches what made them
    loss, figure = _loss_of(model, replace(inputs, x_BlC=inputs.x_BlC[:, pyramid.span(last)]), idx_BL, last)
    if losses:
        # the earlier losses enter as numbers; their gradients at the cut, undivided again, as those of a zero
        loss = torch.stack([*losses, loss]).sum() + accumulated * carried.zero_with_gradient()
    return loss, joined([*figures, figure], pyramid)


class _Carried:
    """The shared inputs, cut off from what made them; gathers their gradients from groups that went backward."""

    def __init__(self, inputs: Inputs) -> None:
        self._x_BLC = inputs.x_BlC
        self._leaves: list[tuple[Tensor, Tensor]] = []
        self._modulations = [self._cut(modulation) for modulation in inputs.modulations]
        self._head_modulation = self._cut(inputs.head_modulation)

    def cut(self, span: slice) -> Inputs:
        return Inputs(self._cut(self._x_BLC[:, span]), self._modulations, self._head_modulation)

    def zero_with_gradient(self) -> Tensor:
        """A zero whose gradient to each input is the one gathered: their inner product, less its own value."""
        product = torch.zeros((), device=self._x_BLC.device)
        for tensor, leaf in self._leaves:
            if leaf.grad is not None:
                # d/dtensor of (tensor * g).sum() is g: autograd then carries g on to what made the tensor
                product = product + (tensor * leaf.grad).sum(dtype=torch.float32)
        return product - product.detach()

    def _cut(self, tensor: Tensor) -> Tensor:
        leaf = tensor.detach().requires_grad_(tensor.requires_grad)
        self._leaves.append((tensor, leaf))
        return leaf


def _loss_of(model: NextScaleTransformer, inputs: Inputs, idx_BL: Tensor, group: range) -> tuple[Tensor, TokenLoss]:
    """One group's part of the mean over all tokens, and its figures."""
    pyramid, classifier = model.pyramid, model.head.linear
    span = pyramid.span(group)
    h_BlC, idx_Bl = model.features(inputs, group), idx_BL[:, span]
    if isinstance(classifier.weight, DTensor):  # sharded: only the layer's own call gathers it
        figure = token_loss(model.head.classify(h_BlC), idx_Bl, pyramid, group)
    else:
        figure = chunked_token_loss(h_BlC, classifier, idx_Bl, pyramid, group)
    loss = figure.loss * ((span.stop - span.start) / pyramid.num_tokens)
    return loss, replace(figure, loss=figure.loss.detach())


def _listed(said: list[list[int | str]], num_scales: int) -> tuple[range, ...]:
    groups: list[list[int]] = []
    for group in said:
        groups.append([])
        for word in group:
            first, _, last = str(word).partition("..")
            if not first.isdecimal() or not (last or first).isdecimal():
                raise UserError(f"scale_groups {said}: {word!r} is no scale; write numbers, or 0..7 for a range")
            groups[-1] += range(int(first), int(last or first) + 1)
        if not groups[-1]:
            raise UserError(f"scale_groups {said}: a group is empty")
    if [scale for group in groups for scale in group] != list(range(num_scales)):
        raise UserError(
            f"scale_groups {said}: must name each of the scales 0 to {num_scales - 1} once, in order, such as "
            f"[[0..{num_scales - 2}], [{num_scales - 1}]]"
        )
    return tuple(range(group[0], group[-1] + 1) for group in groups)


# What autograd keeps for the backward pass, in bytes: it makes a size such as 4GB into groups.


MEASURED_TOKENS = 64  # at least so many tokens of one image, if there are as many, stand for all


class KeptForBackward:
    """Bytes that autograd keeps for the backward pass while this context lasts, weights left out: now, and the peak."""

    def __init__(self, model: nn.Module) -> None:
        self.now = self.peak = 0
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> KeptForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()  # fake tensors have no data_ptr
        if address not in self._weights:
            # views of one storage are kept several times, but take its memory once
            self._holders[address] = self._holders.get(address, 0) + 1
            if self._holders[address] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._drop, address, size)
        return kept

    def _drop(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        self.now -= size if self._holders[address] == 0 else 0


class _Kept:
    """A tensor in the graph; it goes when the graph lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_of_token(model: NextScaleTransformer) -> float:
    """Bytes kept by all blocks for one more token of one more image, in the precision and mode of the moment.

    The slope between one image and two, on their first scales: what does not grow with the images (weights that
    autocast has rounded, masks, tables) cancels out. Blocks that are compiled are measured compiled. What the scales
    share (embeddings, history, modulations) is left out, as no grouping spares it. Draws no random numbers, leaves no
    gradients.
    """
    pyramid, device = model.pyramid, next(model.parameters()).device
    enough = min(MEASURED_TOKENS, pyramid.num_tokens)
    scales = range(next(count for count, tokens in enumerate(pyramid.offsets) if tokens >= enough))
    span, peaks = pyramid.span(scales), []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        for images in (1, 2):
            x_BLZ = torch.zeros(images, pyramid.num_tokens - pyramid.first_tokens, model.code_dim, device=device)
            inputs = model.inputs(x_BLZ, torch.zeros(images, dtype=torch.int64, device=device))
            x_BlC = inputs.x_BlC[:, span].clone()  # a view would keep the whole
            with KeptForBackward(model) as kept:
                model.features(replace(inputs, x_BlC=x_BlC), scales)
            peaks.append(kept.peak)
    return (peaks[1] - peaks[0]) / (span.stop - span.start)
