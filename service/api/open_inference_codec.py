"""Requests and answers of the Open Inference Protocol, version 2, as bytes.

The protocol is KServe's (https://github.com/kserve/open-inference-protocol) with the extension for
binary tensors that Triton's clients use: after a JSON head, whose length is in a header, tensors
follow as they lie in memory.
"""

import base64
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.encoding.images import single_pngs
from service.errors import Problem, wrong_value, wrong_values
from service.generation import GeneratedImages, GenerationRequest, Steps
from service.settings import MAX_IMAGES, MAX_TIMEOUT_MS

LENGTH_HEADER = "Inference-Header-Content-Length"
MAX_BODY_BYTES = 1 << 20  # of a body that was compressed, as the server bounds others
OutputName = Literal["PIXELS", "PNG", "SEED", "INDEX"]
OUTPUTS: tuple[OutputName, ...] = ("PIXELS", "PNG", "SEED", "INDEX")
MAX_INT64 = 2**63 - 1

_Rows = Annotated[
    list[Annotated[int, Field(ge=1, le=MAX_IMAGES)]], Field(min_length=1, max_length=1)
]
_Int64 = Annotated[int, Field(ge=0, le=MAX_INT64)]


class TensorParameters(BaseModel):
    """How a tensor of a request is sent."""

    model_config = ConfigDict(extra="forbid")

    binary_data_size: int | None = Field(None, ge=0, description="bytes of it after the JSON head")


class InputTensor(BaseModel):
    """One of the tensors of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["LABEL", "SEED", "INDEX"] = Field(
        description="LABEL: class indices; SEED: of each image, one is drawn for all if not given; "
        "INDEX: the number of each image among those of its seed and class, from 0 if not given"
    )
    shape: _Rows = Field(description="how many images", examples=[[2]])
    datatype: Literal["INT64"]
    parameters: TensorParameters | None = None
    data: Annotated[list[_Int64], Field(max_length=MAX_IMAGES)] | None = Field(
        None, examples=[[7, 3]]
    )


class OutputParameters(BaseModel):
    """How a tensor of the answer is to be sent."""

    model_config = ConfigDict(extra="forbid")

    binary_data: bool | None = None


class RequestedOutput(BaseModel):
    """One of the tensors that are wanted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: OutputName
    parameters: OutputParameters | None = None


class InferenceParameters(BaseModel):
    """What else can be asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    binary_data_output: bool = Field(False, description="send every tensor after the JSON head")
    timeout: Annotated[int, Field(ge=1, le=1000 * MAX_TIMEOUT_MS)] | None = Field(
        None, description="microseconds until the images are of no use"
    )
    truncation: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        1.0, description="less is nearer to what is typical, with less variety"
    )


class InferenceRequest(BaseModel):
    """The JSON of a request for images."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(max_length=100)] | None = Field(None, description="sent back")
    parameters: InferenceParameters = Field(default_factory=InferenceParameters)
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=3)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=len(OUTPUTS))] | None = Field(
        None, description="all of them if not given"
    )


class TensorDescription(BaseModel):
    """A tensor that a model takes or gives."""

    name: str
    datatype: Literal["INT64", "UINT8", "BYTES"]
    shape: list[int] = Field(description="-1 is as many as there are images")


class OutputTensor(TensorDescription):
    """A tensor of an answer."""

    parameters: dict[str, Any] | None = Field(
        None, description="binary_data_size, bytes of it after the JSON head; or the encoding"
    )
    data: list[int | str] | None = Field(None, description="BYTES are in base64")


