"""The published code beside ours: a user's own clones of VAR, MVAR and Markov-VAR, imported and run as they are.

Nothing of them is copied here. What a clone imports and this environment lacks is replaced for the length of the
import by a stand-in (`STAND_INS`) that does the same in plain torch: hub mixins and unused imports by empty names,
einops' one pattern, NATTEN's `na2d` and flash-attn's packed call by our own neighborhood mask and torch's attention.
A stand-in is used only where the package is missing.

B images, R rows, L tokens, Z code dim, V vocabulary, H heads, D head dim, hw latent map.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.attention import AdjacentAttention
from mvar_lightning.attention.backends import natten_has_kernels
from mvar_lightning.attention.strategies import neighborhood_mask
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid


@dataclass(frozen=True)
class Clone:
    """Where a reference keeps what we call."""

    folder: str
    builder: str
    sampler: str
    model_file: str


CLONES = {
    "var": Clone("", "build_vae_var", "autoregressive_infer_cfg", "models/var.py"),
    "mvar": Clone("", "build_vae_mvar", "autoregressive_infer", "models/mvar.py"),
    "markov_var": Clone("src", "build_vae_markovvar", "markov_cache_infer_cfg", "models/markovvar.py"),
}

OWN_MODULES = ("models", "dist", "utils")
"""Top-level names that the three clones share: each import starts without them and leaves none behind."""


class Reference:
    """One published model and its tokenizer, with random weights.

    Args:
        architecture: ``var``, ``mvar`` or ``markov_var``.
        path: the clone.
        depth: d.
        pyramid: the scales.
        device: where it runs.
        adjacent_mask: train with the block-diagonal mask of MVAR and Markov-VAR instead of the model's own.

    Raises:
        UserError: the path is no clone of that reference.
    """

    def __init__(
        self,
        architecture: str,
        path: str | Path,
        depth: int,
        pyramid: ScalePyramid,
        device: torch.device,
        *,
        adjacent_mask: bool = False,
    ) -> None:
        self.architecture, self.pyramid, self.device = architecture, pyramid, device
        self._clone = CLONES[architecture]
        root = Path(path) / self._clone.folder
        if not (root / self._clone.model_file).is_file():
            raise UserError(
                f"{path}: no clone of {architecture} ({self._clone.folder or '.'}/{self._clone.model_file})"
            )
        with _importing_from(root) as models, _keeping_initializers():
            build = getattr(models, self._clone.builder)
            # gates of 0.5 instead of 1e-5: with random weights, blocks that count
            tokenizer, model = build(
                device=device, patch_nums=pyramid.sides, depth=depth, attn_l2_norm=True, init_adaln_gamma=0.5
            )
        self.tokenizer: Any = tokenizer.eval()
        self.model: Any = model.eval()
        self._prepare(adjacent_mask)

    def _prepare(self, adjacent_mask: bool) -> None:
        self.model.prog_si = -1  # Markov-VAR's `forward` reads it and nothing sets it
        # the builders switch the layers' own initialization off
        for name, parameter in self.tokenizer.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        if adjacent_mask:
            visible = AdjacentAttention().mask(self.pyramid).to(self.device)
            self.model.attn_bias_for_masking = torch.where(visible, 0.0, -torch.inf)[None, None]

    def state(self) -> dict[str, Tensor]:
        """The transformer's weights under the published names."""
        state: dict[str, Tensor] = self.model.state_dict()
        return state

    def tokenizer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.tokenizer.state_dict()
        return state

    @torch.no_grad()
    def sample(self, label_B: Tensor, *, cfg: float, top_k: int, top_p: float, seed: int = 0) -> Tensor:
        """f_hat (B, Z, h, w) of a sampling run without its decoder."""
        captured: list[Tensor] = []

        def keep(f_hat_BZhw: Tensor) -> Tensor:
            captured.append(f_hat_BZhw.clone())
            return f_hat_BZhw

        settings = {"label_B": label_B, "g_seed": seed, "cfg": cfg, "top_k": top_k, "top_p": top_p}
        with _cuda_calls_allowed(), _replaced(self.tokenizer, "fhat_to_img", keep):
            result: Tensor = getattr(self.model, self._clone.sampler)(B=len(label_B), **settings)
        return captured[0] if captured else result  # MVAR's sampler leaves decoding to its caller

    @torch.no_grad()
    def decode(self, f_hat_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]."""
        image: Tensor = self.tokenizer.fhat_to_img(f_hat_BZhw)
        return image

    def logits(self, x_BLZ: Tensor, label_B: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V), with the published mask of the whole pyramid."""
        whole: dict[str, Any] = {"x_BlCv_wo_first_l": x_BLZ, "L_bg": 0, "L_ed": self.pyramid.num_tokens}
        arguments = whole if self.architecture == "mvar" else {"x_BLCv_wo_first_l": x_BLZ}
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it uses a deprecated autocast
            logits: Tensor = self.model(label_B=label_B, **arguments)
        return logits


