#!/usr/bin/env bash
# ONNX Runtime 1.32: a valid model with a LeakyRelu between a DequantizeLinear and a QuantizeLinear that
# have a scale for each channel (`axis=1`) computes what ONNX defines at the optimisation levels DISABLE_ALL
# and BASIC, and no session can be made of it at EXTENDED and ALL, the default. The optimiser fuses the
# three nodes into QLinearLeakyRelu, which knows a single scale. `onnx.checker` and ONNX's reference
# evaluator accept the model. Scales per channel of activations are rare: `quantize_static` writes them
# for weights only.
#
# Two channels with the scales 1 and 0.01, and the values 50, -50 and 0.5, -0.5:
#
#     reference, DISABLE_ALL, BASIC: 50, -10, 0.5, -0.1
#     EXTENDED, ALL: Fail, "Exception during initialization: … qlinear_lookup_table.cc …"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

model = onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 20]>
g (float[1, 2, 2] x) => (float[1, 2, 2] y)
<float[2] scale = {1.0, 0.01}, uint8[2] zero = {128, 128}> {
    a = QuantizeLinear<axis = 1>(x, scale, zero)
    b = DequantizeLinear<axis = 1>(a, scale, zero)
    c = LeakyRelu<alpha = 0.2>(b)
    d = QuantizeLinear<axis = 1>(c, scale, zero)
    y = DequantizeLinear<axis = 1>(d, scale, zero)
}""")
onnx.checker.check_model(model, full_check=True)
inputs = {"x": np.array([[[50, -50], [0.5, -0.5]]], np.float32)}
expected = np.array([[[50, -10], [0.5, -0.1]]], np.float32)
assert np.allclose(ReferenceEvaluator(model).run(None, inputs)[0], expected)
for level in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        found = np.allclose(session.run(None, inputs)[0], expected)
    except Exception as error:
        found = "qlinear_lookup_table.cc" in str(error) and "refused"
    print(f"{level}: {found}")
    assert found == ("refused" if level in ("ENABLE_EXTENDED", "ENABLE_ALL") else True)
PYTHON
echo "as described"
