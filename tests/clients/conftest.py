"""Skips these tests, which take long or need a registry, unless the extra `clients` is there."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("kserve") is None:
        skip = pytest.mark.skip(reason="needs the extra: pip install -e '.[clients]'")
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def torchvision() -> Iterator[Any]:
    """torchvision, also beside PyTorch for the CPU, where the operators of PyPI's do not load.

    They are declared in their place, as it cannot be imported otherwise; no test calls them.
    """
    library = pytest.importorskip("torch.library").Library("torchvision", "FRAGMENT")
    try:
        import torchvision.datasets  # noqa: PLC0415
    except RuntimeError:
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(f"nms{boxes}")
        library.define(f"qnms{boxes}")
    except ImportError:
        pytest.skip("needs torchvision")
    import torchvision.datasets  # noqa: PLC0415

    yield torchvision  # noqa: PT022  (operators last as long as the library)
