#!/usr/bin/env bash
# Expected: ONNX's Resize with `pytorch_half_pixel`, the mode named after PyTorch, gives for one pixel what PyTorch's
#   interpolate (align_corners=False) gives: the middle of the map; and onnxruntime agrees with ONNX's reference.
# Happens: for one pixel the mode takes the corner. A 4 x 4 map of 0 to 15 becomes 0 instead of 7.5. With bicubic
#   weights the two runtimes differ, too: onnxruntime takes the place 0 of the operator's text, the reference evaluator
#   -0.5. Plain `half_pixel` gives PyTorch's 7.5 in both. For two pixels the two modes are one.
# Version: onnx 1.23.2, onnxruntime 1.32.0 (CPU). PyTorch 2.13.0, not installed by this script, gave 7.5 for bilinear
#   and bicubic weights.
# Source: onnx issues 4275 and 4276; pytorch issues 79361 and 183523 (its exporter wrote this mode)
# Why it matters: the first scale of a next-scale model is 1 x 1. An exported resize to it is wrong in all of its pixels
#   while the other scales are right, and a check against the reference evaluator cannot tell by how much.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

print(*(f"{name} {version(name)}" for name in ("onnx", "onnxruntime", "numpy")))
x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)


def both(weights, places, side):
    """onnxruntime's map and the reference evaluator's."""
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode=weights, cubic_coeff_a=-0.75,
                            coordinate_transformation_mode=places)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, side, side])],
        [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, side, side])])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 19)])
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [run(None, {"x": x})[0].ravel() for run in (session.run, ReferenceEvaluator(model).run)]


failed = False


def check(what, holds):
    global failed
    failed |= not holds
    print("as found:" if holds else "CHANGED: ", what)


TORCH = 7.5
for weights in ("linear", "cubic"):
    plain, plain_ref = both(weights, "half_pixel", 1)
    named, named_ref = both(weights, "pytorch_half_pixel", 1)
    check(f"{weights}, half_pixel: {plain} and {plain_ref}", np.allclose([plain, plain_ref], TORCH, atol=1e-4))
    check(f"{weights}, pytorch_half_pixel, onnxruntime: {named}", np.allclose(named, 0))
    off = -1.0 if weights == "cubic" else 0.0
    check(f"{weights}, pytorch_half_pixel, reference: {named_ref}", (named_ref[0] < -0.1) == (off < 0))
    two = [both(weights, places, 2)[0] for places in ("half_pixel", "pytorch_half_pixel")]
    check(f"{weights}, 2 x 2: both modes {two[0]}", np.allclose(*two))
raise SystemExit(failed)
EOF
