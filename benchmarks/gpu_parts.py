"""The parts of `python -m benchmarks gpu`: each measures one thing and says what was to be expected.

A part takes where its results go, the device, and whether all is small (no GPU).
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.flops import MIB
from benchmarks.gpu import Results
from benchmarks.measure import counted
from benchmarks.published import published_for
from benchmarks.sides import SMALL, SMALL_TOKENIZER, Case, Ours
from mvar_lightning.attention import AdjacentAttention, FullAttention, SpatialAttention
from mvar_lightning.attention.backends import DenseBackend, choose_backend
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid
from mvar_lightning.sampling import generate
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import exact_float32, peak_memory_bytes
from mvar_lightning.training.scale_groups import KeptForBackward, kept_of_token
from mvar_lightning.transformer.acceleration import compile_blocks, record_scales


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int = 5, warm_up: int = 3) -> float:
    """Median of so many runs after a warm-up; on a CPU one run shows that it runs."""
    repeats, warm_up = (repeats, warm_up) if device.type == "cuda" else (1, 0)
    times = []
    for repeat in range(warm_up + repeats):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def case_of(architecture: str, depth: int, batch: int, device: torch.device, small: bool, **more: Any) -> Case:
    depth, batch = (2, 2) if small else (depth, batch)
    return Case(architecture, depth, 256, batch, device.type, "32" if small else "bf16", small=small, **more)


def free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attention(results: Results, device: torch.device, small: bool) -> None:
    """Output and gradients of every backend in bf16 against float64, with and without cuDNN, and seconds."""
    pyramid = SMALL if small else ScalePyramid(PUBLISHED_SIDES[256])
    shape = (1 if small else 2, 2 if small else 16, pyramid.num_tokens, 64)
    q, k, v, weight = (torch.randn(shape, device=device, dtype=torch.float64) for _ in range(4))
    strategies = FullAttention(), AdjacentAttention(), SpatialAttention(3 if small else 7, 2)
    for strategy in strategies:
        exact = _with_gradients(DenseBackend(strategy, pyramid), q, k, v, weight)
        for name in ("per_scale", "flex", "dense", "natten"):
            try:
                backend = choose_backend(name, strategy, pyramid, head_dim=64)
            except UserError as error:
                print(f"{name}, {strategy!r}: {error}")
                continue
            halves = [each.bfloat16() for each in (q, k, v, weight)]
            cudnn = (True, False) if device.type == "cuda" and name == "per_scale" else (True,)
            for on in cudnn:
                kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
                with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *kernels] if on else kernels, set_priority=True):
                    ours = _with_gradients(backend, *halves)
                    label = f"{strategy!r}, {name}" + ("" if len(cudnn) == 1 else f", cuDNN {'on' if on else 'off'}")
                    for tensor, found, right in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
                        apart = float((found.double() - right).norm() / right.norm())
                        results.add(f"{label}: {tensor}", apart, most=3e-2, goal="1e-2")
                    time_of = seconds_of(partial(_with_gradients, backend, *halves), device)
                    results.add(f"{label}: forward and backward", time_of * 1e3, "ms")


def _with_gradients(backend: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    backend.prepare(q.device)
    out = backend(*leaves, range(backend.pyramid.num_scales), 0.125)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)


def _tokenizer(small: bool) -> MultiScaleTokenizer:
    sizes = SMALL_TOKENIZER if small else {}
    tokenizer = MultiScaleTokenizer(SMALL.sides if small else PUBLISHED_SIDES[256], **sizes)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer.eval()


def tokens(results: Results, device: torch.device, small: bool) -> None:
    """Shares of tokens that differ between the CPU and a GPU, and host synchronizations of sampling and a step."""
    tokenizer = _tokenizer(small)
    image_B3HW = torch.rand(2 if small else 8, *tokenizer.image_shape) * 2 - 1
    with torch.no_grad():
        right_BL = tokenizer.encode(image_B3HW)
        tokenizer.to(device)
        there = image_B3HW.to(device)
        default = (tokenizer.encode(there).cpu() != right_BL).float().mean()
        with exact_float32(device):
            exact = (tokenizer.encode(there).cpu() != right_BL).float().mean()
    results.add("tokens apart from the CPU's, IEEE", 100 * float(exact), "%", most=0.1)
    results.add("tokens apart from the CPU's, default (TF32)", 100 * float(default), "%", most=3, goal="1 to 3")
    side = Ours(case_of("markov_var", 16, 4, device, small, parts=("step", "sample")))
    for part, most in WAITS.items():
        side.run(part)
        waits = _synchronizations(partial(side.run, part), device)
        where = "; ".join(waits)
        results.add(f"host synchronizations of a {part}", len(waits), most=None if small else most, where=where)


WAITS = {"step": 0, "sample": 2}
"""Sampling moves its random numbers to the device before the first scale, and after the last asks whether all logits
were numbers; the scales themselves wait for nothing."""


def _synchronizations(work: Callable[[], Any], device: torch.device) -> list[str]:
    """Where the host waits for the device: as torch tells; on a CPU nowhere."""
    if device.type != "cuda":
        work()
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]


def graphs(results: Results, device: torch.device, small: bool) -> None:
    """Tokens plain, recorded, compiled, and both; and again after a second recording was dropped."""
    side = Ours(case_of("markov_var", 16, 4, device, small, parts=("sample",)))
    model, tokenizer = side.sampler, side.tokenizer

    def drawn() -> Tensor:
        with side.case.autocast():
            labels = side.label_B.tolist()
            return generate(model, tokenizer, labels, cfg=1.5, top_k=900, top_p=0.96, seeds=range(len(labels)))[1]

    plain = drawn()
    if device.type == "cuda":
        record_scales(model)
        results.add("graphs against plain, tokens apart", float((drawn() != plain).float().mean()), most=0.0)
        other = Ours(case_of("markov_var", 12, 4, device, small, parts=("sample",), graphs=True))
        other.run("sample")
        del other
        free(device)
        apart = max(float((drawn() != plain).float().mean()) for _ in range(20))
        results.add("20 replays after another recording went, tokens apart", apart, most=0.0)
        model.replay_rows = None
    compile_blocks(model, **({"backend": "eager"} if small else {}))
    compiled = drawn()
    results.add("compiled against plain, tokens apart", float((compiled != plain).float().mean()), most=0.5)
    if device.type == "cuda":
        record_scales(model)
        results.add("graphs of compiled against compiled", float((drawn() != compiled).float().mean()), most=0.0)


def step(results: Results, device: torch.device, small: bool) -> None:
    """A training step: seconds, share of the peak, and what a token keeps."""
    peak = _peak_tflops(device, small)
    results.add("peak of bf16 products in this call", peak, "TFLOP/s")
    seconds, memory, on_gpu = {}, {}, device.type == "cuda"
    for batch, architecture in product((32,) if small else (32, 16), ("var", "markov_var")):
        for compiled in (True, False):
            free(device)
            case = case_of(architecture, 16, batch, device, small, parts=("step",), compiled=compiled and not small)
            side = Ours(case)
            how = f"{architecture}-d{case.depth}, batch {case.batch}, {'compiled' if compiled else 'eager'}"
            run = architecture, compiled, batch
            seconds[run], memory[run] = seconds_of(partial(side.run, "step"), device), peak_memory_bytes(device)
            goal = compiled and batch == 32
            bound: dict[str, Any] = {"most": 0.14, "goal": "0.09"} if goal and on_gpu else {}
            results.add(f"{how}: a step", seconds[run], "s", **bound)
            share = 100 * 3 * counted(case)["forward_tflop"] * case.batch / seconds[run] / peak
            results.add(f"{how}: of the peak", share, "%", goal="40" if goal else "")
            if not compiled and batch == 32:
                _kept(results, how, side, device)
                ratio = seconds[run] / seconds[architecture, True, 32]
                results.add(f"{architecture}: eager / compiled", ratio, "x", least=1.3 if on_gpu else None)
            if batch == 16:
                apart = (memory[architecture, compiled, 32] - memory[run]) / 16
                slope = apart / (case.pyramid.num_tokens * 64 * case.depth**2)
                bound = {"most": 50.0, "goal": "35 to 50"} if compiled else {}
                results.add(f"{how}: peak memory, slope to 32", slope, "B/token/channel/layer", **bound)
            del side


def _peak_tflops(device: torch.device, small: bool) -> float:
    size = 256 if small else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device) / 1e12


def _kept(results: Results, how: str, side: Ours, device: torch.device) -> None:
    """Bytes that a token keeps: measured on two batches, and what `kept_of_token` says."""
    model, case = side.model.train(), side.case
    kept = []
    for images in (1, 2):
        halved = replace(case, batch=images)
        own = side.label_B[:images], side.idx_BL[:images]
        with halved.autocast(), KeptForBackward(model) as held:
            inputs = model.inputs(side.x_BLZ[:images], own[0])
            model.features(inputs, range(model.pyramid.num_scales))
        kept.append(held.peak)
    tokens_of_image, channels = model.pyramid.num_tokens, model.width * model.depth
    slope = (kept[1] - kept[0]) / tokens_of_image
    # bounds and what was emulated: tests/transformer/test_saved_bytes.py; LLaMA's block keeps its gate, too
    bound = {"most": 50.0 if case.architecture == "var" else 62.0} if device.type == "cuda" else {}
    results.add(f"{how}: kept, slope of two batches", slope / channels, "B/token/channel/layer", **bound)
    # with autocast on; float32 keeps twice as much
    with case.autocast():
        said = kept_of_token(model)
    results.add(f"{how}: kept_of_token / slope", said / slope, "x", least=0.9, most=1.1)


def sample(results: Results, device: torch.device, small: bool) -> None:
    """Guided sampling with decoding beside the papers' figures, and the decoder in four forms."""
    for architecture in ("markov_var", "var"):
        _generate(results, architecture, device, small, compiled=False)
    _decode(results, device, small, compiled=False)
    if not small:  # what takes long to compile comes last
        for architecture in ("markov_var", "var"):
            _generate(results, architecture, device, small, compiled=True)
        _decode(results, device, small, compiled=True)


