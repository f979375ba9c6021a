import base64
import io
import json
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.problems import Problem
from service.routes.native import negotiate
from tests.serving import ServiceProcess

Params = list[tuple[str, str]]


@pytest.fixture
def client(service: ServiceProcess) -> httpx.Client:
    return service.client


def post(client: httpx.Client, query: str, **headers: str) -> httpx.Response:
    return client.post(f"/generate?{query}", headers=headers)


def decode(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def test_sixteen_sevens_are_one_picture_of_sixteen_different_images(client: httpx.Client) -> None:
    answer = post(client, "label=7&n=16")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/png"
    sheet = np.asarray(decode(answer.content))
    assert sheet.shape == (112, 112)
    cells = sheet.reshape(4, 28, 4, 28).swapaxes(1, 2).reshape(16, -1)
    assert len(np.unique(cells, axis=0)) == 16


def test_one_image_is_that_image(client: httpx.Client) -> None:
    assert decode(post(client, "label=3").content).size == (28, 28)


def test_a_label_is_an_index_or_a_name(client: httpx.Client) -> None:
    by_index = post(client, "label=7&seed=5").content
    assert post(client, "label=seven&seed=5").content == by_index
    assert post(client, "label=8&seed=5").content != by_index


def test_scale_enlarges_by_whole_pixels(client: httpx.Client) -> None:
    small = np.asarray(decode(post(client, "label=2&n=3&seed=1").content))
    large = np.asarray(decode(post(client, "label=2&n=3&seed=1&scale=3").content))
    assert (large == small.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_the_seed_is_returned_and_gives_the_same_bytes_again(client: httpx.Client) -> None:
    drawn = post(client, "label=4&n=5")
    again = post(client, f"label=4&n=5&seed={drawn.headers['X-Seed']}")
    assert again.content == drawn.content
    assert post(client, "label=4&n=5").content != drawn.content


def test_every_seed_of_64_bits_is_taken(client: httpx.Client) -> None:
    answer = post(client, f"label=4&seed={2**64 - 1}")
    assert answer.headers["X-Seed"] == str(2**64 - 1)
    assert answer.status_code == 200


def test_an_image_names_its_model_and_its_time(client: httpx.Client) -> None:
    answer = post(client, "label=4")
    (model,) = [each for each in client.get("/models").json()["models"] if each["default"]]
    assert answer.headers["X-Model"] == f"mnist@sha256:{model['sha256']}"
    stages = [part.split(";dur=") for part in answer.headers["Server-Timing"].split(", ")]
    assert [name for name, _ in stages] == ["queue", "forward", "encode"]
    assert all(float(ms) >= 0 for _, ms in stages)


def archive(answer: httpx.Response) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    with zipfile.ZipFile(io.BytesIO(answer.content)) as opened:
        assert opened.testzip() is None
        files = {name: opened.read(name) for name in opened.namelist()}
    return files, json.loads(files.pop("manifest.json"))["images"]


def test_a_zip_holds_single_pngs_named_by_label_and_index(client: httpx.Client) -> None:
    answer = post(client, "label=3&label=8&n=2&seed=6", Accept="application/zip")
    assert answer.headers["Content-Type"] == "application/zip"
    files, manifest = archive(answer)
    assert list(files) == ["0003-0000.png", "0003-0001.png", "0008-0000.png", "0008-0001.png"]
    assert [entry["file"] for entry in manifest] == list(files)
    for entry in manifest:
        recipe = json.loads(decode(files[entry["file"]]).info["Recipe"])
        assert entry == {"file": entry["file"], **recipe}
        alone = post(client, f"label={recipe['label']}&n=2&seed=6", Accept="application/zip")
        assert archive(alone)[0][entry["file"]] == files[entry["file"]]


def test_json_holds_the_same_pngs(client: httpx.Client) -> None:
    query = "label=three&label=8&n=2&seed=6"
    files, _ = archive(post(client, query, Accept="application/zip"))
    answer = post(client, query, Accept="application/json").json()
    assert answer["seed"] == 6
    assert [(each["label"], each["class_name"], each["index"]) for each in answer["images"]] == [
        (3, "three", 0),
        (3, "three", 1),
        (8, "eight", 0),
        (8, "eight", 1),
    ]
    assert [base64.b64decode(each["png"]) for each in answer["images"]] == list(files.values())


def test_a_label_given_twice_gives_more_images_and_not_the_same_again(client: httpx.Client) -> None:
    twice, _ = archive(post(client, "label=3&label=3&n=2&seed=6&format=zip"))
    once, _ = archive(post(client, "label=3&n=4&seed=6&format=zip"))
    assert twice == once
    assert len(set(once.values())) == 4


def test_format_goes_before_accept(client: httpx.Client) -> None:
    answer = post(client, "label=3&format=json", Accept="image/png")
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("text/html,image/avif,image/webp,*/*;q=0.8", "png"),
        ("application/*", "zip"),
        ("application/json", "json"),
        ("application/json;q=0.1, application/zip;q=0.9", "zip"),
        ("image/png;q=0.5, application/json", "json"),
    ],
)
def test_accept_chooses_the_format(accept: str | None, chosen: str) -> None:
    assert negotiate(accept) == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg", "nonsense", "a/b/c", ";;;", "png"])
def test_an_accept_header_that_nothing_matches_is_406(accept: str) -> None:
    with pytest.raises(Problem) as caught:
        negotiate(accept)
    assert caught.value.status == 406
    assert "image/png, application/zip, application/json" in caught.value.detail


