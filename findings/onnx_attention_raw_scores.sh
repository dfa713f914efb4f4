#!/usr/bin/env bash
# Expected: for a model that ONNX's checker accepts, ONNX's reference evaluator and onnxruntime agree on the fourth
#   output of Attention, the scores. `qk_matmul_output_mode` 0, the default, is the product of Q and K as it is.
# Happens: with a softcap the reference evaluator gives capped scores in mode 0, as in mode 1; onnxruntime gives the
#   raw ones, as the text says. In mode 2 a place that a boolean mask forbids is -inf in the one and -3.4e38 in the
#   other. The attention's result Y is the same throughout.
# Version: onnx 1.23.2, onnxruntime 1.32.0 (CPU)
# Source: https://onnx.ai/onnx/operators/onnx__Attention.html; onnx pull requests 7867 and 7913, onnxruntime 28379 (the
#   order of softcap and mask was changed in both)
# Why it matters: who studies how scales attend to earlier scales takes these scores. Checked against the reference, a
#   right export looks wrong; and isinf() finds the masked places in only one of the two.
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
q = np.array([[[[2, 0]]]], np.float32)  # one query, three keys: raw scores 4, 2, 1
k = np.array([[[[2, 0], [1, 0], [0.5, 0]]]], np.float32)
v = np.eye(3, dtype=np.float32)[None, None]
mask = np.array([[True, True, False]])
CAP = 2.0
raw = np.array([4, 2, 1], np.float32)
capped = CAP * np.tanh(raw / CAP)


def both(mode):
    feed = {"q": q, "k": k, "v": v, "mask": mask}
    node = helper.make_node("Attention", [*feed], ["y", "pk", "pv", "scores"], scale=1.0, softcap=CAP,
                            qk_matmul_output_mode=mode)
    types = {name: TensorProto.BOOL if x.dtype == bool else TensorProto.FLOAT for name, x in feed.items()}
    inputs = [helper.make_tensor_value_info(name, types[name], x.shape) for name, x in feed.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 3]) for name in ("y", "scores")]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 23)])
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [[x.ravel() for x in run(None, feed)] for run in (session.run, ReferenceEvaluator(model).run)]


failed = False
for mode in (0, 1, 2, 3):
    (y, scores), (y_ref, scores_ref) = both(mode)
    print(f"mode {mode}: onnxruntime {scores}, reference {scores_ref}, same Y {np.allclose(y, y_ref)}")
    as_found = np.allclose(y, y_ref) and {
        0: lambda: np.allclose(scores, raw) and np.allclose(scores_ref, capped),
        1: lambda: np.allclose(scores, capped) and np.allclose(scores_ref, capped),
        2: lambda: scores[2] == np.finfo(np.float32).min and scores_ref[2] == -np.inf,
        3: lambda: np.allclose(scores, scores_ref),
    }[mode]()
    if not as_found:
        failed = True
        print("CHANGED")
raise SystemExit(failed)
EOF