class InferenceResponse(BaseModel):
    """The JSON of an answer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@dataclass(frozen=True)
class ParsedRequest:
    """A request, read.

    Attributes:
        request: its JSON.
        labels: (N,) int64.
        seeds: (N,) uint64, or None.
        indices: (N,) int64, or None.
        outputs: what is wanted, and of each whether as binary.
    """

    request: InferenceRequest
    labels: NDArray[np.int64]
    seeds: NDArray[np.uint64] | None
    indices: NDArray[np.int64] | None
    outputs: Mapping[OutputName, bool]


def decompress(body: bytes, encoding: str | None) -> bytes:
    """A body without its Content-Encoding.

    Raises:
        Problem: 415 for an unknown encoding, 413 for what becomes too large, 422 for what is none.
    """
    if encoding in (None, "", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        problem = wrong_value("Content-Encoding", encoding, "gzip and deflate are allowed")
        problem.status, problem.kind = 415, "unsupported-media-type"
        raise problem
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)  # the header says which of the two it is
    try:
        whole = unpacking.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise wrong_value("body", None, f"is no {encoding}") from None
    if len(whole) > MAX_BODY_BYTES:
        allowed = f"The body has more than {MAX_BODY_BYTES} bytes when it is decompressed."
        raise Problem(413, "content-too-large", allowed)
    if not unpacking.eof:
        raise wrong_value("body", None, f"is {encoding} without its end")
    return whole


def parse(body: bytes, head_length: str | None) -> ParsedRequest:
    """The request in a body.

    Args:
        body: JSON, and after it the tensors that are sent as binary.
        head_length: the header that says how long the JSON is; None where that is all.

    Raises:
        Problem: 422, naming the field and what is allowed.
    """
    head, rest = _split(body, head_length)
    try:
        request = InferenceRequest.model_validate_json(head)
    except ValidationError as error:
        raise wrong_values(error.errors(), _ALLOWED) from error
    tensors: dict[str, NDArray[np.int64]] = {}
    for each in request.inputs:
        if each.name in tensors:
            raise wrong_value("inputs", each.name, "is given twice")
        tensors[each.name], rest = _read(each, rest)
    if rest:
        raise wrong_value("binary_data_size", len(rest), "bytes are left over after all tensors")
    labels = tensors.get("LABEL")
    if labels is None:
        raise wrong_value("LABEL", None, "is required among the inputs")
    for name, values in tensors.items():
        if len(values) != len(labels):
            message = f"has {len(values)} rows, and LABEL has {len(labels)}"
            raise wrong_value(name, len(values), message)
    seeds = tensors["SEED"].astype(np.uint64) if "SEED" in tensors else None
    return ParsedRequest(request, labels, seeds, tensors.get("INDEX"), _outputs(request))


def _split(body: bytes, head_length: str | None) -> tuple[bytes, bytes]:
    if head_length is None:
        return body, b""
    length = int(head_length) if head_length.isascii() and head_length.isdigit() else -1
    if not 0 < length <= len(body):
        message = f"must be an integer from 1 to the length of the body, {len(body)}"
        raise wrong_value(LENGTH_HEADER, head_length, message)
    return body[:length], body[length:]


def _read(tensor: InputTensor, rest: bytes) -> tuple[NDArray[np.int64], bytes]:
    """The values (N,) of a tensor, and the binary data after it."""
    (rows,) = tensor.shape
    size = None if tensor.parameters is None else tensor.parameters.binary_data_size
    if size is None:
        data = tensor.data
        if data is None or len(data) != rows:
            found = "none" if data is None else len(data)
            raise wrong_value(tensor.name, found, f"must have {rows} values in data, as its shape")
        return np.array(data, dtype=np.int64), rest
    if tensor.data is not None:
        raise wrong_value(tensor.name, size, "is in data, or binary; not both")
    if size != 8 * rows or size > len(rest):
        message = f"must be {8 * rows} for {rows} values of INT64, and as many bytes must be there"
        raise wrong_value("binary_data_size", size, message)
    values = np.frombuffer(rest[:size], dtype="<i8").astype(np.int64)
    if values.min() < 0:
        raise wrong_value(tensor.name, int(values.min()), f"must be from 0 to {MAX_INT64}")
    return values, rest[size:]


def _outputs(request: InferenceRequest) -> dict[OutputName, bool]:
    binary = request.parameters.binary_data_output
    if not request.outputs:
        return dict.fromkeys(OUTPUTS, binary)
    found: dict[OutputName, bool] = {}
    for each in request.outputs:
        chosen = None if each.parameters is None else each.parameters.binary_data
        found[each.name] = binary if chosen is None else chosen
    return found


def describe_outputs(shape: tuple[int, ...], rows: int = -1) -> dict[OutputName, TensorDescription]:
    """What a model gives for images of a shape (H, W, C)."""
    return {
        "PIXELS": TensorDescription(name="PIXELS", datatype="UINT8", shape=[rows, *shape]),
        "PNG": TensorDescription(name="PNG", datatype="BYTES", shape=[rows]),
        "SEED": TensorDescription(name="SEED", datatype="INT64", shape=[rows]),
        "INDEX": TensorDescription(name="INDEX", datatype="INT64", shape=[rows]),
    }


class ResponseEncoder:
    """The body of an answer.

    Attributes:
        head_bytes: length of the JSON that it begins with, once it is encoded.
    """

    def __init__(
        self, asked: ParsedRequest, order: GenerationRequest, images: GeneratedImages
    ) -> None:
        self._asked, self._order, self._images = asked, order, images
        self.head_bytes = 0

    def encode(self) -> Steps:
        """In steps, for a PNG of each image takes time."""
        pngs: list[bytes] = []
        if "PNG" in self._asked.outputs:
            for png in single_pngs(self._order, self._images, 1):
                pngs.append(png)
                yield
        tensors, parts = [], []
        for name, binary in self._asked.outputs.items():
            tensor, raw = self._tensor(name, binary, pngs)
            tensors.append(tensor)
            parts.append(raw)
            yield
        answer = InferenceResponse(
            model_name=self._order.model.name,
            model_version=self._order.model.sha256,
            id=self._asked.request.id,
            outputs=tensors,
        )
        head = answer.model_dump_json(exclude_none=True).encode()
        self.head_bytes = len(head)
        return b"".join((head, *parts))

    def _tensor(
        self, name: OutputName, binary: bool, pngs: list[bytes]
    ) -> tuple[OutputTensor, bytes]:
        """What stands of it in the head, and what follows after that."""
        order = self._order
        described = describe_outputs(order.model.engine.image_shape, len(order.labels))[name]
        tensor = OutputTensor(**described.model_dump())
        raw = b""
        if name == "PNG" and binary:  # each behind its length
            raw = b"".join(part for png in pngs for part in (struct.pack("<I", len(png)), png))
        elif name == "PNG":
            tensor.parameters = {"content_encoding": "base64"}  # JSON has no bytes
            tensor.data = [base64.b64encode(png).decode() for png in pngs]
        elif binary:
            raw = self._values(name).tobytes()
        else:
            tensor.data = self._values(name).ravel().tolist()
        if binary:
            tensor.parameters = {"binary_data_size": len(raw)}
        return tensor, raw

    def _values(self, name: OutputName) -> NDArray[Any]:
        if name == "PIXELS":
            return self._images.pixels
        return self._order.seeds.astype("<i8") if name == "SEED" else self._order.indices


# Whichever way a value is wrong, the error says what is allowed.
_ALLOWED = {
    "id": "must be a text of at most 100 characters",
    "name": f"must be LABEL, SEED or INDEX of the inputs, {', '.join(OUTPUTS)} of the outputs",
    "shape": f"must be a list of one number, 1 to {MAX_IMAGES}",
    "datatype": "must be INT64",
    "data": f"must be a list of at most {MAX_IMAGES} integers from 0 to {MAX_INT64}",
    "inputs": "must be a list of LABEL and, if you like, SEED and INDEX",
    "outputs": f"must be a list of {', '.join(OUTPUTS)}, or of some of them",
    "binary_data": "must be true or false",
    "binary_data_output": "must be true or false",
    "binary_data_size": "must be the number of its bytes, 8 for each value",
    "timeout": f"must be an integer from 1 to {1000 * MAX_TIMEOUT_MS} (microseconds)",
    "truncation": "must be a number above 0 and up to 1",
}