def wrong(client: httpx.Client, query: str, status: int = 422) -> dict[str, Any]:
    """The one error of a refused request, after checking the form of the whole answer."""
    answer = post(client, query)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    (error,) = problem["errors"]
    assert error["field"] in problem["detail"]
    return dict(error)


CLASSES = "an index from 0 to 9 or a name: zero, one, two"
SEEDS = f"an integer from 0 to {2**64 - 1}"


@pytest.mark.parametrize(
    ("query", "field", "value", "allowed"),
    [
        ("label=10", "label", "10", CLASSES),
        ("label=-1", "label", "-1", CLASSES),
        ("label=seven-ish", "label", "seven-ish", CLASSES),
        ("label=", "label", "", CLASSES),
        ("label=%D9%A7", "label", "\u0667", CLASSES),
        ("label=7&label=x", "label", "x", CLASSES),
        ("", "label", None, "is required"),
        ("label=7&n=0", "n", "0", "an integer from 1 to 1024"),
        ("label=7&n=-5", "n", "-5", "an integer from 1 to 1024"),
        ("label=7&n=1e9", "n", "1e9", "an integer from 1 to 1024"),
        ("label=7&n=1000000000", "n", "1000000000", "an integer from 1 to 1024"),
        ("label=7&n=many", "n", "many", "an integer from 1 to 1024"),
        ("label=7&n=", "n", "", "an integer from 1 to 1024"),
        ("label=7&label=8&n=513", "n", "513", "at most 1024 are allowed in all"),
        ("label=7&seed=-1", "seed", "-1", SEEDS),
        (f"label=7&seed={2**64}", "seed", str(2**64), SEEDS),
        ("label=7&seed=1.5", "seed", "1.5", SEEDS),
        ("label=7&format=gif", "format", "gif", "one of png, zip, json"),
        ("label=7&scale=0", "scale", "0", "an integer from 1 to 16"),
        ("label=7&n=1024&scale=16", "scale", "16", "at most 16777216 are allowed"),
        ("label=7&lable=8", "lable", "8", "there is no such parameter"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    client: httpx.Client, query: str, field: str, value: str | None, allowed: str
) -> None:
    error = wrong(client, query)
    assert error["field"] == field
    assert error["value"] == value
    assert allowed in error["message"]


def test_a_label_repeated_two_thousand_times_is_refused(client: httpx.Client) -> None:
    error = wrong(client, "&".join(["label=7"] * 2000))
    assert error["field"] == "label"
    assert error["value"] == "2000 values"
    assert "1024 times" in error["message"]


def test_a_very_long_value_is_not_repeated_in_full(client: httpx.Client) -> None:
    error = wrong(client, "label=" + "x" * 5000)
    assert len(error["value"]) < 200
    assert len(error["message"]) < 400


def test_an_unknown_model_is_404_and_names_the_known_ones(client: httpx.Client) -> None:
    error = wrong(client, "label=7&model=cifar", 404)
    assert error["field"] == "model"
    assert error["value"] == "cifar"
    assert "mnist" in error["message"]


@pytest.mark.parametrize("content", [b"label=7", b"x" * 100_000, b'{"label": 7}'])
def test_a_body_is_refused_where_none_belongs(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/generate?label=7", content=content)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "body"


def test_a_body_of_unknown_length_is_refused_too(client: httpx.Client) -> None:
    answer = client.post("/generate?label=7", content=iter([b"label=7"]))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "body"
    assert answer.json()["errors"][0]["value"] == "transfer-encoding: chunked"


def test_accept_lines_are_one_list(client: httpx.Client) -> None:
    lines = [("Accept", "text/html"), ("Accept", "application/json;q=0.5"), ("Accept", "image/*")]
    for sent in (lines, lines[::-1]):
        answer = client.request("POST", "/generate?label=3", headers=sent)
        assert answer.headers["Content-Type"] == "image/png"


def test_the_limits_themselves_are_allowed(client: httpx.Client) -> None:
    answer = post(client, "label=7&n=1024&seed=1")
    assert decode(answer.content).size == (32 * 28, 32 * 28)
    labels = "&".join(["label=7"] * 1024)
    assert post(client, f"{labels}&n=1&seed=1").content == answer.content


def test_models_tell_what_is_served(client: httpx.Client) -> None:
    models = {each["name"]: each for each in client.get("/models").json()["models"]}
    assert models.keys() >= {"mnist", "mnist-mlp", "fashion-mnist"}
    assert [name for name, each in models.items() if each["default"]] == ["mnist"]
    model = models["mnist"]
    assert model["classes"][7] == "seven"
    assert (model["image_size"], model["channels"]) == (28, 1)
    assert model["network"]["kind"] == "conv"
    assert model["certificate"]["generated"]["gan_test"] >= 0.99
    assert models["mnist-mlp"]["network"]["kind"] == "mlp"
    assert models["fashion-mnist"]["classes"][7] == "sneaker"


def test_the_schema_describes_the_front_door(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    operation = schema["paths"]["/generate"]["post"]
    parameters = {each["name"]: each for each in operation["parameters"]}
    assert parameters.keys() == {
        *("label", "n", "seed", "model", "format", "scale", "timeout_ms"),
    }
    assert parameters["label"]["required"] is True
    assert parameters["n"]["schema"]["maximum"] == 1024
    assert operation["responses"]["200"]["content"].keys() == {
        "image/png",
        "application/zip",
        "application/json",
    }
    assert client.get("/docs").status_code == 200
