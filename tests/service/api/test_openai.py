import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from service.api.openai import find_class
from service.errors import Problem
from service.inference.repository import Model
from tests.support.serving import LocalService, Service, serve_here


@pytest.fixture
def remote(service: Service) -> Iterator[openai.OpenAI]:
    base_url = f"{service.client.base_url}/v1"
    with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
def models(service: LocalService) -> dict[str, Model]:
    return {model.name: model for model in service.repository}


def files(response: openai.types.ImagesResponse) -> list[bytes]:
    assert response.data is not None
    return [base64.b64decode(each.b64_json or "") for each in response.data]


def test_a_prompt_gives_the_images_of_generate(client: httpx.Client, remote: openai.OpenAI) -> None:
    response = remote.images.generate(
        model="mnist", prompt="a seven", n=2, response_format="b64_json", extra_body={"seed": 5}
    )
    expected = [
        client.post(f"/generate?label=7&seed=5&index={index}").content for index in range(2)
    ]
    assert files(response) == expected
    assert response.data is not None
    assert {each.revised_prompt for each in response.data} == {"seven"}
    assert response.created > 1_700_000_000


def test_without_a_seed_every_answer_differs(remote: openai.OpenAI) -> None:
    one, other = (files(remote.images.generate(prompt="3")) for _ in range(2))
    assert len(one) == 1
    assert one != other


def test_size_enlarges_by_whole_pixels(client: httpx.Client, remote: openai.OpenAI) -> None:
    large = remote.images.generate(
        prompt="three",
        size="84x84",
        extra_body={"seed": 1, "truncation": 0.5},
    )
    with Image.open(io.BytesIO(files(large)[0])) as image:
        assert image.size == (84, 84)
        pixels = np.asarray(image)
    small = client.post("/generate?label=3&seed=1&truncation=0.5").content
    with Image.open(io.BytesIO(small)) as image:
        assert np.array_equal(pixels, np.asarray(image).repeat(3, 0).repeat(3, 1))


def test_the_asynchronous_client_is_answered_too(service: Service) -> None:
    async def ask() -> list[list[bytes]]:
        base_url = f"{service.client.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="any") as remote:
            asked = [
                remote.images.generate(prompt="nine", extra_body={"seed": 4}) for _ in range(8)
            ]
            return [files(response) for response in await asyncio.gather(*asked)]

    expected = [service.client.post("/generate?label=9&seed=4").content]
    assert all(found == expected for found in asyncio.run(ask()))


def test_the_headers_say_what_made_the_images(remote: openai.OpenAI) -> None:
    raw = remote.images.with_raw_response.generate(prompt="3", extra_body={"seed": 11})
    assert raw.headers["X-Seed"] == "11"
    assert raw.headers["X-Model"].startswith("mnist@sha256:")
    assert "forward;dur=" in raw.headers["Server-Timing"]


def test_models_are_listed(client: httpx.Client, remote: openai.OpenAI) -> None:
    served = [each["name"] for each in client.get("/models").json()["models"]]
    assert [each.id for each in remote.models.list()] == served
    assert remote.models.retrieve("mnist").owned_by == "cgan-service"
    with pytest.raises(openai.NotFoundError, match="is not loaded; allowed:"):
        remote.models.retrieve("nobody")


def test_a_wrong_value_is_an_error_of_the_client(remote: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="names no class of mnist") as caught:
        remote.images.generate(prompt="a cat")
    assert caught.value.param == "prompt"
    assert caught.value.code == "invalid_value"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="must be auto, or WIDTHxHEIGHT"):
        remote.images.generate(prompt="7", size="large")
    with pytest.raises(openai.BadRequestError) as caught:
        remote.images.generate(prompt="7", n=1025)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="pixels in all"):
        remote.images.generate(prompt="7", n=1024, size="448x448")
    with pytest.raises(openai.NotFoundError):
        remote.images.generate(prompt="7", model="nobody")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"output_format": "webp"}, "must be png; other formats are not available"),
        ({"background": "transparent"}, "must be auto or opaque"),
        ({"stream": True}, "must be false; images are sent when all are complete"),
        ({"response_format": "b64"}, "must be b64_json or url"),
    ],
)
def test_what_cannot_be_given_is_refused(
    remote: openai.OpenAI, asked: dict[str, Any], words: str
) -> None:
    ((name, _),) = asked.items()
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        remote.images.generate(prompt="7", extra_body=asked)
    assert caught.value.param == name
    assert caught.value.type == "invalid_request_error"


def test_what_changes_no_image_is_accepted(remote: openai.OpenAI) -> None:
    plain = files(remote.images.generate(prompt="7", extra_body={"seed": 1}))
    everything = remote.images.generate(
        prompt="7",
        quality="hd",
        style="vivid",
        background="opaque",
        moderation="low",
        output_format="png",
        output_compression=100,
        stream=False,
        user="someone",
        extra_body={"seed": 1, "partial_images": 0, "unknown": {"to": "us"}},
    )
    assert files(everything) == plain
    fields = (
        "model n size response_format quality style background moderation output_format "
        "output_compression stream user"
    )
    nulls = dict.fromkeys(fields.split())
    assert files(remote.images.generate(prompt="7", extra_body={"seed": 1, **nulls})) == plain