@contextlib.contextmanager
def _importing_from(root: Path) -> Iterator[types.ModuleType]:
    """The clone's package ``models``, imported without leaving its names or stand-ins in this process."""
    mine = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OWN_MODULES}
    stand_ins = {name: make() for name, make in STAND_INS.items() if _missing(name)}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(root))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the modules and builders print
            models = importlib.import_module("models")
            if "flash_attn" in stand_ins and (pools := sys.modules.get("models.basic_markovvar")) is not None:
                pools.__dict__["torch"] = _Float32Torch()
            yield models
    finally:
        sys.path.remove(str(root))
        for name in [*stand_ins, *[n for n in sys.modules if n.split(".")[0] in OWN_MODULES]]:
            sys.modules.pop(name, None)
        sys.modules.update(mine)


def _missing(name: str) -> bool:
    # without CUDA kernels natten runs on uncompiled FlexAttention, which would make the reference needlessly slow
    return not natten_has_kernels() if name == "natten" else importlib.util.find_spec(name) is None


@contextlib.contextmanager
def _keeping_initializers() -> Iterator[None]:
    """The builders replace `reset_parameters` of torch's layers for the whole process; undo that."""
    layers = (
        nn.Linear,
        nn.LayerNorm,
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        nn.Conv1d,
        nn.Conv2d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
    )
    own = {layer: vars(layer).get("reset_parameters") for layer in layers}
    try:
        yield
    finally:
        for layer, method in own.items():
            if method is not None:
                setattr(layer, "reset_parameters", method)  # noqa: B010 - a method of torch's own class
            elif "reset_parameters" in vars(layer):
                delattr(layer, "reset_parameters")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object, replaced for the length of a block."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _cuda_calls_allowed() -> Iterator[None]:
    """Markov-VAR's sampler synchronizes CUDA at every scale; without CUDA that becomes nothing."""
    if torch.cuda.is_available():
        yield
        return
    with _replaced(torch.cuda, "synchronize", lambda *_: None):
        yield


class _Float32Torch:
    """``torch`` as Markov-VAR's blocks see it where flash-attn is missing: its pool need not be rounded to bf16."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    return module


def _rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The two patterns of MVAR's neighborhood attention."""
    if pattern.startswith("b h (h1 w1) c ->"):
        return x.transpose(1, 2).unflatten(1, (sizes["h1"], sizes["w1"]))
    return x.flatten(3).flatten(1, 2)


@lru_cache(maxsize=8)
def _window(side: int, kernel_size: int, device: torch.device) -> Tensor:
    return neighborhood_mask(side, kernel_size).to(device)


def _na2d(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, scale: float) -> Tensor:
    """NATTEN's call, (B, h, w, H, D), as torch's attention with a window mask."""
    del dilation  # always 1
    grid = q.shape[1:3]
    mask = _window(grid[0], kernel_size, q.device)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, grid)


def _flash_varlen_kvpacked(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
) -> Tensor:
    """flash-attn's packed call for sequences of one length: q (B, H, D), kv (B S, 2, H, D) -> (B, H, D)."""
    del cu_seqlens_q, max_seqlen_q, dropout_p
    batch = len(cu_seqlens_k) - 1
    k_BHSD, v_BHSD = kv.unflatten(0, (batch, max_seqlen_k)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q[:, :, None], k_BHSD, v_BHSD, scale=softmax_scale)[:, :, 0]


STAND_INS = {
    "huggingface_hub": lambda: _module("huggingface_hub", PyTorchModelHubMixin=type("PyTorchModelHubMixin", (), {})),
    "requests": lambda: _module("requests", head=None),
    "turtle": lambda: _module("turtle", forward=None),
    "sympy": lambda: _module("sympy", Mod=None),
    "einops": lambda: _module("einops", rearrange=_rearrange, repeat=None),
    "natten": lambda: _module("natten", na2d=_na2d),
    "flash_attn": lambda: _module(
        "flash_attn", flash_attn_func=None, flash_attn_varlen_kvpacked_func=_flash_varlen_kvpacked
    ),
}
