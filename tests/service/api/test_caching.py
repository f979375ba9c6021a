"""Matching of ETags; `test_generate.py` checks that equal ETags mean equal bytes."""

import pytest

from service.api.caching import matches


@pytest.mark.parametrize(
    ("header", "expected"),
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
def test_a_header_matches_a_tag_that_it_names(header: str | None, expected: bool) -> None:
    assert matches(header, '"a"') is expected
