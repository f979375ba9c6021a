"""The guarantees of docker-compose.yml, as far as they can be read without an engine."""

import re
from typing import Any

import pytest
import yaml

from tests.support.processes import REPOSITORY

COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DEPLOY = REPOSITORY / "service" / "deploy"


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_locked_down_and_reached_from_this_machine_alone(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["init"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port)


def test_without_a_name_only_the_gpu_service_starts() -> None:
    assert [name for name, each in SERVICES.items() if "profiles" not in each] == ["api"]
    (device,) = SERVICES["api"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert SERVICES["api-cpu"]["environment"] == {"CGAN_DEVICE": "cpu"}


@pytest.mark.parametrize("name", ["train", "train-cpu"])
def test_a_training_publishes_into_the_folder_that_is_served(name: str) -> None:
    train = SERVICES[name]
    (served,) = SERVICES["api"]["volumes"]
    assert served == SERVICES["api-cpu"]["volumes"][0] == "weights:/app/weights:ro"
    assert "weights:/app/weights" in train["volumes"]
    command = train["command"]
    assert command[command.index("--export-to") + 1] == "weights/trained.safetensors"
    assert train["restart"] == "no"
    # Only a name, or the profile on a GPU host, starts one.
    assert train["profiles"] == (["training"] if name == "train" else ["cpu"])
    assert ("deploy" in train) is (name == "train")


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_monitoring_has_all_that_it_mounts(name: str) -> None:
    service = SERVICES[name]
    assert service["profiles"] == ["monitoring"]
    assert re.fullmatch(r"[\w/]+:v?[\d.]+", service["image"])  # of a version
    for volume in service["volumes"]:
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            assert any((REPOSITORY / source).iterdir())
            assert rest.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


def test_prometheus_looks_for_the_services_and_grafana_for_prometheus() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (discovery,) = config["scrape_configs"][0]["dns_sd_configs"]
    assert set(discovery["names"]) <= SERVICES.keys()
    for name in discovery["names"]:
        assert SERVICES[name]["ports"][0].endswith(f":{discovery['port']}")
    folder = DEPLOY / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"][0].endswith(":9090")