@pytest.mark.parametrize("response_format", ["url", None])
def test_a_link_gives_the_image_for_ever(
    client: httpx.Client, remote: openai.OpenAI, response_format: Any
) -> None:
    asked = {"seed": 2**64 - 1, "truncation": 0.5, "response_format": response_format}
    linked = remote.images.generate(prompt="7", n=2, size="56x56", extra_body=asked)
    assert linked.data is not None
    asked["response_format"] = "b64_json"
    sent = remote.images.generate(prompt="7", n=2, size="56x56", extra_body=asked)
    assert sent.data is not None
    assert [each.url for each in sent.data] == [None, None]
    for position, expected in enumerate(files(sent)):
        link = linked.data[position].url
        assert link is not None
        assert link.startswith(f"{client.base_url}/generate?model=mnist@sha256:")
        answer = client.get(link, headers={"Accept": "application/json, text/plain, */*"})
        assert answer.headers["Content-Type"] == "image/png"
        assert "immutable" in answer.headers["Cache-Control"]
        assert answer.content == expected
    if response_format == "url":
        assert [each.b64_json for each in linked.data] == [None, None]
    else:
        assert files(linked) == files(sent)


def test_a_link_has_the_host_that_the_client_used(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/images/generations",
        json={"prompt": "7", "response_format": "url"},
        headers={"Host": "images.example:8443", "X-Forwarded-Host": "elsewhere.example"},
    )
    assert answer.json()["data"][0]["url"].startswith("http://images.example:8443/generate?")
    assert answer.headers["X-Seed"] in answer.json()["data"][0]["url"]


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (None, 28),
        ("auto", 28),
        ("28x28", 28),
        ("256x256", 252),
        ("512x512", 448),
        ("1024x1024", 448),
        ("100x200", 112),
        ("1x1", 28),
    ],
)
def test_an_image_has_the_nearest_whole_multiple_of_the_models_size(
    remote: openai.OpenAI, size: Any, given: int
) -> None:
    response = remote.images.generate(prompt="7", size=size)
    assert response.size == f"{given}x{given}"
    with Image.open(io.BytesIO(files(response)[0])) as image:
        assert image.size == (given, given)


def test_an_unknown_model_may_stand_for_the_default_one() -> None:
    with serve_here("--openai-unknown-model", "default") as service:
        base_url = f"{service.client.base_url}/v1"
        with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as remote:
            expected = files(remote.images.generate(prompt="7", extra_body={"seed": 1}))
            for model in ("dall-e-3", "gpt-image-1", "mnist"):
                raw = remote.images.with_raw_response.generate(
                    model=model, prompt="7", extra_body={"seed": 1}
                )
                assert raw.headers["X-Model"].startswith("mnist@sha256:")
                assert files(raw.parse()) == expected
            with pytest.raises(openai.NotFoundError, match="mnist is now"):
                remote.images.generate(model="mnist@sha256:0", prompt="7")


def test_an_unknown_model_is_refused_with_the_names_of_the_models(remote: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"allowed: .*mnist-mlp") as caught:
        remote.images.generate(model="dall-e-3", prompt="7")
    assert caught.value.param == "model"


def test_what_is_no_json_is_an_error_of_that_shape(client: httpx.Client) -> None:
    for body in (b"{", b"[]", b"\xff"):
        answer = client.post(
            "/v1/images/generations", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"


def test_a_key_is_that_of_the_client_and_its_limit_is_retried() -> None:
    with serve_here(
        "--api-keys",
        "me:a-secret-of-16-characters",
        "--images-per-second",
        "2",
        "--burst-images",
        "5",
    ) as service:
        base_url = f"{service.client.base_url}/v1"
        with (
            openai.OpenAI(base_url=base_url, api_key="wrong") as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.images.generate(prompt="7")
        secret = "a-secret-of-16-characters"
        with openai.OpenAI(base_url=base_url, api_key=secret, max_retries=0) as once:
            assert len(files(once.images.generate(prompt="7", n=5))) == 5
            with pytest.raises(openai.RateLimitError) as caught:
                once.images.generate(prompt="7", n=5)
            assert caught.value.type == "rate_limit_error"
        with openai.OpenAI(base_url=base_url, api_key=secret) as patient:
            assert len(files(patient.images.generate(prompt="7", n=5))) == 5


@pytest.mark.parametrize(
    ("model", "prompt", "expected"),
    [
        ("mnist", "seven", "seven"),
        ("mnist", "7", "seven"),
        ("mnist", "A handwritten SEVEN, please!", "seven"),
        ("mnist", "two sevens", None),
        ("mnist", "sevens", "seven"),
        ("mnist", "a picture of 4", "four"),
        ("mnist", "seventeen", None),
        ("mnist", "", None),
        ("fashion-mnist", "an ankle boot", "ankle-boot"),
        ("fashion-mnist", "sneakers", "sneaker"),
        ("fashion-mnist", "a dress", "dress"),
        ("fashion-mnist", "t-shirt", "t-shirt"),
        ("fashion-mnist", "a red shirt", "shirt"),
        ("fashion-mnist", "a bag and a coat", None),
    ],
)
def test_a_phrase_names_exactly_one_class(
    models: dict[str, Model], model: str, prompt: str, expected: str | None
) -> None:
    chosen = models[model]
    if expected is None:
        with pytest.raises(Problem) as caught:
            find_class(chosen, prompt)
        assert caught.value.errors[0].field == "prompt"
    else:
        assert find_class(chosen, prompt) == expected
