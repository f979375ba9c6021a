"""The bundled models on a real socket of this process, which starts faster than another one."""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from service.app import create_app
from service.inference.repository import load_repository
from service.settings import Settings
from tests.support.serving import serving


@dataclass(frozen=True)
class Service:
    """A service in this process."""

    client: httpx.Client


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Serve the bundled models, without self-tests: they would count in the metrics."""
    settings = Settings.model_construct(self_test_interval_s=3600.0)
    with serving(create_app(settings, load_repository(settings))) as client:
        yield Service(client)


@pytest.fixture
def client(service: Service) -> httpx.Client:
    return service.client
