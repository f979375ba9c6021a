import asyncio
import io
import json
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.support.serving import Service, serve_here


@pytest.fixture
def address(service: Service) -> str:
    return f"127.0.0.1:{service.client.base_url.port}"


@pytest.fixture
def remote(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address) as found:
        yield found


def tensor(name: str, *values: int, binary: bool = True, kind: Any = triton.InferInput) -> Any:
    found = kind(name, [len(values)], "INT64")
    found.set_data_from_numpy(np.array(values, dtype=np.int64), binary_data=binary)
    return found


def generated(client: httpx.Client, query: str) -> NDArray[np.uint8]:
    answer = client.post(f"/generate?{query}&format=npz")
    with np.load(io.BytesIO(answer.content)) as arrays:
        images: NDArray[np.uint8] = arrays["images"]
        return images


def infer(client: httpx.Client, **request: Any) -> httpx.Response:
    return client.post("/v2/models/mnist/infer", json=request)


def label(*values: Any, **parts: Any) -> dict[str, Any]:
    return {
        "name": "LABEL",
        "shape": [len(values)],
        "datatype": "INT64",
        "data": [*values],
        **parts,
    }


@pytest.mark.parametrize("binary", [True, False])
def test_a_triton_client_gets_the_images_of_generate(
    client: httpx.Client, remote: Any, binary: bool
) -> None:
    inputs = [tensor("LABEL", 7, 7, 3, binary=binary), tensor("SEED", 5, 5, 5, binary=binary)]
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary) for name in ("PIXELS", "INDEX")
    ]
    result = remote.infer("mnist", inputs, outputs=outputs, request_id="mine")
    pixels = result.as_numpy("PIXELS")
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[:2], generated(client, "label=7&n=2&seed=5"))
    assert np.array_equal(pixels[2:], generated(client, "label=3&seed=5"))
    assert result.as_numpy("INDEX").tolist() == [0, 1, 0]
    assert result.as_numpy("PNG") is None
    assert result.get_response()["id"] == "mine"


def test_every_row_may_have_its_own_seed_and_index(client: httpx.Client, remote: Any) -> None:
    inputs = [tensor("LABEL", 7, 7), tensor("SEED", 5, 6), tensor("INDEX", 3, 0)]
    result = remote.infer("mnist", inputs)
    pixels = result.as_numpy("PIXELS")
    assert np.array_equal(pixels[:1], generated(client, "label=7&index=3&seed=5"))
    assert np.array_equal(pixels[1:], generated(client, "label=7&seed=6"))
    assert result.as_numpy("SEED").tolist() == [5, 6]


def test_pngs_are_the_files_of_generate(client: httpx.Client, remote: Any) -> None:
    files = remote.infer("mnist", [tensor("LABEL", 4), tensor("SEED", 2)]).as_numpy("PNG")
    assert files.shape == (1,)
    assert files[0] == client.post("/generate?label=4&seed=2").content


def test_pngs_are_in_base64_where_json_is_asked_for(client: httpx.Client) -> None:
    answer = infer(client, inputs=[label(4)], outputs=[{"name": "PNG"}, {"name": "SEED"}])
    assert answer.headers["Content-Type"] == "application/json"
    png, seed = answer.json()["outputs"]
    assert png["parameters"] == {"content_encoding": "base64"}
    with Image.open(io.BytesIO(b64decode(png["data"][0]))) as image:
        assert json.loads(image.info["Recipe"])["seed"] == seed["data"][0]


