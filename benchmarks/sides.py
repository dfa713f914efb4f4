"""The two sides of the models' benchmark: ours and the published code, with the same random weights.

B images, L tokens, Z code dim, V vocabulary, hw latent map.
"""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.references import Reference
from mvar_lightning.attention import AdjacentAttention, AttentionPlan, FullAttention, SpatialAttention
from mvar_lightning.checkpoints import import_official
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid
from mvar_lightning.sampling import LinearGuidance, SamplingSettings, sample_pyramid
from mvar_lightning.sampling.draws import ImageNoise
from mvar_lightning.sampling.sampler import decode_in_chunks
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.training.optimizers import parameter_groups
from mvar_lightning.training.scale_groups import AUTO_SHARE, groups_of_share, loss_of_groups
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, NoHistory, SlidingWindowHistory, VARBlocks
from mvar_lightning.transformer.acceleration import compile_blocks, record_scales, weights_in_bf16

CFG, TOP_K, TOP_P = 1.5, 900, 0.96
CLIP = 2.0
"""The recipes' (and VAR's) limit of the gradient's norm."""

OURS_ALONE = ("step",)
"""Parts that no reference runs: its step is in its trainer, with data, logging and schedule."""

TRAINING = {"train", "groups", "step"}
SMALL = ScalePyramid([1, 2, 4])
SMALL_TOKENIZER: dict[str, Any] = dict(channels=16, channel_multipliers=[1, 2], norm_groups=4)
AXES: dict[str, Callable[[], dict[str, Any]]] = {
    "var": lambda: dict(attention=FullAttention(), history=NoHistory(), blocks=VARBlocks()),
    "mvar": lambda: dict(attention=SpatialAttention(7, 2), history=NoHistory(), blocks=VARBlocks()),
    "markov_var": lambda: dict(
        attention=AdjacentAttention(),
        history=SlidingWindowHistory(3, conditional_class_when_guided=True),
        blocks=LlamaBlocks(),
    ),
}


@dataclass(frozen=True)
class Case:
    """One model to measure.

    Attributes:
        precision: ``32`` or ``bf16``: autocast; in sampling our weights are bf16, as `mvar sample` keeps them.
        repo: the reference's clone, or None.
        compiled: compile our blocks.
        graphs: sample from CUDA graphs of the scales, where the strategy keeps no cache.
        parts: what is measured (`Side.run`); ``groups`` is for strategies that allow it.
        small: a few tokens and a small tokenizer, to show that it runs.
    """

    architecture: str
    depth: int
    image_size: int
    batch: int
    device: str
    precision: str = "32"
    repo: str | None = None
    repeats: int = 5
    threads: int = 0
    compiled: bool = False
    graphs: bool = False
    parts: tuple[str, ...] = field(default=("sample", "decode", "train"))
    small: bool = False

    @property
    def pyramid(self) -> ScalePyramid:
        return SMALL if self.small else ScalePyramid(PUBLISHED_SIDES[self.image_size])

    @property
    def plan(self) -> AttentionPlan:
        plan: AttentionPlan = AXES[self.architecture]()["attention"].plan(self.pyramid)
        return plan

    @property
    def trained_plan(self) -> AttentionPlan:
        """What the parts ``train`` and ``groups`` run: for MVAR all scales with adjacent attention."""
        return AdjacentAttention().plan(self.pyramid) if self.architecture == "mvar" else self.plan

    def sides_of(self, part: str) -> tuple[str, ...]:
        return ("ours",) if self.repo is None or part in OURS_ALONE else ("ours", "reference")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        enabled = self.precision == "bf16"
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=enabled)


