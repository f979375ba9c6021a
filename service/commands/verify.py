"""The command `python -m service verify`."""

import asyncio
import hashlib
from pathlib import Path

from service.disconnect import Client
from service.encoding.verification import (
    ParsedPNG,
    VerificationResult,
    compare,
    read_png,
    request_from_recipe,
)
from service.errors import Problem
from service.generation import Generation
from service.inference.batcher import Batcher
from service.inference.repository import ModelRepository, artifact_paths, load_repository
from service.settings import MAX_TIMEOUT_MS, Settings, VerifySettings
from service.telemetry.metrics import Metrics
from training.artifact import ArtifactError
from training.machine import DeviceError


def run(settings: VerifySettings) -> int:
    """Verify a file and return the exit status.

    Raises:
        ValueError: an option is invalid, or the file cannot be verified.
    """
    try:
        found = read_png(settings.file.read_bytes())
        artifact = _find_artifact(settings.models, found.recipe.sha256)
        registry = load_repository(
            Settings.model_construct(models=artifact, device=settings.device, dtype=settings.dtype)
        )
        verdict = asyncio.run(_verify(found, registry))
    except OSError as error:
        raise ValueError(f"{settings.file}: cannot be read: {error.strerror}") from error
    except (ArtifactError, DeviceError) as error:
        raise ValueError(str(error)) from error
    except Problem as problem:
        raise ValueError(f"{settings.file}: {problem.detail}") from problem
    print(f"{verdict.detail} Made by {verdict.model}.")
    return 0 if verdict.same_pixels else 1


def _find_artifact(models: Path, sha256: str) -> Path:
    """Return the file that made an image. Only its digest is read, because loading takes long.

    Raises:
        ArtifactError: no file has the digest.
    """
    for path in artifact_paths(models):
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    raise ArtifactError(models, f"holds no model with the digest of the recipe, {sha256}")


async def _verify(png: ParsedPNG, repository: ModelRepository) -> VerificationResult:
    request = request_from_recipe(png.recipe, repository)
    metrics = Metrics()
    batcher = Batcher(len(request.labels), MAX_TIMEOUT_MS / 1e3, metrics)
    batcher.start()
    result = await Generation(repository, batcher, metrics).generate(request, Client())
    await batcher.close()
    return compare(png, request, result)
