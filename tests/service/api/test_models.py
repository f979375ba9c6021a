"""The list of models: the quality of a model without a certificate."""

from pathlib import Path

import pytest

from tests.support.serving import serve_here
from tests.support.tiny_training import artifact_file

ESTIMATE = {"gan_test": 0.95, "coverage": 0.1, "frechet_distance": 2.3, "images": 3000}


def test_a_model_has_the_estimate_of_its_run_until_it_has_a_certificate(tmp_path: Path) -> None:
    artifact_file(tmp_path / "a.safetensors", training={"quick_metrics": ESTIMATE})
    with serve_here("--models", str(tmp_path)) as service:
        (model,) = service.client.get("/models").json()["models"]
    assert (model["quick_metrics"], model["certificate"]) == (ESTIMATE, None)


@pytest.mark.parametrize("stored", [None, 3, {"gan_test": 0.9}, {**ESTIMATE, "images": "many"}])
def test_an_estimate_that_the_service_cannot_read_does_not_hide_the_model(
    tmp_path: Path, stored: object
) -> None:
    artifact_file(tmp_path / "a.safetensors", training={"quick_metrics": stored})
    with serve_here("--models", str(tmp_path)) as service:
        (model,) = service.client.get("/models").json()["models"]
    assert model["quick_metrics"] is None
    assert model["training"] == {"quick_metrics": stored}
