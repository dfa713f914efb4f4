"""Programs for other runtimes: encode, decode and the transformer as graphs of torch.export or ONNX, weights inside.

B batch (any), C channels of an image (3 of RGB), L all tokens, V vocabulary, HW pixels.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mvar_lightning.checkpoints.classes import check_names
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, check_pair, fingerprint
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.tools.files import told, write_json, writing_folder
from mvar_lightning.transformer import NextScaleTransformer

if TYPE_CHECKING:
    from torch.export import ExportedProgram

RECORD = "programs.json"
ONNX_NEEDS = ("onnx", "onnxscript")
EXPORTABLE_BACKENDS = ("per_scale", "dense")
TAKES = {"encode": ["image"], "decode": ["tokens"], "transformer": ["tokens", "label"]}
GIVES = {"encode": "tokens", "decode": "image", "transformer": "logits"}


class _Encode(nn.Module):
    def __init__(self, tokenizer: MultiScaleTokenizer) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.quantizer = tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantizer

    def forward(self, image: Tensor) -> Tensor:
        return self.quantizer.encode(self.quant_conv(self.encoder(image.to(self.quant_conv.weight.dtype))))


class _Decode(nn.Module):
    def __init__(self, tokenizer: MultiScaleTokenizer) -> None:
        super().__init__()
        self.quantizer, self.decoder = tokenizer.quantizer, tokenizer.decoder
        self.post_quant_conv = tokenizer.post_quant_conv

    def forward(self, tokens: Tensor) -> Tensor:
        f_hat = self.quantizer.f_hat(tokens).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1).float()


class _Transformer(nn.Module):
    def __init__(self, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> None:
        super().__init__()
        self.model, self.quantizer = model, tokenizer.quantizer

    def forward(self, tokens: Tensor, label: Tensor) -> Tensor:
        torch._check(tokens.shape[0] == label.shape[0])
        inputs = self.model.unchecked_inputs(self.quantizer.teacher_input(tokens), label)
        return self.model.transform(inputs, range(self.model.pyramid.num_scales))


def programs(model: NextScaleTransformer | None, tokenizer: MultiScaleTokenizer) -> dict[str, ExportedProgram]:
    """Graphs of any batch size, from `torch.export.export`; run one by ``program.module()(...)``.

    - ``encode``: image float32 (B, C, H, W) in [-1, 1] -> tokens int64 (B, L)
    - ``decode``: tokens int64 (B, L) -> image float32 (B, C, H, W) in [-1, 1]
    - ``transformer`` (of a model): tokens int64 (B, L), label int64 (B,) -> logits float32 (B, L, V). Logits of a scale
      depend on the tokens of earlier scales alone, so later ones may be anything in range: who samples runs it once a
      scale. The label num_classes stands for "no class".

    Raises:
        UserError: model and tokenizer do not fit together, or attention on a backend that no graph can hold.
    """
    if model is not None:
        check_pair(model, tokenizer)
        if model.quantized is not None:
            raise UserError(
                f"a model in {model.quantized}: has products that no graph holds; export the one it was made of"
            )
        if model.backend.name not in EXPORTABLE_BACKENDS:
            raise UserError(f"backend {model.backend.name}: is no part of a graph; build the model with per_scale")
    device = tokenizer.quant_conv.weight.device
    tokens = tokenizer.pyramid.num_tokens
    image = torch.zeros(2, *tokenizer.image_shape, device=device)  # of 2: torch takes a batch of 1 for a constant
    idx_BL = torch.zeros(2, tokens, dtype=torch.int64, device=device)
    label_B = torch.zeros(2, dtype=torch.int64, device=device)
    wanted: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "encode": (_Encode(tokenizer), (image,)),
        "decode": (_Decode(tokenizer), (idx_BL,)),
    }
    if model is not None:
        wanted["transformer"] = _Transformer(model, tokenizer), (idx_BL, label_B)
    batch = torch.export.Dim("batch", min=1)
    found = {}
    for name, (module, inputs) in wanted.items():
        with evaluating(module), _quietly():
            module(*inputs)  # makes the tables it reads, which would be made of a tracer's stand-ins else
            found[name] = torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    return found


def export_programs(
    folder: str | Path,
    model: NextScaleTransformer | None,
    tokenizer: MultiScaleTokenizer,
    form: str = "onnx",
    class_names: Sequence[str] = (),
) -> None:
    """Write each of `programs` to a new or empty folder, and ``programs.json``, which says what goes in and out.

    Args:
        form: ``onnx`` (``NAME.onnx``, weights beside it in ``NAME.onnx.data``), or ``pt2`` (``NAME.pt2``, for
            `torch.export.load` and AOTInductor).

    Raises:
        UserError: as `programs`; a package that ONNX needs is not installed; or the folder holds something.
    """
    if form not in FORMS:
        raise UserError(f"``form`` {form!r}: unknown; choose one of {', '.join(FORMS)}")
    missing = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None] if form == "onnx" else []
    if missing:
        raise UserError(f"{' and '.join(missing)}: not installed; pip install mvar-lightning[onnx]")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not an empty folder; give a new one")
    record = _record(model, tokenizer, class_names)
    with told(folder), writing_folder(folder) as new:
        for name, program in programs(model, tokenizer).items():
            FORMS[form](program, new / f"{name}.{form}")
        write_json(new / RECORD, record)


def _record(
    model: NextScaleTransformer | None, tokenizer: MultiScaleTokenizer, class_names: Sequence[str]
) -> dict[str, Any]:
    tokens = ["batch", tokenizer.pyramid.num_tokens]
    described: dict[str, dict[str, Any]] = {
        "image": {"shape": ["batch", *tokenizer.image_shape], "type": "float32", "range": [-1, 1]},
        "tokens": {"shape": tokens, "type": "int64", "range": [0, tokenizer.vocab_size - 1]},
    }
    record = {"scales": tokenizer.config["scales"], "tokenizer_hash": fingerprint(tokenizer), "tensors": described}
    if model is not None:
        described["label"] = {"shape": ["batch"], "type": "int64", "range": [0, model.num_classes]}
        described["logits"] = {"shape": [*tokens, model.vocab_size], "type": "float32"}
        record |= {"no_class": model.num_classes, "class_names": list(check_names(class_names, model.num_classes))}
    names = [name for name in TAKES if model is not None or name != "transformer"]
    return record | {"programs": {name: {"takes": TAKES[name], "gives": GIVES[name]} for name in names}}


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    with _quietly():
        made = torch.onnx.export(
            program, input_names=TAKES[path.stem], output_names=[GIVES[path.stem]], dynamo=True, verbose=False
        )
        assert made is not None
        shape = made.model.graph.inputs[0].shape
        assert shape is not None
        made.rename_axes({str(shape[0]): "batch"})
        for node in made.model.graph.all_nodes():
            node.metadata_props.clear()  # where each comes from, with the folders of this machine
        made.save(str(path), external_data=True)


def _save_pt2(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


FORMS: dict[str, Callable[[ExportedProgram, Path], None]] = {"onnx": _save_onnx, "pt2": _save_pt2}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporters warn of themselves: packages of others that are not there, their own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
