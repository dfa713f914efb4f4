"""The next-scale transformer: token pyramid inputs and a class in, logits over the codebook out.

It knows no tokenizer, no trainer, no distribution and no global device. Three objects made at construction say
what varies: the attention strategy, the history and the block design.

B images, R rows (B, or 2B in guided sampling), L tokens, l tokens of some scales, C width, Z code dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvar_lightning.attention import AttentionStrategy, CachePolicy, FullAttention, KeepAll, KVCache, choose_backend
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid, Scales
from mvar_lightning.tools.compute import exact_float32, runs_behind
from mvar_lightning.transformer.blocks import AdaLNBlock, BlockDesign, ModulatedHead, VARBlocks
from mvar_lightning.transformer.history import History, HistoryState, NoHistory
from mvar_lightning.transformer.quantized import quantize

TOKENS_AT_ONCE = 2**16
"""So many tokens go through the blocks of a sampling step at a time: enough to fill a GPU, and the activations of a
1024-pixel scale of 50 rows shrink to a third."""


@dataclass(frozen=True)
class Inputs:
    """What a training step's blocks and head read: tokens (B, l, C), and scales, shifts and gates from the class."""

    x_BlC: Tensor
    modulations: list[Tensor]
    head_modulation: Tensor


@dataclass
class SamplingState:
    """What sampling carries from scale to scale for R rows."""

    class_RC: Tensor
    fused_class_RC: Tensor
    modulations: list[Tensor]
    head_modulation: Tensor
    cache: KVCache
    history: HistoryState

    def rows(self, rows: slice) -> SamplingState:
        """The same, of some rows; keys and values are views, the history is that of all images."""
        classes = self.class_RC[rows], self.fused_class_RC[rows]
        modulations = [modulation[rows] for modulation in self.modulations], self.head_modulation[rows]
        return SamplingState(*classes, *modulations, self.cache.rows(rows), self.history)


