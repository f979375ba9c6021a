"""The manifests against the schemas of Kubernetes and of the custom resources, and each other."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings, parse
from tests.support.processes import REPOSITORY

KUBERNETES = REPOSITORY / "service" / "deploy" / "kubernetes"
BASE = KUBERNETES / "base"
LABELS = {"app.kubernetes.io/name": "cgan"}


def closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has no other property."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
NUMBER = {"type": "integer", "minimum": 0}
SELECTOR = closed(("matchLabels",), matchLabels={"type": "object", "additionalProperties": TEXT})
# The part of the definitions of the Prometheus Operator and KEDA that the manifests use.
CUSTOM = {
    "ServiceMonitor": closed(
        ("selector", "endpoints"),
        selector=SELECTOR,
        jobLabel=TEXT,
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ("port",), port=TEXT, path=TEXT, interval={"type": "string", "pattern": r"^\d+s$"}
            ),
        },
    ),
    "ScaledObject": closed(
        ("scaleTargetRef", "triggers"),
        scaleTargetRef=closed(("name",), name=TEXT),
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        cooldownPeriod=NUMBER,
        triggers={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ("type", "metadata"),
                type={"const": "prometheus"},
                metricType={"enum": ["AverageValue", "Value"]},
                metadata=closed(
                    ("serverAddress", "query", "threshold"),
                    serverAddress=TEXT,
                    query=TEXT,
                    threshold=TEXT,
                ),
            ),
        },
    ),
}


def read(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def resources() -> dict[str, dict[str, Any]]:
    """Return every resource of the base by its kind."""
    (kustomization,) = read(BASE / "kustomization.yaml")
    found = [each for name in kustomization["resources"] for each in read(BASE / name)]
    assert sorted(kustomization["resources"]) == sorted(
        path.name for path in BASE.iterdir() if path.name != "kustomization.yaml"
    )
    return {each["kind"]: each for each in found}


def check(resource: dict[str, Any]) -> None:
    """Validate strictly: a misspelt field is an error, too."""
    kind = resource["kind"]
    if kind in CUSTOM:
        jsonschema.validate(resource["spec"], CUSTOM[kind])
    else:
        kubernetes_validate.validate(resource, "1.33", strict=True)


@pytest.mark.parametrize("kind", sorted(resources()))
def test_a_resource_matches_its_schema(kind: str) -> None:
    resource = resources()[kind]
    check(resource)
    if kind != "Namespace":
        assert resource["metadata"]["labels"] == LABELS


def test_a_misspelt_field_is_found() -> None:
    for kind, resource in resources().items():
        if "spec" in resource:
            resource["spec"]["replica"] = 1
            with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
                check(resource)
            assert kind


def test_everything_selects_the_pods_and_their_port() -> None:
    found = resources()
    pod = found["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == LABELS
    assert found["Service"]["spec"]["selector"] == LABELS
    for kind in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == LABELS
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == LABELS
    (port,) = pod["spec"]["containers"][0]["ports"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert found["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == port["name"]
    assert (
        found["ScaledObject"]["spec"]["scaleTargetRef"]["name"]
        == (found["Deployment"]["metadata"]["name"])
    )


def test_the_pod_is_restricted_and_has_time_to_drain() -> None:
    found = resources()
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    variables = {each["name"]: each["value"] for each in container["env"]}
    names = {name.removeprefix("CGAN_").lower() for name in variables}
    assert names <= Settings.model_fields.keys()
    drain_s = float(variables["CGAN_DRAIN_DELAY_S"])
    request_s = Settings().timeout_s
    assert spec["terminationGracePeriodSeconds"] > drain_s + request_s
    namespace = found["Namespace"]["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


def service_links(service: dict[str, Any], address: str) -> dict[str, str]:
    """Return the variables that a kubelet sets for a Service (pkg/kubelet/envvars)."""
    prefix = variable_name(service["metadata"]["name"])
    ports = service["spec"]["ports"]
    links = {f"{prefix}_SERVICE_HOST": address, f"{prefix}_SERVICE_PORT": str(ports[0]["port"])}
    for number, each in enumerate(ports):
        protocol, port = each.get("protocol", "TCP"), each["port"]
        url, link = f"{protocol.lower()}://{address}:{port}", f"{prefix}_PORT_{port}_{protocol}"
        if "name" in each:
            links[f"{prefix}_SERVICE_PORT_{variable_name(each['name'])}"] = str(port)
        if number == 0:
            links[f"{prefix}_PORT"] = url
        links |= {link: url, f"{link}_PROTO": protocol.lower()}
        links |= {f"{link}_PORT": str(port), f"{link}_ADDR": address}
    return links


def variable_name(name: str) -> str:
    return name.upper().replace("-", "_")


def named(name: str, protocol: str = "TCP") -> dict[str, Any]:
    """Return a Service of another part of the cluster."""
    ports = [{"name": "http", "port": 80, "protocol": protocol}]
    return {"metadata": {"name": name}, "spec": {"ports": ports}}


@pytest.mark.parametrize("address", ["10.96.0.7", "[fd00:10:96::7]"])
def test_a_pod_is_configured_alike_beside_any_service_of_its_namespace(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = [f"CGAN_{option.upper()}" for option in Settings.model_fields]
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    alone = parse(Settings, [])
    services = [each for each in resources().values() if each["kind"] == "Service"]
    services += [named(each.removesuffix("_PORT").lower().replace("_", "-")) for each in variables]
    services += [named("cgan", "UDP"), named("cgan", "SCTP")]
    assert {each["metadata"]["name"] for each in services} >= {"cgan", "cgan-metrics"}
    reached = set()
    for service in services:
        with monkeypatch.context() as pod:
            links = service_links(service, address)
            for name, value in links.items():
                pod.setenv(name, value)
            warnings: list[str] = []
            assert parse(Settings, [], warn=warnings.append) == alone
            shadowed = [name for name in variables if name in links]
            assert len(warnings) == len(shadowed)
            for name, warning in zip(shadowed, warnings, strict=True):
                assert f"{name}={links[name]}" in warning
                assert f"{service['metadata']['name']!r}" in warning
            reached |= {*shadowed}
    assert reached == {"CGAN_PORT", "CGAN_METRICS_PORT"}


def test_pods_of_the_manifests_get_no_variables_of_services() -> None:
    for each in resources().values():
        if "template" in each.get("spec", {}):
            assert each["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", ["base", "overlays/cpu"])
def test_kustomize_builds_it(folder: str) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {each["kind"]: each for each in yaml.safe_load_all(built.stdout)}
    for resource in found.values():
        check(resource)
        if resource["kind"] != "Namespace":
            assert resource["metadata"]["namespace"] == "cgan"
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    gpu = folder == "base"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == gpu
    assert container["env"][0]["value"] == ("cuda" if gpu else "cpu")
