"""The format that an Accept header chooses; `test_generate.py` tests the formats."""

import pytest

from service.encoding.images import negotiate
from service.errors import Problem


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("text/html,image/avif,image/webp,*/*;q=0.8", "png"),
        ("application/*", "zip"),
        ("application/json", "json"),
        ("application/json;q=0.1, application/zip;q=0.9", "zip"),
        ("image/png;q=0.5, application/json", "json"),
    ],
)
def test_accept_chooses_the_format(accept: str, chosen: str) -> None:
    assert negotiate(accept) == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg", "nonsense", "a/b/c", ";;;", "png"])
def test_an_accept_header_that_nothing_matches_is_406(accept: str) -> None:
    with pytest.raises(Problem) as caught:
        negotiate(accept)
    assert caught.value.status == 406
    assert "image/png, application/zip, application/json, multipart/mixed" in caught.value.detail