def test_without_a_seed_one_is_drawn_for_all_and_returned(
    client: httpx.Client, remote: Any
) -> None:
    result = remote.infer("mnist", [tensor("LABEL", 1, 1)])
    (seed, again) = result.as_numpy("SEED")
    assert seed == again
    assert np.array_equal(result.as_numpy("PIXELS"), generated(client, f"label=1&n=2&seed={seed}"))


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_both_ways_may_be_compressed(client: httpx.Client, remote: Any, algorithm: str) -> None:
    result = remote.infer(
        "mnist",
        [tensor("LABEL", 7), tensor("SEED", 5)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.array_equal(result.as_numpy("PIXELS"), generated(client, "label=7&seed=5"))
    head = client.build_request("POST", "/v2/models/mnist/infer", json={"inputs": [label(7)]})
    head.headers["Accept-Encoding"] = algorithm
    assert client.send(head).headers["Content-Encoding"] == algorithm


def test_the_asynchronous_client_is_answered_too(client: httpx.Client, address: str) -> None:
    async def ask() -> list[Any]:
        async with triton_aio.InferenceServerClient(address) as remote:
            assert await remote.is_server_live()
            inputs = [tensor("LABEL", 7), tensor("SEED", 5)]
            results = await asyncio.gather(*(remote.infer("mnist", inputs) for _ in range(8)))
            return [result.as_numpy("PIXELS") for result in results]

    expected = generated(client, "label=7&seed=5")
    assert all(np.array_equal(pixels, expected) for pixels in asyncio.run(ask()))


def test_server_and_models_describe_themselves(client: httpx.Client, remote: Any) -> None:
    assert remote.is_server_live()
    assert remote.is_server_ready()
    assert "binary_tensor_data" in remote.get_server_metadata()["extensions"]
    (model,) = [each for each in client.get("/models").json()["models"] if each["default"]]
    version = model["sha256"]
    for found in (
        remote.get_model_metadata("mnist"),
        remote.get_model_metadata("mnist", model_version=version),
    ):
        assert found["versions"] == [version]
        assert [each["name"] for each in found["inputs"]] == ["LABEL", "SEED", "INDEX"]
        pixels, png, *_ = found["outputs"]
        assert pixels == {"name": "PIXELS", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}
        assert png == {"name": "PNG", "datatype": "BYTES", "shape": [-1]}
    assert remote.is_model_ready("mnist")
    assert remote.is_model_ready("mnist", model_version=version)
    assert not remote.is_model_ready("nobody")
    assert not remote.is_model_ready("mnist", model_version="0" * 64)
    index = remote.get_model_repository_index()
    assert {"name": "mnist", "version": version, "state": "READY", "reason": ""} in index


def test_a_version_pins_the_artifact(remote: Any) -> None:
    version = remote.get_model_metadata("mnist")["versions"][0]
    result = remote.infer("mnist", [tensor("LABEL", 7)], model_version=version)
    assert result.get_response()["model_version"] == version
    with pytest.raises(InferenceServerException, match="is not loaded; mnist is now"):
        remote.infer("mnist", [tensor("LABEL", 7)], model_version="1")


def test_statistics_count_what_was_made(remote: Any) -> None:
    def read(**version: str) -> Any:
        found = remote.get_inference_statistics("mnist", **version)["model_stats"]
        assert len(found) == 1
        return found[0]

    before = read()
    remote.infer("mnist", [tensor("LABEL", 7, 8, 9)])
    after = read(model_version=before["version"])
    assert after["inference_count"] == before["inference_count"] + 3
    assert after["execution_count"] == before["execution_count"] + 1
    spent, earlier = after["inference_stats"], before["inference_stats"]
    assert spent["success"]["count"] == earlier["success"]["count"] + 1
    assert spent["compute_infer"]["ns"] > earlier["compute_infer"]["ns"]
    assert after["last_inference"] > before["last_inference"]
    everything = remote.get_inference_statistics()["model_stats"]
    assert "mnist" in [each["name"] for each in everything]


def test_truncation_is_a_parameter(client: httpx.Client) -> None:
    request = {"inputs": [label(7)], "parameters": {"truncation": 0.5}}
    answer = infer(client, **request).json()
    pixels, _, seed, _ = answer["outputs"]
    expected = generated(client, f"label=7&truncation=0.5&seed={seed['data'][0]}")
    assert pixels["data"] == expected.ravel().tolist()


def test_a_wrong_value_is_named_to_a_triton_client(remote: Any) -> None:
    for inputs, words in (
        ([tensor("LABEL", 10)], "LABEL: '10' is not a class; allowed is an index from 0 to 9"),
        ([tensor("LABEL", -1)], "LABEL: must be from 0"),
        ([tensor("SEED", 1)], "LABEL: is required"),
        ([tensor("LABEL", 1, 2), tensor("SEED", 1)], "SEED: has 1 rows, but LABEL has 2"),
        ([tensor("LABEL", 1), tensor("LABEL", 1)], "inputs: is given twice"),
        ([tensor("NOISE", 1)], "name: must be LABEL, SEED or INDEX"),
    ):
        with pytest.raises(InferenceServerException, match=words) as caught:
            remote.infer("mnist", inputs)
        assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="is not loaded") as caught:
        remote.infer("nobody", [tensor("LABEL", 1)])
    assert caught.value.status() == "404"


def test_a_tensor_may_be_a_column_of_any_integer_type(client: httpx.Client, remote: Any) -> None:
    expected = generated(client, "label=7&label=3&seed=5")
    for kind in ("INT32", "INT8", "UINT64", "UINT8"):
        inputs = []
        for name, values in (("LABEL", [[7], [3]]), ("SEED", [[5], [5]])):
            inputs.append(triton.InferInput(name, [2, 1], kind))
            inputs[-1].set_data_from_numpy(np.array(values, dtype=kind.lower()))
        assert np.array_equal(remote.infer("mnist", inputs).as_numpy("PIXELS"), expected)
    columns = [label([7], [3], shape=[2, 1]), label([5], [5], name="SEED", shape=[2, 1])]
    answer = infer(client, inputs=columns, outputs=[{"name": "PIXELS"}]).json()
    assert answer["outputs"][0]["data"] == expected.ravel().tolist()
    seed = triton.InferInput("SEED", [1], "UINT64")
    seed.set_data_from_numpy(np.array([2**63], dtype=np.uint64))
    with pytest.raises(InferenceServerException, match=f"SEED: must be from 0 to {2**63 - 1}"):
        remote.infer("mnist", [tensor("LABEL", 7), seed])


def test_what_changes_no_image_is_accepted(client: httpx.Client, remote: Any) -> None:
    inputs = [tensor("LABEL", 7), tensor("SEED", 5)]
    result = remote.infer("mnist", inputs, priority=2, timeout=2**40, parameters={"mine": "yes"})
    assert np.array_equal(result.as_numpy("PIXELS"), generated(client, "label=7&seed=5"))
    nothing = {"priority": 1, "timeout": 0, "sequence_id": 0, "sequence_start": False}
    for parameters in (nothing, None):
        answer = infer(
            client,
            model_name="mnist",
            inputs=[label(7, parameters={"content_type": "np"})],
            outputs=[{"name": "SEED", "parameters": {"content_type": "np"}}],
            parameters=parameters,
        )
        assert answer.status_code == 200


def test_what_cannot_be_given_is_refused_to_a_triton_client(remote: Any) -> None:
    inputs = [tensor("LABEL", 7)]
    with pytest.raises(InferenceServerException, match="sequences are not supported"):
        remote.infer("mnist", inputs, sequence_id=3, sequence_start=True)
    scores = triton.InferRequestedOutput("PIXELS", class_count=2)
    with pytest.raises(InferenceServerException, match="classification: is not supported"):
        remote.infer("mnist", inputs, outputs=[scores])
    shared = triton.InferRequestedOutput("PIXELS")
    shared.set_shared_memory("region", 1000)
    with pytest.raises(InferenceServerException, match="shared_memory_region: is not supported"):
        remote.infer("mnist", inputs, outputs=[shared])


def test_health_is_told_in_a_body_as_kserve_reads_it(client: httpx.Client) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/mnist/ready").json() == {"name": "mnist", "ready": True}


def test_a_timeout_in_microseconds_is_kept_to(remote: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        remote.infer("mnist", [tensor("LABEL", *[7] * 1000)], timeout=1)
    assert caught.value.status() in {"429", "504"}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "inputs: is required"),
        ({"inputs": []}, "inputs: must be a list"),
        ({"inputs": [label(7, datatype="FP32")]}, "datatype: must be one of INT64, INT32"),
        ({"inputs": [label(7, 3, shape=[1, 2])]}, "shape: must be [N] or [N, 1]"),
        ({"inputs": [label(7, shape=[1, 1, 1])]}, "shape: must be [N] or [N, 1]"),
        ({"inputs": [label(7, shape=[2])]}, "LABEL: must have 2 values"),
        ({"inputs": [label("7")]}, "data: must be a list"),
        ({"inputs": [label(7)], "outputs": [{"name": "PICTURE"}]}, "name: must be"),
        (
            {"inputs": [label(7)], "parameters": {"sequence_id": 4, "sequence_start": True}},
            "sequence_id: sequences are not supported",
        ),
        (
            {"inputs": [label(7, parameters={"shared_memory_region": "here"}, data=None)]},
            "shared_memory_region: is not supported",
        ),
        ({"inputs": [label([7, 3], [3, 7])]}, "data: must be a list"),
        (
            {"inputs": [label(7, parameters={"binary_data_size": 8})]},
            "LABEL: cannot have both data and binary data",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_words(
    client: httpx.Client, request_: dict[str, Any], words: str
) -> None:
    answer = infer(client, **request_)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["error"].startswith(words)


def test_binary_data_of_another_length_is_refused(client: httpx.Client) -> None:
    head = json.dumps({"inputs": [label(7, parameters={"binary_data_size": 8}, data=None)]})
    for rest, length, words in (
        (b"", str(len(head)), "binary_data_size: must be 8"),
        (bytes(9), str(len(head)), "binary_data_size: bytes follow the last tensor"),
        (bytes(8), str(len(head) + 9), "Inference-Header-Content-Length: must be"),
        (bytes(8), "x", "Inference-Header-Content-Length: must be"),
    ):
        answer = client.post(
            "/v2/models/mnist/infer",
            content=head.encode() + rest,
            headers={"Inference-Header-Content-Length": length},
        )
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(words)


def test_only_liveness_needs_no_key() -> None:
    with serve_here("--api-keys", "me:a-secret-of-16-characters") as service:
        assert service.client.get("/v2/health/live").status_code == 200
        refused = service.client.get("/v2/health/ready")
        assert refused.status_code == 401
        assert set(refused.json()) == {"error"}
        key = {"Authorization": "Bearer a-secret-of-16-characters"}
        assert service.client.get("/v2/health/ready", headers=key).status_code == 200