GOALS = {"markov_var": ("0.203", "3.2"), "var": ("0.25", "8")}
"""Seconds and GB of d24 at 256 pixels, batch 25, guided (docs/speed.md)."""


def _generate(results: Results, architecture: str, device: torch.device, small: bool, compiled: bool) -> None:
    free(device)
    case = case_of(architecture, 24, 25, device, small, parts=("generate",), compiled=compiled, graphs=not small)
    side, on_gpu = Ours(case), device.type == "cuda"
    side.run("generate")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    each = seconds_of(partial(side.run, "generate"), device, 5, 2)
    published = next(row for row in published_for(architecture, 24, 256) if "H200" in row.source)
    how = "compiled" if compiled else "eager"
    label = f"{architecture}-d{case.depth}, 256 px, batch {case.batch}, guided, {how}"
    beside: dict[str, Any] = {"published": f"{published.sample_decode_s} s (H200)", "goal": GOALS[architecture][0]}
    results.add(f"{label}: images", each, "s", most=published.sample_decode_s if on_gpu else None, **beside)
    if on_gpu:
        memory = published.peak_mib / 1024
        beside = {"published": f"{memory:.1f} GB (H200)", "goal": GOALS[architecture][1]}
        results.add(f"{label}: peak memory", peak_memory_bytes(device) / MIB / 1024, "GiB", most=memory, **beside)