class NextScaleTransformer(nn.Module):
    """VAR, MVAR or Markov-VAR, by the axes chosen.

    Args:
        scales: side lengths of the token maps, coarse to fine, or [height, width] of maps that are no squares.
        vocab_size, code_dim: V and Z of the tokenizer.
        num_classes: labels are 0 .. num_classes - 1; one more embedding stands for "no class".
        depth: d; by default width is 64 d, heads d and drop path 0.1 d / 24 (the papers' one dial).
        attention, history, blocks: the axes of variation.
        label_drop: share of labels replaced by "no class" in training, for classifier-free guidance.
        gamma_init: see `init_weights`.
        backend: how attention is computed: auto, dense, per_scale, flex, natten.
        checkpoint_activations: recompute each block in the backward pass to save memory.

    Raises:
        UserError: sizes that do not fit together, or an attention strategy that does not fit the scales.
    """

    tokenizer_hash: str | None = None
    """Fingerprint of the tokenizer whose tokens it reads, where a checkpoint told it."""

    def __init__(
        self,
        scales: Scales,
        *,
        vocab_size: int,
        code_dim: int,
        num_classes: int,
        depth: int = 16,
        attention: AttentionStrategy | None = None,
        history: History | None = None,
        blocks: BlockDesign | None = None,
        width: int | None = None,
        heads: int | None = None,
        drop_path: float | None = None,
        label_drop: float = 0.1,
        gamma_init: float = 1e-3,
        backend: str = "auto",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = depth if heads is None else heads
        if depth < 1 or heads < 1 or width % heads or (width // heads) % 4:
            raise UserError(
                f"depth {depth}, width {width}, heads {heads}: width must be heads times a multiple of 4 (VAR: 64)"
            )
        sizes = {"vocab_size": vocab_size, "code_dim": code_dim, "num_classes": num_classes, "width": width}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} {size}: must be at least 1")
        for name, rate in {"drop_path": drop_path or 0.0, "label_drop": label_drop}.items():
            if not 0 <= rate <= 1:
                raise UserError(f"{name} {rate}: must be from 0 to 1")
        self.pyramid = ScalePyramid(scales)
        self.vocab_size, self.code_dim, self.num_classes = vocab_size, code_dim, num_classes
        self.depth, self.width, self.heads = depth, width, heads
        self.label_drop, self.gamma_init = label_drop, gamma_init
        self.drop_path = 0.1 * depth / 24 if drop_path is None else drop_path
        self.checkpoint_activations = checkpoint_activations
        self.replay_rows: Callable[[SamplingState, int, Tensor], Tensor] | None = None  # set by `record_scales`
        self.quantized: str | None = None  # set by `quantize`
        self.equal_rows = False
        """Whether all calls of the blocks at a scale have equally many rows: other numbers are compiled or recorded."""
        self.strategy = attention or FullAttention()
        self.history_design = history or NoHistory()
        self.block_design = blocks or VARBlocks()
        self.backend = choose_backend(backend, self.strategy, self.pyramid, head_dim=width // heads)

        self.word_embedding = nn.Linear(code_dim, width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.history = self.history_design.make(width)
        self.positions = self.block_design.make_positions(self.pyramid, width)
        self.condition = self.block_design.make_condition(width)
        rates = torch.linspace(0, self.drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList([self.block_design.make_block(width, heads, self.backend, rate) for rate in rates])
        self.head = ModulatedHead(width, vocab_size, self.block_design.make_norm(width))
        init_weights(self, width=width, depth=depth, gamma_init=gamma_init)

    @property
    def _blocks(self) -> list[AdaLNBlock]:
        return cast(list[AdaLNBlock], list(self.blocks))

    @property
    def config(self) -> dict[str, Any]:
        """Plain values from which `from_config` builds this architecture again (not its weights)."""
        sizes = ("vocab_size", "code_dim", "num_classes", "depth", "width", "heads")
        rates = ("drop_path", "label_drop", "gamma_init")
        axes = {"attention": self.strategy, "history": self.history_design, "blocks": self.block_design}
        return {
            "scales": self.pyramid.scales,
            **{name: getattr(self, name) for name in (*sizes, *rates)},
            **{name: axis.config() for name, axis in axes.items()},
            **({} if self.quantized is None else {"quantized": self.quantized}),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> NextScaleTransformer:
        """Build from `config`; ``overrides`` replace constructor arguments (a backend, an attention strategy)."""
        given = {**axes_of(config), **overrides}
        kind = given.pop("quantized", None)
        return cls(**given) if kind is None else quantize(cls(**given), kind)

    def mask(self) -> Tensor:
        """The strategy's boolean (L, L) mask, for plots."""
        return self.strategy.mask(self.pyramid)

    def forward(self, x_BLZ: Tensor, label_B: Tensor) -> Tensor:
        """Teacher forcing.

        Args:
            x_BLZ: inputs of all scales but the first, float32 (`MultiScaleTokenizer.teacher_input`).
            label_B: int64 class indices, num_classes for "no class"; in training mode a share of them is dropped.

        Returns:
            Logits (B, L, V), float32.

        Raises:
            UserError: inputs or labels of another shape, or a label out of range (in training on a GPU the lookup of
                the embedding tells instead: reading labels back would make every step wait).
        """
        return self.transform(self.inputs(x_BLZ, label_B), range(self.pyramid.num_scales))

    def inputs(self, x_BLZ: Tensor, label_B: Tensor) -> Inputs:
        """What the blocks and the head read; arguments and errors as in `forward`.

        Everything that joins scales (the history) or reads the class is in here, so that under a strategy whose queries
        stay in their scale `transform` can take scale after scale.
        """
        self._check_labels(label_B, images=len(x_BLZ))
        if self.training and self.label_drop > 0:
            dropped_B = torch.rand(len(label_B), device=label_B.device) < self.label_drop
            label_B = torch.where(dropped_B, self.num_classes, label_B)
        return self.unchecked_inputs(x_BLZ, label_B)

    def unchecked_inputs(self, x_BLZ: Tensor, label_B: Tensor) -> Inputs:
        """`inputs` without a look at the labels and without dropping any: what a graph can hold."""
        class_BC = self.class_embedding(label_B)
        return Inputs(self.embed(x_BLZ, class_BC), self._modulations(class_BC), self.head.modulation(class_BC))

    def embed(self, x_BLZ: Tensor, class_BC: Tensor) -> Tensor:
        """Inputs of all tokens (B, L, C), in the weights' own precision whatever autocast says."""
        expected = self.pyramid.num_tokens - self.pyramid.first_tokens
        if x_BLZ.shape[1:] != (expected, self.code_dim):
            raise UserError(
                f"teacher input of shape {tuple(x_BLZ.shape)}: scales {self.pyramid} and code dim {self.code_dim} "
                f"need (B, {expected}, {self.code_dim})"
            )
        with exact_float32(x_BLZ.device):
            words_BlC = self.word_embedding(x_BLZ.to(self.word_embedding.weight.dtype))
            words_by_scale = words_BlC.split([self.pyramid.tokens_of(k) for k in range(1, len(self.pyramid))], dim=1)
            later = self.history(words_by_scale, class_BC)
            start = class_BC[:, None].expand(-1, self.pyramid.first_tokens, -1)
            return torch.cat([start, *later], dim=1) + self.positions(range(self.pyramid.num_scales))

    def transform(self, inputs: Inputs, scales: range) -> Tensor:
        """Logits (B, l, V) of the tokens of ``scales`` from their own inputs (``inputs.x_BlC`` has those alone)."""
        return self.head.classify(self.features(inputs, scales))

    def features(self, inputs: Inputs, scales: range) -> Tensor:
        """`transform` before its last product, (B, l, C): what a loss in chunks reads."""
        x_BlC = _to_compute_dtype(inputs.x_BlC)
        self.backend.prepare(x_BlC.device)
        for block, whole_modulation in zip(self._blocks, inputs.modulations, strict=True):
            # outside of what is compiled or computed again: one variant for all rates, and one draw; cast as in
            # sampling: the float32 offset of a shared modulation would make the residual stream float32
            modulation = _to_compute_dtype(block.drop_path(whole_modulation))
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BlC = checkpoint(block, x_BlC, modulation, scales, use_reentrant=False)
            else:
                x_BlC = block(x_BlC, modulation, scales)
        return self.head.features(x_BlC, inputs.head_modulation)

    def begin(
        self, label_R: Tensor, images: int, stop: int | None = None, policy: CachePolicy | None = None
    ) -> SamplingState:
        """Start sampling R rows: the labels of ``images`` images, then perhaps as many unconditional rows; ``stop`` is
        the first scale that is not drawn, ``policy`` says what is kept (`KeepAll`)."""
        class_RC = self.class_embedding(label_R)
        # in guided sampling a history may fuse the conditional class into the unconditional rows, too
        conditional = self.history_design.conditional_class_when_guided
        fused_RC = class_RC[:images].repeat(len(label_R) // images, 1) if conditional else class_RC
        modulations = [_to_compute_dtype(modulation) for modulation in self._modulations(class_RC)]
        head_dim, like = self.width // self.heads, _to_compute_dtype(class_RC[:0])
        sizes = {"layers": self.depth, "batch": len(label_R), "heads": self.heads, "head_dim": head_dim}
        make_cache = (policy or KeepAll()).make
        cache = make_cache(self.backend.plan, **sizes, device=like.device, dtype=like.dtype, stop=stop)
        head_modulation = self.head.modulation(class_RC)
        return SamplingState(class_RC, fused_RC, modulations, head_modulation, cache, self.history.begin())

    def step(self, state: SamplingState, scale: int, x_BlZ: Tensor | None) -> Tensor:
        """Logits (R, l, V) of one scale.

        Args:
            state: from `begin`; steps must come in the order of the scales.
            scale: its index.
            x_BlZ: input of the scale for B images (R is a multiple of B), None for the first scale.
        """
        return self.head.classify(self.step_features(state, scale, x_BlZ))

    def step_features(self, state: SamplingState, scale: int, x_BlZ: Tensor | None) -> Tensor:
        """`step` before its last product, (R, l, C): logits can then be made of some rows at a time.

        Rows do not see each other, so a scale of many tokens runs `TOKENS_AT_ONCE` of them at a time.
        """
        x_RlC = _to_compute_dtype(self.step_input(state, scale, x_BlZ))
        at_once = min(len(x_RlC), max(1, TOKENS_AT_ONCE // x_RlC.shape[1]))
        starts = range(0, len(x_RlC), at_once)
        # the cache moves on only after the last chunk: until then every one adds its rows at the same tokens
        run, done = self.replay_rows or self.run_rows, []
        equal = self.equal_rows and not state.cache.forgets(scale)
        for start in starts:
            # where all must be equally many, a last, smaller chunk runs some rows before it again
            first = min(start, len(x_RlC) - at_once) if equal else start
            rows = slice(first, start + at_once)
            done.append(run(state.rows(rows), scale, x_RlC[rows])[start - first :])
        state.cache.advance(scale)
        return done[0] if len(done) == 1 else torch.cat(done)

    def step_input(self, state: SamplingState, scale: int, x_BlZ: Tensor | None) -> Tensor:
        """What enters the blocks at one scale, (R, l, C): words with their history, or the class, and positions."""
        with exact_float32(state.class_RC.device):
            if x_BlZ is None:
                assert scale == 0, "only the first scale has no input"
                x_RlC = state.class_RC[:, None].expand(-1, self.pyramid.first_tokens, -1)
            else:
                words_BlC = self.word_embedding(x_BlZ.to(self.word_embedding.weight.dtype))
                x_RlC = self.history.step(words_BlC, state.fused_class_RC, state.history)
            return x_RlC + self.positions(range(scale, scale + 1))

    def catch_up(self, state: SamplingState, entered: Sequence[Tensor | None]) -> None:
        """Take in the first scales, which another model has drawn: the history does, and where keys are read across
        scales one pass over all of them fills the cache.

        Args:
            state: from `begin`, before any step.
            entered: what `step` would have been given at each of these scales.
        """
        inputs = [_to_compute_dtype(self.step_input(state, scale, x_BlZ)) for scale, x_BlZ in enumerate(entered)]
        if not self.backend.plan.crosses_scales:
            return
        scales, x_RlC = range(len(entered)), torch.cat(inputs, dim=1)
        for part in torch.arange(len(x_RlC)).split(max(1, TOKENS_AT_ONCE // x_RlC.shape[1])):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            of_rows, x_rlC = state.rows(rows), x_RlC[rows]
            layers = zip(self._blocks, of_rows.modulations, of_rows.cache.layers, strict=True)
            for block, modulation, cache in layers:
                x_rlC = block(x_rlC, modulation, scales, cache.filled_by(scales))
        state.cache.fill(scales)

    def run_rows(self, rows: SamplingState, scale: int, x_RlC: Tensor) -> Tensor:
        """The blocks and the head's norm at one scale, of some rows of `step_features`."""
        for block, modulation, cache in zip(self._blocks, rows.modulations, rows.cache.layers, strict=True):
            x_RlC = block(x_RlC, modulation, range(scale, scale + 1), cache)
        return self.head.features(x_RlC, rows.head_modulation)

    def _modulations(self, class_BC: Tensor) -> list[Tensor]:
        condition = self.condition(class_BC)
        return [block.modulation(condition) for block in self._blocks]

    def _check_labels(self, label_B: Tensor, images: int) -> None:
        if tuple(label_B.shape) != (images,):
            raise UserError(f"labels of shape {tuple(label_B.shape)}: {images} teacher inputs need ({images},)")
        if label_B.is_meta or (self.training and runs_behind(label_B.device)) or not images:
            return
        for label in (int(label_B.min()), int(label_B.max())):
            if not 0 <= label <= self.num_classes:
                raise UserError(
                    f"label {label}: the model knows classes 0 to {self.num_classes - 1} "
                    f"(and {self.num_classes} for no class)"
                )


def _to_compute_dtype(x: Tensor) -> Tensor:
    """The residual stream runs in the precision of the matrix products, as in the references."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# Initialization as published (`init_weights` of VAR's models/var.py and Markov-VAR's models/markovvar.py). A module may
# bring methods, as timm's layers do; one that brings none keeps the default:
# - ``init_weights(std)`` draws the parameters that are its own, not those of its submodules;
# - ``scale_weights(depth, gamma_init)`` puts factors on what has been drawn, its submodules' included;
# - ``no_weight_decay()`` names parameters, its own or its submodules', that an optimizer must not let decay.
@torch.no_grad()
def init_weights(model: nn.Module, *, width: int, depth: int, gamma_init: float) -> None:
    """Initialize a transformer in place. By default weights are drawn with the base deviation and biases are zero.

    Args:
        model: everything, the blocks and the head included.
        width: C; the base deviation is sqrt(1 / 3C).
        depth: number of blocks; outputs into the residual stream are divided by sqrt(2 depth).
        gamma_init: factor on the AdaLN rows that gate the branches (1e-3 at d16 to 5e-6 at d36).
    """
    std = math.sqrt(1 / width / 3)
    # what a seed means depends on the order of the draws: a module's own parameters come before its submodules'
    for module in model.modules():
        if draw := getattr(module, "init_weights", None):
            draw(std)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    # only now: what a module scales, its submodules have drawn after it
    for module in model.modules():
        if scale := getattr(module, "scale_weights", None):
            scale(depth, gamma_init)


def without_decay(model: nn.Module) -> set[str]:
    """Names, as in `named_parameters`, of the parameters that modules want left out of weight decay."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


AXES = {"attention": AttentionStrategy, "history": History, "blocks": BlockDesign}
"""What a transformer's `config` describes by a class and its arguments."""


def axes_of(config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a transformer's `config`: plain values, and an object on each axis."""
    return {**config, **{name: axis.from_config(config[name]) for name, axis in AXES.items()}}