class Side(ABC):
    """What is measured, part by part; each call does the whole part."""

    transformer: nn.Module

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        pyramid, device = case.pyramid, torch.device(case.device)
        self.label_B = torch.randint(1000, (case.batch,), generator=generator).to(device)
        self.idx_BL = torch.randint(4096, (case.batch, pyramid.num_tokens), generator=generator).to(device)
        rest = pyramid.num_tokens - pyramid.first_tokens
        self.x_BLZ = torch.randn(case.batch, rest, 32, generator=generator).to(device)
        self.f_hat_BZhw = torch.randn(case.batch, 32, *pyramid.last_shape, generator=generator).to(device)

    def run(self, part: str) -> Tensor:
        """A part or a check by its method's name; gives its result, for comparison."""
        with self.case.autocast():
            result: Tensor = getattr(self, part)()
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        return result

    def keep_for(self, part: str) -> None:
        """Let go of what a part does not use, before its memory is measured: decoding needs no transformer."""
        if part == "decode":
            self.transformer.to("meta")

    @abstractmethod
    def sample(self) -> Tensor:
        """Tokens of all scales, guided, filtered as published; no decoding. The quantized latent."""

    @abstractmethod
    def greedy(self) -> Tensor:
        """The same with the most likely tokens: both sides must agree."""

    @abstractmethod
    def decode(self) -> Tensor:
        """Images of a latent."""

    @abstractmethod
    def generate(self) -> Tensor:
        """Sampling and decoding in one call: what the papers' seconds and memory are of."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Teacher-forced logits, with adjacent attention for MVAR (its reference masks so)."""

    @abstractmethod
    def loss(self) -> Tensor: ...

    def train(self) -> Tensor:
        """Forward and backward pass of a step, without the optimizer (the same call on both sides)."""
        return self._step(self.loss)

    def groups(self) -> Tensor:
        """The same in scale groups; a side that has none takes its whole step."""
        return self.train()

    def _step(self, loss_of_step: Callable[[], Tensor]) -> Tensor:
        self.transformer.train()
        self.transformer.zero_grad(set_to_none=True)
        loss = loss_of_step()
        loss.backward()
        self.transformer.eval()
        return loss.detach()


class Ours(Side):
    """This suite. Without a reference the weights are our own random ones."""

    def __init__(self, case: Case, reference: Reference | None = None) -> None:
        super().__init__(case)
        model, tokenizer = _random_pair(case) if reference is None else _imported_pair(case, reference)
        device = torch.device(case.device)
        self.tokenizer, self.transformer = tokenizer.to(device).eval(), model.to(device).eval()
        self.model = model
        # the step to compare masks all scales to adjacent, as the reference's model does for a whole pyramid; its
        # trainer's cycle runs scales 9 and 10 by themselves, with neighborhood attention
        self.trained = self._with_adjacent_attention(model) if case.architecture == "mvar" else model
        self.sampler = model
        if case.precision == "bf16" and not {"sample", "generate"}.isdisjoint(case.parts):
            trains = not TRAINING.isdisjoint(case.parts)
            self.sampler = weights_in_bf16(deepcopy(model) if trains else model)
        if case.compiled:
            for each in self._models():
                compile_blocks(each)
        if case.graphs and not case.plan.cache_tokens:
            record_scales(self.sampler)

    def _models(self) -> list[NextScaleTransformer]:
        """Each that there is, once."""
        return list({id(model): model for model in (self.model, self.trained, self.sampler)}.values())

    def keep_for(self, part: str) -> None:
        if part == "decode":
            for model in self._models():
                model.to("meta")

    def _with_adjacent_attention(self, model: NextScaleTransformer) -> NextScaleTransformer:
        with torch.device("meta"):
            twin = NextScaleTransformer.from_config(model.config, attention=AdjacentAttention())
        twin.load_state_dict(dict(model.named_parameters()), assign=True)  # the same parameters, not copies
        return twin.eval()

    def sample(self) -> Tensor:
        return self._sample(TOP_K, TOP_P)

    def greedy(self) -> Tensor:
        return self._sample(1, None)

    def unguided(self) -> Tensor:
        return self._sample(TOP_K, TOP_P, cfg=0.0)

    @torch.no_grad()
    def _sample(self, top_k: int, top_p: float | None, cfg: float = CFG) -> Tensor:
        settings = SamplingSettings(LinearGuidance(cfg), top_k, top_p)
        noise = ImageNoise(range(self.case.batch), self.case.pyramid, self.label_B.device)
        f_hat_BZhw, _ = sample_pyramid(self.sampler, self.tokenizer, self.label_B, settings, noise)
        return f_hat_BZhw

    @torch.no_grad()
    def decode(self) -> Tensor:
        return decode_in_chunks(self.tokenizer, self.f_hat_BZhw, None).mul_(2).sub_(1)

    @torch.no_grad()
    def generate(self) -> Tensor:
        return decode_in_chunks(self.tokenizer, self.sample(), None)

    @torch.no_grad()
    def logits(self) -> Tensor:
        logits_BLV: Tensor = self.trained(self.x_BLZ, self.label_B)
        return logits_BLV

    def loss(self) -> Tensor:
        return self._loss((range(self.case.pyramid.num_scales),))

    def groups(self) -> Tensor:
        return self._step(partial(self._loss, groups_of_share(self.case.pyramid, AUTO_SHARE)))

    def step(self) -> Tensor:
        """A whole step as `NextScaleModule` takes it from tokens, in Lightning's order: gradients of the step before
        are let go only after the forward pass. MVAR's is with its own attention, neighborhoods included."""
        model, optimizer = self.model, self.optimizer
        model.train()
        with torch.autocast(self.idx_BL.device.type, enabled=False), torch.no_grad():
            x_BLZ = self.tokenizer.teacher_input(self.idx_BL)
        every = (range(self.case.pyramid.num_scales),)
        loss, _ = loss_of_groups(model, x_BLZ, self.label_B, self.idx_BL, every)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        model.eval()
        return loss.detach()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        # a learning rate of 0 does all the work and leaves the weights to the parts that follow
        groups = parameter_groups(self.transformer)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def _loss(self, groups: tuple[range, ...]) -> Tensor:
        self.trained.train(self.transformer.training)
        return loss_of_groups(self.trained, self.x_BLZ, self.label_B, self.idx_BL, groups)[0]


