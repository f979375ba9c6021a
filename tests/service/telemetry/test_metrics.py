from pathlib import Path

import pytest
from prometheus_client import generate_latest

from service.telemetry.metrics import Metrics, ModelLabels, SupervisorMetrics

CERTIFICATE = {
    "generated": {"gan_test": 0.98, "coverage": 0.9, "frechet_distance": None},
    "gan_train": {"accuracies": [0.9, 0.8]},
}


def exposed(metrics: Metrics | SupervisorMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def labels(model: str, sha256: str = "00") -> ModelLabels:
    return ModelLabels(model, sha256, "cpu", "float32")


def test_the_quality_of_a_model_comes_from_its_certificate() -> None:
    metrics = Metrics()
    metrics.model_loaded(labels("a"), CERTIFICATE)
    text = exposed(metrics)
    assert 'cgan_model_quality{metric="gan_test",model="a"} 0.98\n' in text
    assert 'cgan_model_quality{metric="gan_train",model="a"} 0.85' in text
    assert 'metric="frechet_distance"' not in text
    metrics.model_removed(labels("a"))
    metrics.model_loaded(labels("a", "11"), None)  # replaced by a file without a certificate
    assert "cgan_model_quality{" not in exposed(metrics)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_that_is_not_loaded_is_left_out(tmp_path: Path, shared: bool) -> None:
    metrics = Metrics(tmp_path if shared else None)
    for model in ("a", "b"):
        metrics.model_loaded(labels(model), CERTIFICATE)
        metrics.images.labels(model, "7").inc()
    metrics.model_removed(labels("a"))
    metrics.images.labels("a", "7").inc()  # by its last request
    assert 'model="a"' not in exposed(metrics)
    assert 'cgan_images_total{label="7",model="b"} 1.0' in exposed(metrics)
    metrics.model_loaded(labels("a", "11"), None)
    assert 'cgan_images_total{label="7",model="a"} 2.0' in exposed(metrics)


@pytest.mark.parametrize("shared", [False, True])
def test_renamed_metrics_are_exposed_under_their_old_name_too(tmp_path: Path, shared: bool) -> None:
    metrics = Metrics(tmp_path if shared else None)
    metrics.model_loaded(labels("a"), CERTIFICATE)
    metrics.batch(16, 0.1)
    metrics.queue_images.set(3)
    metrics.queue_limit_images.set(4)
    text = exposed(metrics)
    for line in (
        'cgan_batch_{}_bucket{{le="16.0"}} 1.0',
        "cgan_batch_{}_sum 16.0",
        "cgan_queue_{} 3.0",
        "cgan_queue_limit_{} 4.0",
    ):
        assert line.format("images") in text
        assert line.format("rows") in text
    assert 'cgan_certificate{measure="gan_test",model="a"} 0.98' in text
    assert "# HELP cgan_queue_rows Deprecated: use cgan_queue_images.\n" in text


def test_the_supervisor_exposes_the_metrics_of_its_workers(tmp_path: Path) -> None:
    supervisor = SupervisorMetrics(2, tmp_path)
    workers = [Metrics(tmp_path, name) for name in ("0", "1")]
    for worker in workers:
        worker.ready.set(1)
        worker.model_loaded(labels("a"), CERTIFICATE)
        worker.write_snapshot()
    supervisor.count_restart()
    for text in [exposed(supervisor), *map(exposed, workers)]:
        assert "cgan_ready 2.0" in text
        assert "cgan_workers 2.0" in text
        assert "cgan_worker_restarts_total 1.0" in text
        assert 'sha256="00"} 1.0' in text
        assert text.count("process_resident_memory_bytes{") == 2
