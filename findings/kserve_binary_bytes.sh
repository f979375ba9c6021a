#!/usr/bin/env bash
# kserve 0.21.0: the client of the Open Inference Protocol cannot read a binary BYTES output that is not
# UTF-8, although BYTES is the type for arbitrary bytes, such as an encoded image.
#
#     InferResponse.from_bytes(JSON head + binary data, length of the head)
#         data "abc":        read, as [b'abc'] or ['abc']
#         data b"\x89PNG":   kserve.errors.InferenceError: Failed to encode ... using UTF-8
#
# The class decodes the binary data, and then encodes them as text for the JSON form of the tensor.
# tritonclient 2.60 reads the same bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q kserve==0.21.0 'tritonclient[http]==2.60.0'
"$folder/venv/bin/python" - <<'PYTHON'
import json
import struct

from kserve.errors import InferenceError
from kserve.protocol.infer_type import InferResponse
from tritonclient.http import InferResult


def response(item: bytes) -> tuple[bytes, int]:
    raw = struct.pack("<I", len(item)) + item
    output = {
        "name": "IMAGE",
        "datatype": "BYTES",
        "shape": [1],
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"model_name": "m", "outputs": [output]}).encode()
    return head + raw, len(head)


print("text:", InferResponse.from_bytes(*response(b"abc")).outputs[0].data)
image = b"\x89PNG"
body, length = response(image)
found = InferResult.from_response_body(body, header_length=length).as_numpy("IMAGE")[0]
print("tritonclient:", found)
assert found == image
try:
    InferResponse.from_bytes(body, length)
except InferenceError as error:
    print("kserve:", error)
    assert "UTF-8" in str(error)
else:
    raise SystemExit("kserve reads it now")
PYTHON
echo "as described"