class Theirs(Side):
    """The published code."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        assert case.repo is not None
        torch.manual_seed(0)
        device = torch.device(case.device)
        self.reference = Reference(case.architecture, case.repo, case.depth, case.pyramid, device)
        self.transformer = self.reference.model

    def sample(self) -> Tensor:
        return self.reference.sample(self.label_B, cfg=CFG, top_k=TOP_K, top_p=TOP_P)

    def greedy(self) -> Tensor:
        return self.reference.sample(self.label_B, cfg=CFG, top_k=1, top_p=0.0)

    def decode(self) -> Tensor:
        return self.reference.decode(self.f_hat_BZhw)

    def generate(self) -> Tensor:
        return self.reference.decode(self.sample())

    @torch.no_grad()
    def logits(self) -> Tensor:
        with _attribute(self.transformer, "cond_drop_rate", 0.0):  # it drops labels in evaluation too
            return self.reference.logits(self.x_BLZ, self.label_B)

    def loss(self) -> Tensor:
        logits_BLV = self.reference.logits(self.x_BLZ, self.label_B)
        return F.cross_entropy(logits_BLV.flatten(0, 1), self.idx_BL.flatten())


def _random_pair(case: Case) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 4096, "code_dim": 32, "num_classes": 1000, "depth": case.depth}
    sides = case.pyramid.sides
    model = NextScaleTransformer(sides, **sizes, gamma_init=0.5, **AXES[case.architecture]())
    return model, MultiScaleTokenizer(sides, **(SMALL_TOKENIZER if case.small else {}))


def _imported_pair(case: Case, reference: Reference) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    """Our model with the reference's weights, through files, as a user imports them."""
    with tempfile.TemporaryDirectory() as folder:
        model_path, tokenizer_path = Path(folder) / "model.pth", Path(folder) / "tokenizer.pth"
        torch.save(reference.state(), model_path)
        torch.save(reference.tokenizer_state(), tokenizer_path)
        return import_official(model_path, tokenizer_path, case.architecture, case.pyramid.sides)


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


SIDES: dict[str, Callable[[Case], Side]] = {"ours": partial(Ours), "reference": partial(Theirs)}
