"""The bundled models on a real socket of this process, which starts faster than another one."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.processes import REPOSITORY
from tests.support.serving import LocalService, serve_here


@pytest.fixture(scope="session")
def service() -> Iterator[LocalService]:
    """Serve the bundled models, without self-tests: they would count in the metrics."""
    models = str(REPOSITORY / "weights")
    with serve_here("--models", models, "--self-test-interval-s", "3600") as running:
        yield running


@pytest.fixture
def client(service: LocalService) -> httpx.Client:
    return service.client
