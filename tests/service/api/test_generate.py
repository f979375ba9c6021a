import base64
import io
import json
import re
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from email.policy import HTTP
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.encoding.images import MEDIA_TYPES
from tests.support.serving import Service
from tests.support.wire import address, wait_until

Params = list[tuple[str, str]]


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
        ("label=7&format=gif", "format", "gif", "one of png, zip, json, multipart, npz"),
        ("label=7&scale=0", "scale", "0", "an integer from 1 to 16"),
        ("label=7&n=1024&scale=16", "scale", "16", "at most 16777216 are allowed"),
        ("label=7&lable=8", "lable", "8", "unknown parameter"),
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
def test_a_body_that_is_not_json_is_415(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/generate", content=content)
    assert answer.status_code == 415
    assert answer.json()["errors"][0]["field"] == "Content-Type"
    assert "application/json" in answer.json()["detail"]


def test_a_body_is_refused_where_none_belongs(client: httpx.Client) -> None:
    answer = client.request("GET", "/generate?label=7&seed=1", content=iter([b"label=7"]))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "body"
    assert answer.json()["errors"][0]["value"] == "transfer-encoding: chunked"
    answer = client.post("/generate?label=7", json={"n": 2})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "query"


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


def test_the_schema_describes_generate(client: httpx.Client) -> None:
    operations = client.get("/openapi.json").json()["paths"]["/generate"]
    plain = {"label", "n", "seed", "index", "model", "format", "scale", "timeout_ms"}
    for operation in operations.values():
        parameters = {each["name"]: each for each in operation["parameters"]}
        assert parameters.keys() == plain | {"mix", "to_seed", "steps", "at", "truncation"}
        assert parameters["n"]["schema"]["maximum"] == 1024
        assert operation["responses"]["200"]["content"].keys() == set(MEDIA_TYPES.values())
    assert "304" in operations["get"]["responses"]
    assert operations["post"]["requestBody"]["content"].keys() == {"application/json"}
    assert client.get("/docs").status_code == 200


def images(answer: httpx.Response) -> NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        found: NDArray[np.uint8] = arrays["images"]
    return found


def test_an_index_gives_the_images_from_there_on(client: httpx.Client) -> None:
    whole = images(post(client, "label=7&n=8&seed=3&format=npz"))
    rest = images(post(client, "label=7&n=3&seed=3&index=5&format=npz"))
    assert (rest == whole[5:]).all()
    alone = post(client, "label=7&seed=3&index=5")
    assert (np.asarray(decode(alone.content)) == whole[5, :, :, 0]).all()
    assert json.loads(decode(alone.content).info["Recipe"])["index"] == 5


def test_a_mixture_of_one_class_is_that_class(client: httpx.Client) -> None:
    one = images(post(client, "mix=seven:3&mix=eight:0&n=4&seed=3&format=npz"))
    assert (one == images(post(client, "label=7&n=4&seed=3&format=npz"))).all()


def test_a_mixture_is_between_its_classes(client: httpx.Client) -> None:
    half = images(post(client, "mix=3:0.5&mix=8:0.5&n=16&seed=3&format=npz")).astype(int)
    three, eight = (
        images(post(client, f"label={label}&n=16&seed=3&format=npz")) for label in (3, 8)
    )
    apart = np.abs(three.astype(int) - eight).mean()
    for end in (three, eight):
        assert 0.1 * apart < np.abs(half - end).mean() < apart
    nearer = images(post(client, "mix=3:0.9&mix=8:0.1&n=16&seed=3&format=npz")).astype(int)
    assert np.abs(nearer - three).mean() < np.abs(half - three).mean()


def test_a_mixture_names_its_weights_as_they_were_given(client: httpx.Client) -> None:
    answer = post(client, "mix=3:2&mix=8:6&seed=3&format=json").json()
    (entry,) = answer["images"]
    assert (entry["label"], entry["class_name"]) == (None, None)
    assert entry["recipe"]["mix"] == {"three": 2.0, "eight": 6.0}
    with np.load(
        io.BytesIO(post(client, "mix=3:2&mix=8:6&n=2&seed=3&format=npz").content)
    ) as arrays:
        assert arrays["mix"].shape == (2, 10)
        assert arrays["mix"][1, [3, 8]].tolist() == [0.25, 0.75]
        assert "labels" not in arrays


def test_an_interpolation_leads_from_the_image_of_one_seed_to_that_of_another(
    client: httpx.Client,
) -> None:
    path = images(post(client, "label=7&seed=1&to_seed=2&steps=9&n=2&format=npz"))
    assert len(path) == 18
    for first, index in ((0, 0), (9, 1)):
        start = images(post(client, f"label=7&seed=1&index={index}&format=npz"))
        end = images(post(client, f"label=7&seed=2&index={index}&format=npz"))
        assert (path[first] == start[0]).all()
        assert (path[first + 8] == end[0]).all()
        moved = np.abs(np.diff(path[first : first + 9].astype(int), axis=0)).mean(axis=(1, 2, 3))
        apart = np.abs(start.astype(int) - end).mean()
        assert (moved > 0).all()
        assert moved.max() < apart
    between = images(post(client, "label=7&seed=1&to_seed=2&at=0.25&format=npz"))
    assert (between[0] == path[2]).all()


def test_less_truncation_is_more_variety(client: httpx.Client) -> None:
    spread = [
        images(post(client, f"label=7&n=64&seed=3&truncation={each}&format=npz")).std(axis=0).mean()
        for each in (0.1, 0.5, 1)
    ]
    assert spread[0] < spread[1] < spread[2]
    plain = post(client, "label=7&n=4&seed=3")
    assert post(client, "label=7&n=4&seed=3&truncation=1.0").content == plain.content


def test_a_variation_is_the_same_alone_and_in_a_crowd(client: httpx.Client) -> None:
    queries = [
        "label=7&seed=5&format=npz",
        "mix=3:1&mix=8:1&n=3&seed=5&format=npz",
        "mix=1:1&mix=2:3&n=2&seed=5&to_seed=9&steps=4&format=npz",
        "label=4&seed=5&to_seed=9&steps=40&truncation=0.7&format=npz",
    ]
    alone = [post(client, query).content for query in queries]
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(lambda query: post(client, query).content, queries * 16))
    assert crowd == alone * 16


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({"labels": ["3", 8], "n": 4}, "label=3&label=8&n=4"),
        ({"label": "seven"}, "label=7"),
        ({"mix": {"3": 0.5, "8": 0.5}}, "mix=3:0.5&mix=8:0.5"),
        (
            {"interpolate": {"from_seed": 1, "to_seed": 2, "steps": 16}, "label": 7},
            "label=7&seed=1&to_seed=2&steps=16",
        ),
        (
            {"interpolate": {"to_seed": 2, "at": 0.5}, "label": 7, "seed": 1, "truncation": 0.5},
            "label=7&seed=1&to_seed=2&at=0.5&truncation=0.5",
        ),
    ],
)
def test_a_json_body_asks_for_the_same_as_a_query(
    client: httpx.Client, body: dict[str, Any], query: str
) -> None:
    if "seed=" not in query:
        body, query = body | {"seed": 11}, f"{query}&seed=11"
    more = {"format": "zip", "scale": 2, "model": "mnist-mlp", "timeout_ms": 60_000}
    answer = client.post("/generate", json=body | more)
    assert answer.status_code == 200
    asked = query + "".join(f"&{name}={value}" for name, value in more.items())
    assert answer.content == post(client, asked).content


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[1]", "body"),
        (b'{"labels": [true]}', "labels"),
        (b'{"labels": []}', "labels"),
        (b'{"labels": [7], "label": 7}', "label"),
        (b'{"label": 10}', "label"),
        (b'{"label": -1}', "label"),
        (b'{"label": 7, "n": "4"}', "n"),
        (b'{"label": 7, "n": 4.5}', "n"),
        (b'{"n": 4}', "label"),
        (b'{"label": 7, "mix": {"3": 1}}', "mix"),
        (b'{"mix": {"3": 0, "8": 0}}', "mix"),
        (b'{"mix": {"3": 1, "three": 1}}', "mix"),
        (b'{"mix": {"ten": 1}}', "mix"),
        (b'{"mix": {"3": NaN}}', "mix"),
        (b'{"label": 7, "truncation": 0}', "truncation"),
        (b'{"label": 7, "truncation": NaN}', "truncation"),
        (b'{"label": 7, "interpolate": {"to_seed": 2}}', "steps"),
        (b'{"label": 7, "interpolate": {"to_seed": 2, "steps": 1}}', "steps"),
        (b'{"label": 7, "interpolate": {"to_seed": 2, "steps": 3, "at": 0.5}}', "at"),
        (b'{"label": 7, "interpolate": {"from_seed": 1, "steps": 3}}', "to_seed"),
        (b'{"label": 7, "seed": 1, "interpolate": {"from_seed": 1, "to_seed": 2}}', "seed"),
        (b'{"label": 7, "interpolate": {"to_seed": 2, "steps": 1024}, "n": 2}', "n"),
        (b'{"lable": 7}', "lable"),
        (b"[" * 100_000, "body"),
    ],
)
def test_a_wrong_value_in_a_body_is_named(client: httpx.Client, body: bytes, field: str) -> None:
    headers = {"Content-Type": "application/json"}
    if not body:  # httpx says nothing of an empty body; then the query counts
        field = "label"
    answer = client.post("/generate", content=body, headers=headers)
    assert answer.status_code == 422
    assert field in [each["field"] for each in answer.json()["errors"]]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("label=7&steps=3", "to_seed"),
        ("label=7&at=0.5", "to_seed"),
        ("label=7&to_seed=3", "steps"),
        ("label=7&to_seed=3&at=2", "at"),
        ("label=7&to_seed=3&at=nan", "at"),
        ("mix=7", "mix"),
        ("mix=7:x", "mix"),
        ("mix=7:-1", "mix"),
        ("mix=7:inf", "mix"),
        ("label=7&mix=7:1", "mix"),
        ("label=7&truncation=1.5", "truncation"),
        ("label=7&index=-1", "index"),
    ],
)
def test_a_wrong_condition_is_named(client: httpx.Client, query: str, field: str) -> None:
    assert wrong(client, query)["field"] == field


