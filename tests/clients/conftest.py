"""Skips these tests, which take long or need a registry, unless the extra `clients` is there."""

from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("kserve") is None:
        skip = pytest.mark.skip(reason="needs the extra: pip install -e '.[clients]'")
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(skip)
