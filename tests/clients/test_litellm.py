"""LiteLLM, which asks for images in the form of OpenAI's API."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.serving import MODEL, LocalService, serve_here

litellm: Any = pytest.importorskip("litellm")

# Raised by pydantic, for types that LiteLLM declares.
pytestmark = pytest.mark.filterwarnings("ignore:Items? .* using the `ReadOnly` qualifier")


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with serve_here("--models", str(MODEL), "--openai-unknown-model", "default") as running:
        yield running


def ask(service: LocalService, model: str, **parameters: Any) -> Any:
    return litellm.image_generation(
        model=f"openai/{model}",
        prompt="a seven",
        api_base=f"{service.client.base_url}/v1",
        api_key="any",
        **parameters,
    )


def test_it_gets_the_images_of_generate(service: LocalService) -> None:
    response = ask(service, "mnist", n=2, extra_body={"seed": 5})
    expected = [
        service.client.post(f"/generate?label=7&seed=5&index={index}").content for index in (0, 1)
    ]
    assert [base64.b64decode(each.b64_json) for each in response.data] == expected
    assert [each.revised_prompt for each in response.data] == ["seven", "seven"]


def test_it_gets_links_that_give_the_images(service: LocalService) -> None:
    response = ask(service, "mnist", extra_body={"seed": 5, "response_format": "url"})
    assert response.data[0].b64_json is None
    expected = service.client.post("/generate?label=7&seed=5").content
    assert service.client.get(response.data[0].url).content == expected


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("dall-e-3", {"quality": "hd", "size": "1024x1024", "user": "someone"}),
        ("gpt-image-1", {"quality": "high", "background": "opaque", "moderation": "low"}),
    ],
)
def test_what_it_sends_for_models_of_openai_is_accepted(
    service: LocalService, model: str, parameters: dict[str, str]
) -> None:
    response = ask(service, model, **parameters)
    assert response.data[0].revised_prompt == "seven"


def test_it_is_told_what_is_wrong(service: LocalService) -> None:
    with pytest.raises(litellm.BadRequestError, match="must be auto or opaque"):
        ask(service, "gpt-image-1", background="transparent")