def test_multipart_holds_the_same_pngs(client: httpx.Client) -> None:
    answer = post(client, "label=3&label=8&n=2&seed=6", Accept="multipart/mixed")
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    parts = message_from_bytes(head + answer.content, policy=HTTP).iter_parts()
    files = {part.get_filename(): part.get_payload(decode=True) for part in parts}
    assert files == archive(post(client, "label=3&label=8&n=2&seed=6&format=zip"))[0]


def test_npz_holds_the_pixels_and_what_they_are_of(client: httpx.Client) -> None:
    answer = post(client, "label=3&label=8&n=2&seed=6&scale=2", Accept="application/x-npz")
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        assert arrays["images"].shape == (4, 56, 56, 1)
        assert arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [3, 3, 8, 8]
        assert arrays["indices"].tolist() == [0, 1, 0, 1]
        assert arrays["seeds"].tolist() == [6] * 4
        assert arrays["class_names"][3] == "three"
    assert post(client, "label=3&label=8&n=2&seed=6&scale=2&format=npz").content == answer.content


def get(client: httpx.Client, query: str, **headers: str) -> httpx.Response:
    return client.get(f"/generate?{query}", headers={"Accept": "image/png", **headers})


def test_getting_gives_the_same_and_a_name_for_it(client: httpx.Client) -> None:
    answer = get(client, "label=7&n=4&seed=3")
    assert answer.content == post(client, "label=7&n=4&seed=3").content
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Vary"] == "accept"
    tag = answer.headers["ETag"]
    assert get(client, "label=seven&n=4&seed=3&scale=1").headers["ETag"] == tag
    for other in ("label=8&n=4&seed=3", "label=7&n=5&seed=3", "label=7&n=4&seed=4"):
        assert get(client, other).headers["ETag"] != tag
    for more in ("scale=2", "format=zip", "truncation=0.5", "model=mnist-mlp", "index=1"):
        assert get(client, f"label=7&n=4&seed=3&{more}").headers["ETag"] != tag


