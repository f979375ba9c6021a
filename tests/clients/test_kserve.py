"""KServe's own client of the Open Inference Protocol."""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.serving import MODEL, LocalService, serve_here

kserve: Any = pytest.importorskip("kserve")

Ask = Callable[[Callable[[Any, str], Awaitable[Any]]], Any]


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with serve_here("--models", str(MODEL)) as running:
        yield running


@pytest.fixture
def ask(service: LocalService) -> Ask:
    """Awaits what is asked of KServe's client."""

    def run(question: Callable[[Any, str], Awaitable[Any]]) -> Any:
        async def connect() -> Any:
            config = kserve.inference_client.RESTConfig(protocol="v2")
            async with kserve.InferenceRESTClient(config) as client:
                return await question(client, str(service.client.base_url))

        return asyncio.run(connect())

    return run


def tensor(name: str, values: Any, *, datatype: str = "INT64", binary: bool = False) -> Any:
    array = np.array(values, dtype=datatype.lower())
    found = kserve.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def infer(ask: Ask, *inputs: Any, **more: Any) -> Any:
    request = kserve.InferRequest("mnist", list(inputs), **more)
    return ask(lambda client, at: client.infer(at, request, model_name="mnist"))


def test_it_sees_that_service_and_model_are_live_and_ready(ask: Ask) -> None:
    assert ask(lambda client, at: client.is_server_live(at)) is True
    assert ask(lambda client, at: client.is_server_ready(at)) is True
    assert ask(lambda client, at: client.is_model_ready(at, "mnist")) is True
    assert ask(lambda client, at: client.is_model_ready(at, "nobody")) is False


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("datatype", ["INT64", "INT32", "UINT8"])
def test_it_gets_the_images_of_generate(
    service: LocalService, ask: Ask, datatype: str, shape: tuple[int, ...], binary: bool
) -> None:
    labels = np.array([7, 3]).reshape(shape)
    response = infer(
        ask,
        tensor("LABEL", labels, datatype=datatype, binary=binary),
        tensor("SEED", np.full(shape, 5), datatype=datatype, binary=binary),
    )
    outputs = {each.name: each for each in response.outputs}
    assert outputs["PIXELS"].as_numpy().shape == (2, 28, 28, 1)
    expected = [service.client.post(f"/generate?label={label}&seed=5").content for label in (7, 3)]
    assert [base64.b64decode(each) for each in outputs["PNG"].as_numpy()] == expected


def test_it_may_ask_for_binary_pixels_and_send_parameters_that_change_nothing(ask: Ask) -> None:
    labels = tensor("LABEL", [7]), tensor("SEED", [5])
    plain = infer(ask, *labels).outputs[0].as_numpy()
    output = kserve.protocol.infer_type.RequestedOutput("PIXELS", {"binary_data": True})
    parameters = {"priority": 3, "some_feature": "on", "timeout": 30_000_000}
    response = infer(ask, *labels, request_outputs=[output], parameters=parameters)
    assert [each.name for each in response.outputs] == ["PIXELS"]
    assert np.array_equal(response.outputs[0].as_numpy(), plain)


def test_it_is_told_what_is_wrong(ask: Ask) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="LABEL: '10' is not a class"):
        infer(ask, tensor("LABEL", [10]))
    with pytest.raises(httpx.HTTPStatusError, match=r"shape: must be \[N\] or \[N, 1\]"):
        infer(ask, tensor("LABEL", [[7, 3]]))
    with pytest.raises(httpx.HTTPStatusError, match="sequence_id: sequences are not supported"):
        infer(ask, tensor("LABEL", [7]), parameters={"sequence_id": 4})
