"""Which answers share a name; that they are then the same bytes is seen in `test_native.py`."""

import pytest

from service.api.caching import is_known


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ('"a"', True),
        ('W/"a"', True),
        ('"b", "a"', True),
        ("*", True),
        ('"b"', False),
        ("a", False),
        ("", False),
        (None, False),
        ('"ab"', False),
    ],
)
def test_a_tag_is_known_where_the_header_names_it(header: str | None, known: bool) -> None:
    assert is_known(header, '"a"') is known