def test_what_a_client_has_is_not_made_again(client: httpx.Client) -> None:
    tag = get(client, "label=7&n=4&seed=3").headers["ETag"]
    before = made(client)
    for header in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        answer = get(client, "label=7&n=4&seed=3", **{"If-None-Match": header})
        assert answer.status_code == 304
        assert answer.content == b""
        assert answer.headers["ETag"] == tag
        assert "X-Request-ID" in answer.headers
    assert made(client) == before
    assert get(client, "label=7&n=4&seed=3", **{"If-None-Match": '"other"'}).status_code == 200
    assert made(client) == before + 4


def made(client: httpx.Client) -> float:
    """Images that left the engine."""
    (line,) = re.findall(
        r"^cgan_batch_images_sum (\S+)$", client.get("/metrics").text, re.MULTILINE
    )
    return float(line)


def test_images_of_a_pinned_model_may_be_cached_forever(client: httpx.Client) -> None:
    identity = get(client, "label=7&seed=3").headers["X-Model"]
    pinned = get(client, f"label=7&seed=3&model={identity}")
    assert pinned.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert pinned.content == get(client, "label=7&seed=3").content
    other = identity[:-1] + ("0" if identity[-1] != "0" else "1")
    assert wrong(client, f"label=7&model={other}", 404)["field"] == "model"


def test_a_drawn_seed_is_not_kept(client: httpx.Client) -> None:
    answer = get(client, "label=7")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "ETag" not in answer.headers
    for header in ("*", "accept"):
        other = get(client, "label=7", **{"If-None-Match": header})
        assert other.status_code == 200
        assert other.content != answer.content