@torch.no_grad()
def _decode(results: Results, device: torch.device, small: bool, compiled: bool) -> None:
    """The decoder in three forms, or in the compiled one."""
    free(device)
    tokenizer, twin = _tokenizer(small).to(device), _tokenizer(small).to(device)
    latent = torch.randn(2 if small else 25, 32, *tokenizer.pyramid.last_shape, device=device)
    for weight in twin.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    last = latent.to(memory_format=torch.channels_last)
    decode = torch.compile(twin.decode_latent, dynamic=False) if compiled else twin.decode_latent
    forms: dict[str, Callable[[], Tensor]] = {
        "TF32": lambda: tokenizer.decode_latent(latent),
        "bf16": lambda: _half(tokenizer.decode_latent, latent),
        "bf16, channels last": lambda: _half(decode, last),
    }
    for name, form in list(forms.items())[2 if compiled else 0 :]:
        results.add(f"decoder, {name}{', compiled' if compiled else ''}", seconds_of(form, device), "s")


def _half(decode: Callable[[Tensor], Tensor], latent: Tensor) -> Tensor:
    with torch.autocast(latent.device.type, torch.bfloat16):
        return decode(latent)


def fit(results: Results, device: torch.device, small: bool) -> None:
    """Digits: a tokenizer with a discriminator from step 0, then VAR on it in bf16-mixed, with EMA and a resume. No
    report: `mvar train` draws it of files that a run has left, on a CPU (tests/commands)."""
    from benchmarks.gpu_fit import fit_digits

    with tempfile.TemporaryDirectory() as folder:
        for what, losses in fit_digits(Path(folder), device, small):
            finite = all(loss == loss and abs(loss) != float("inf") for loss in losses)
            results.add(f"{what}: losses finite", float(finite), least=1)
            results.add(f"{what}: last loss / first", losses[-1] / losses[0], least=0, most=None if small else 1.0)


GPU_TESTS = ("training", "transformer", "data/test_data_transforms.py", "attention/test_backends.py")
"""Where the tests marked ``gpu`` are: looking through all others takes longer than these."""


def pytest(results: Results, device: torch.device, small: bool) -> None:
    """The tests that are marked ``gpu``."""
    import pytest as runner

    root = Path(__file__).parents[1]
    where = ("transformer/test_scale_graphs.py",) if small else GPU_TESTS
    # its watchdog's lock would be held for ever in a fork of a process that watches tests itself
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--rootdir", str(root)]
    status = runner.main([*options, *(str(root / "tests" / each) for each in where)], plugins=[_AsTheyCome(results)])
    results.add("status of pytest -m gpu", float(status), most=0.0)


class _AsTheyCome:
    """Each test's seconds, so that a part which is ended leaves those that it ran."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or (report.when == "call" and report.passed):
            row = {"part": self.results.part, "what": report.nodeid.rpartition("/")[2], "unit": "s"}
            self.results.write({**row, "value": round(report.duration, 2), "good": bool(report.passed)})
