"""Labels of classes whose names are numbers: every API understands them in one way."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import tritonclient.http as triton
from PIL import Image

from tests.service.api.test_open_inference import tensor
from tests.support.numbered import serve_numbered_classes


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serve_numbered_classes() as running:
        yield running.client


def recipe(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        return dict(json.loads(image.info["Recipe"]))


LABELS = pytest.mark.parametrize(
    ("model", "label", "name", "index"),
    [
        ("ten", "1", "1", 0),
        ("ten", "10", "10", 9),
        ("ten", "0", "1", 0),  # no class has this name, so it is an index
        ("even", "0", "0", 0),
        ("even", "1", "2", 1),
        ("even", "2", "2", 1),
        ("even", "4", "4", 2),
    ],
)


@LABELS
def test_a_label_is_a_name_before_it_is_an_index(
    client: httpx.Client, model: str, label: str, name: str, index: int
) -> None:
    common: dict[str, str | int] = {"model": model, "seed": 5}
    by_query = client.get("/generate", params=common | {"label": label}).content
    found = recipe(by_query)
    assert (found["class"], found["label"]) == (name, index)
    for body in ({"label": label}, {"label": int(label)}, {"labels": [int(label)]}):
        assert client.post("/generate", json=common | body).content == by_query


@LABELS
def test_a_part_of_a_mixture_is_named_like_a_label(
    client: httpx.Client, model: str, label: str, name: str, index: int
) -> None:
    common: dict[str, str | int] = {"model": model, "seed": 5}
    by_query = client.get("/generate", params=common | {"mix": f"{label}:2"}).content
    assert recipe(by_query)["mix"] == {name: 2.0}
    by_body = client.post("/generate", json=common | {"mix": {label: 2}}).content
    assert by_body == by_query


@LABELS
def test_foreign_clients_name_a_class_like_a_label(
    client: httpx.Client, model: str, label: str, name: str, index: int
) -> None:
    expected = client.get(f"/generate?model={model}&label={label}&seed=5").content
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any") as remote:
        for prompt in (label, f"a picture of {label}"):
            response = remote.images.generate(model=model, prompt=prompt, extra_body={"seed": 5})
            assert response.data is not None
            assert response.data[0].revised_prompt == name
            assert base64.b64decode(response.data[0].b64_json or "") == expected
    with triton.InferenceServerClient(f"127.0.0.1:{client.base_url.port}") as remote:
        result = remote.infer(model, [tensor("LABEL", int(label)), tensor("SEED", 5)])
        assert result.as_numpy("PNG").tolist() == [expected]


def test_a_number_that_is_neither_name_nor_index_is_refused(client: httpx.Client) -> None:
    words = "is not a class; allowed is an index from 0 to 9 or a name: 1, 2, 3"
    for body in ({"label": 11}, {"label": "11"}, {"mix": {"11": 1}}):
        answer = client.post("/generate", json={"model": "ten", **body})
        assert answer.status_code == 422
        assert words in answer.json()["detail"]
    tensor = {"name": "LABEL", "shape": [2], "datatype": "INT64", "data": [1, 11]}
    answer = client.post("/v2/models/ten/infer", json={"inputs": [tensor]})
    assert answer.status_code == 400
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("query", "written"),
    [
        ("label=2", {"label": 1, "class": "2", "seed": 5, "index": 0}),
        ("label=2&label=4", {"labels": [1, 2], "seed": 5, "indices": [0, 0]}),
        ("mix=2:1&mix=4:3", {"seed": 5, "index": 0, "mix": {"2": 1.0, "4": 3.0}}),
    ],
)
def test_a_recipe_keeps_its_form_and_is_verified(
    client: httpx.Client, query: str, written: dict[str, Any]
) -> None:
    png = client.get(f"/generate?model=even&seed=5&{query}").content
    found = recipe(png)
    del found["model"], found["sha256"]
    assert found == written
    verified = client.post("/verify", content=png).json()
    assert (verified["same_pixels"], verified["same_file"]) == (True, True)


def test_models_list_the_labels_that_could_be_misread(client: httpx.Client) -> None:
    models = {each["name"]: each for each in client.get("/models").json()["models"]}
    assert models["ten"]["ambiguous_labels"] == [str(each) for each in range(1, 10)]
    assert models["even"]["ambiguous_labels"] == ["2"]


def test_a_label_may_have_any_spelling_of_unicode(client: httpx.Client) -> None:
    spelled = "cafe\N{COMBINING ACUTE ACCENT}"
    sent = client.post("/generate", json={"model": "accented", "label": spelled})
    assert sent.status_code == 200, sent.text
    assert recipe(sent.content)["label"] == 1
