"""Requests and responses of the Open Inference Protocol, version 2, as bytes.

The protocol is KServe's (https://github.com/kserve/open-inference-protocol) with Triton's extension
for binary tensors: they follow a JSON head, whose length is in a header, in their memory layout.
"""

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from service.api.parameters import Truncation
from service.encoding.images import single_pngs
from service.encoding.timeslice import IncrementalEncoder
from service.errors import invalid_value, invalid_values
from service.generation import ResolvedRequest
from service.inference.scheduling import GenerationResult
from service.settings import MAX_IMAGES

LENGTH_HEADER = "Inference-Header-Content-Length"
OutputName = Literal["PIXELS", "PNG", "SEED", "INDEX"]
OUTPUTS: tuple[OutputName, ...] = ("PIXELS", "PNG", "SEED", "INDEX")
MAX_INT64 = 2**63 - 1

IntegerType = Literal["INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8"]
_NOT_SUPPORTED = "not supported; null if given"
_NO_SEQUENCES = "not supported: no request depends on another"


def _flatten(data: object) -> object:
    """Return the data of a tensor of shape [N, 1], which may be nested, as that of shape [N]."""
    if not isinstance(data, list):
        return data
    return [each[0] if isinstance(each, list) and len(each) == 1 else each for each in data]


def _default(parameters: object) -> object:
    return {} if parameters is None else parameters


_Shape = Annotated[
    list[Annotated[int, Field(ge=1, le=MAX_IMAGES)]], Field(min_length=1, max_length=2)
]
_Int64 = Annotated[int, Field(ge=0, le=MAX_INT64)]
_Data = Annotated[list[_Int64], Field(max_length=MAX_IMAGES), BeforeValidator(_flatten)]


class TensorParameters(BaseModel):
    """The encoding of a tensor of a request; unknown parameters are ignored."""

    binary_data_size: int | None = Field(None, ge=0, description="its bytes after the JSON head")
    shared_memory_region: None = Field(None, description=_NOT_SUPPORTED)


class InputTensor(BaseModel, strict=True):
    """A tensor of a request."""

    name: Literal["LABEL", "SEED", "INDEX"] = Field(
        description='LABEL: label of each image, 7 as "7" on /generate; SEED: of each image, one '
        "is drawn for all if not given; INDEX: number of each image among those of its seed and "
        "class, from 0 if not given"
    )
    shape: _Shape = Field(description="[N] or [N, 1] for N images", examples=[[2]])
    datatype: IntegerType
    parameters: TensorParameters | None = None
    data: _Data | None = Field(None, examples=[[7, 3]])


class OutputParameters(BaseModel):
    """The requested encoding of a tensor of the response; unknown parameters are ignored."""

    binary_data: bool | None = None
    classification: None = Field(None, description=_NOT_SUPPORTED)
    shared_memory_region: None = Field(None, description=_NOT_SUPPORTED)


class RequestedOutput(BaseModel, strict=True):
    """A requested tensor."""

    name: OutputName
    parameters: OutputParameters | None = None


class InferenceParameters(BaseModel, strict=True):
    """The parameters of a request; unknown ones, `priority` among them, are ignored."""

    binary_data_output: bool = Field(False, description="send all tensors after the JSON head")
    timeout: _Int64 | None = Field(
        None, description="deadline in microseconds, if shorter than the service's; 0 for none"
    )
    truncation: Truncation = 1.0
    sequence_id: Literal[0, ""] | None = Field(None, description=_NO_SEQUENCES)
    sequence_start: Literal[False] | None = Field(None, description=_NO_SEQUENCES)
    sequence_end: Literal[False] | None = Field(None, description=_NO_SEQUENCES)


class InferenceRequest(BaseModel, strict=True):
    """The JSON of a request for images; unknown fields, `model_name` among them, are ignored."""

    id: Annotated[str, Field(max_length=100)] | None = Field(None, description="returned")
    parameters: Annotated[InferenceParameters, BeforeValidator(_default)] = Field(
        default_factory=InferenceParameters
    )
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=3)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=len(OUTPUTS))] | None = Field(
        None, description="all of them if not given"
    )