def test_a_head_is_the_head_of_the_answer(client: httpx.Client) -> None:
    whole = get(client, "label=7&seed=3")
    head = client.head("/generate?label=7&seed=3")
    assert head.content == b""
    for name in ("Content-Length", "ETag", "Content-Type", "X-Seed"):
        assert head.headers[name] == whole.headers[name]


def verify(client: httpx.Client, png: bytes, status: int = 200) -> dict[str, Any]:
    answer = client.post("/verify", content=png, headers={"Content-Type": "image/png"})
    assert answer.status_code == status, answer.text
    return dict(answer.json())


@pytest.mark.parametrize(
    "query",
    [
        "label=7",
        "label=seven&seed=3&index=8&scale=4&model=mnist-mlp",
        "label=3&label=8&n=8&truncation=0.4",
        "mix=3:1&mix=8:3",
        "mix=3:0.1&mix=8:0.2&n=5&to_seed=3&steps=3&scale=2",
        "label=7&to_seed=3&at=0.1",
    ],
)
def test_every_image_is_what_its_recipe_says(client: httpx.Client, query: str) -> None:
    png = post(client, query).content
    verdict = verify(client, png)
    assert (verdict["same_pixels"], verdict["same_file"]) == (True, True)
    assert verdict["recipe"]["sha256"] in verdict["model"]
    # The same picture by another encoder, and another picture with the same recipe.
    image = decode(png)
    text = PngInfo()
    text.add_text("Recipe", image.info["Recipe"])
    verdict = verify(client, saved(image, text))
    assert (verdict["same_pixels"], verdict["same_file"]) == (True, False)
    image.putpixel((14, 14), 128 if image.getpixel((14, 14)) == 0 else 0)
    verdict = verify(client, saved(image, text))
    assert (verdict["same_pixels"], verdict["same_file"]) == (False, False)
    assert verdict["detail"].startswith("1 of ")
    for size in ((9, 9), (100_000, 1)):  # the second must not enlarge anything to its width
        verdict = verify(client, saved(Image.new(image.mode, size), text))
        assert verdict["same_pixels"] is False


def test_a_client_that_disconnects_before_the_end_of_its_file_is_not_a_fault(
    client: httpx.Client, service: Service
) -> None:
    def gone() -> bool:
        text = client.get("/metrics").text
        assert 'route="/verify",status="500"' not in text
        return 'method="POST",route="/verify",status="499"' in text

    with socket.create_connection(address(service)) as connection:
        connection.sendall(
            b"POST /verify HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n\x89PNG"
        )
    wait_until(gone, "the request is counted as left")


def saved(image: Image.Image, text: PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def with_recipe(**changed: object) -> bytes:
    recipe = {"model": "mnist", "sha256": "0" * 64, "label": 1, "seed": 1, "index": 1}
    text = PngInfo()
    text.add_text("Recipe", json.dumps(recipe | changed))
    return saved(Image.new("L", (28, 28)), text)


@pytest.mark.parametrize(
    ("png", "field", "status"),
    [
        (b"", "body", 422),
        (b"GIF89a", "body", 422),
        (saved(Image.new("L", (28, 28))), "body", 422),
        (saved(Image.new("L", (28, 28)))[:60], "body", 422),
        (saved(Image.new("RGBA", (28, 28))), "body", 422),
        (with_recipe(), "sha256", 404),
        (with_recipe(seed=-1), "seed", 422),
        (with_recipe(label="1"), "label", 422),
        (with_recipe(more=1), "more", 422),
    ],
)
def test_what_cannot_be_verified_is_refused(
    client: httpx.Client, png: bytes, field: str, status: int
) -> None:
    problem = verify(client, png, status)
    assert [each["field"] for each in problem["errors"]] == [field]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"label": 10}, "label"),
        ({"label": None}, "label"),
        ({"labels": [1]}, "label"),
        ({"indices": [1]}, "index"),
        ({"index": None, "indices": [1, 2]}, "label"),
        ({"to_seed": 2}, "at"),
        ({"to_seed": 2, "at": [0.1, 0.2]}, "at"),
        ({"label": None, "mix": {"ten": 1.0}}, "mix"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(
    client: httpx.Client, changed: dict[str, object], field: str
) -> None:
    models = {each["name"]: each["sha256"] for each in client.get("/models").json()["models"]}
    problem = verify(client, with_recipe(sha256=models["mnist"], **changed), 422)
    assert [each["field"] for each in problem["errors"]] == [field]