class TensorDescription(BaseModel):
    """An input or output of a model."""

    name: str
    datatype: Literal["INT64", "UINT8", "BYTES"]
    shape: list[int] = Field(description="-1 stands for the number of images")


class OutputTensor(TensorDescription):
    """A tensor of a response."""

    parameters: dict[str, Any] | None = Field(
        None, description="binary_data_size: its bytes after the JSON head; or content_encoding"
    )
    data: list[int | str] | None = Field(None, description="BYTES in base64")


class InferenceResponse(BaseModel):
    """The JSON of a response."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@dataclass(frozen=True)
class ParsedRequest:
    """A parsed request."""

    request: InferenceRequest
    labels: NDArray[np.int64]  # (N,)
    seeds: NDArray[np.uint64] | None  # (N,)
    indices: NDArray[np.int64] | None  # (N,)
    outputs: Mapping[OutputName, bool]  # true for tensors to be sent as binary


def parse(body: bytes, head_length: str | None) -> ParsedRequest:
    """Parse a body: JSON, of a length that a header states, and then the binary tensors.

    Raises:
        Problem: 422, naming the field and what is allowed.
    """
    head, rest = _split(body, head_length)
    try:
        request = InferenceRequest.model_validate_json(head)
    except ValidationError as error:
        raise invalid_values(error.errors(), _ALLOWED) from error
    tensors: dict[str, NDArray[np.int64]] = {}
    for each in request.inputs:
        if each.name in tensors:
            raise invalid_value("inputs", each.name, "is given twice")
        tensors[each.name], rest = _read(each, rest)
    if rest:
        message = "bytes follow the last tensor; the sizes must add up to the body"
        raise invalid_value("binary_data_size", len(rest), message)
    labels = tensors.get("LABEL")
    if labels is None:
        raise invalid_value("LABEL", None, "is required among the inputs")
    for name, values in tensors.items():
        if len(values) != len(labels):
            message = f"has {len(values)} rows, but LABEL has {len(labels)}"
            raise invalid_value(name, len(values), message)
    seeds = tensors["SEED"].astype(np.uint64) if "SEED" in tensors else None
    return ParsedRequest(request, labels, seeds, tensors.get("INDEX"), _outputs(request))


def _split(body: bytes, head_length: str | None) -> tuple[bytes, bytes]:
    if head_length is None:
        return body, b""
    length = int(head_length) if head_length.isascii() and head_length.isdigit() else -1
    if not 0 < length <= len(body):
        message = f"must be an integer from 1 to the length of the body, {len(body)}"
        raise invalid_value(LENGTH_HEADER, head_length, message)
    return body[:length], body[length:]


def _read(tensor: InputTensor, rest: bytes) -> tuple[NDArray[np.int64], bytes]:
    """Return the values (N,) of a tensor, and the binary data after it."""
    rows, *rest_of_shape = tensor.shape
    if rest_of_shape not in ([], [1]):
        raise invalid_value("shape", tensor.shape, _ALLOWED["shape"])
    size = None if tensor.parameters is None else tensor.parameters.binary_data_size
    if size is None:
        data = tensor.data
        if data is None or len(data) != rows:
            found = "none" if data is None else len(data)
            raise invalid_value(tensor.name, found, f"must have {rows} values in data, as in shape")
        return np.array(data, dtype=np.int64), rest
    if tensor.data is not None:
        raise invalid_value(tensor.name, size, "cannot have both data and binary data")
    dtype = np.dtype(tensor.datatype.lower()).newbyteorder("<")
    expected = dtype.itemsize * rows
    if size != expected or size > len(rest):
        message = (
            f"must be {expected} for {rows} values of {tensor.datatype}, and that many bytes must "
            "follow"
        )
        raise invalid_value("binary_data_size", size, message)
    given = np.frombuffer(rest[:size], dtype)
    values = given.astype(np.int64)  # of UINT64, more than MAX_INT64 becomes negative
    if values.min() < 0:
        wrong = int(given[values.argmin()])
        raise invalid_value(tensor.name, wrong, f"must be from 0 to {MAX_INT64}")
    return values, rest[size:]


def _outputs(request: InferenceRequest) -> dict[OutputName, bool]:
    found: dict[OutputName, bool] = {}
    for each in request.outputs or [RequestedOutput(name=name) for name in OUTPUTS]:
        chosen = None if each.parameters is None else each.parameters.binary_data
        found[each.name] = request.parameters.binary_data_output if chosen is None else chosen
    return found


def describe_outputs(shape: tuple[int, ...], rows: int = -1) -> dict[OutputName, TensorDescription]:
    """Return the outputs of a model with images of a shape (H, W, C)."""
    return {
        "PIXELS": TensorDescription(name="PIXELS", datatype="UINT8", shape=[rows, *shape]),
        "PNG": TensorDescription(name="PNG", datatype="BYTES", shape=[rows]),
        "SEED": TensorDescription(name="SEED", datatype="INT64", shape=[rows]),
        "INDEX": TensorDescription(name="INDEX", datatype="INT64", shape=[rows]),
    }


class ResponseEncoder:
    """Encodes the body of a response."""

    def __init__(self, parsed: ParsedRequest, request: ResolvedRequest) -> None:
        self._parsed, self._request = parsed, request
        self.head_bytes = 0  # length of the JSON at its beginning, once it is encoded

    def encode(self, result: GenerationResult) -> IncrementalEncoder:
        """Encode the images of the request."""
        pngs: list[bytes] = []
        if "PNG" in self._parsed.outputs:
            for png in single_pngs(self._request, result, 1):
                pngs.append(png)
                yield
        values = {
            "PIXELS": result.pixels,
            "SEED": self._request.seeds.astype("<i8"),
            "INDEX": self._request.indices,
        }
        tensors, parts = [], []
        for name, binary in self._parsed.outputs.items():
            tensor, raw = self._tensor(name, binary, pngs if name == "PNG" else values[name])
            tensors.append(tensor)
            parts.append(raw)
            yield
        response = InferenceResponse(
            model_name=self._request.model.name,
            model_version=self._request.model.sha256,
            id=self._parsed.request.id,
            outputs=tensors,
        )
        head = response.model_dump_json(exclude_none=True).encode()
        self.head_bytes = len(head)
        return b"".join((head, *parts))

    def _tensor(
        self, name: OutputName, binary: bool, values: list[bytes] | NDArray[Any]
    ) -> tuple[OutputTensor, bytes]:
        """Return a tensor as it stands in the head, and the binary data after that."""
        request = self._request
        description = describe_outputs(request.model.engine.image_shape, len(request.labels))[name]
        tensor = OutputTensor(**description.model_dump())
        raw = b""
        if not isinstance(values, list):
            if binary:
                raw = values.tobytes()
            else:
                tensor.data = values.ravel().tolist()
        elif binary:  # each PNG after its length
            raw = b"".join(part for png in values for part in (struct.pack("<I", len(png)), png))
        else:
            tensor.parameters = {"content_encoding": "base64"}  # JSON has no bytes
            tensor.data = [base64.b64encode(png).decode() for png in values]
        if binary:
            tensor.parameters = {"binary_data_size": len(raw)}
        return tensor, raw


# They replace pydantic's messages, which differ from one way of being invalid to the other.
_ALLOWED = {
    "id": "must be a string of at most 100 characters",
    "name": f"must be LABEL, SEED or INDEX for inputs, {', '.join(OUTPUTS)} for outputs",
    "shape": f"must be [N] or [N, 1], where N is from 1 to {MAX_IMAGES}",
    "datatype": f"must be one of {', '.join(get_args(IntegerType))}",
    "data": f"must be a list of at most {MAX_IMAGES} integers from 0 to {MAX_INT64}",
    "inputs": "must be a list of LABEL and, optionally, SEED and INDEX",
    "outputs": f"must be a list of any of {', '.join(OUTPUTS)}",
    "binary_data": "must be true or false",
    "binary_data_output": "must be true or false",
    "binary_data_size": "must be the number of its bytes",
    "timeout": f"must be an integer from 0 to {MAX_INT64} (microseconds)",
    **dict.fromkeys(
        ("sequence_id", "sequence_start", "sequence_end"),
        "sequences are not supported, because no request depends on another; leave it out",
    ),
    "classification": "is not supported, because images have no scores; leave it out",
    "shared_memory_region": "is not supported; send and receive tensors in the body",
    "truncation": "must be a number above 0 and up to 1",
}
