"""Servers for comparison: `python -m tests.benchmarks.baselines NAME --port N`.

Each serves the same generator as the same contact sheets, on uvicorn with uvloop and httptools,
without an access log: the ways in which people write such a service, and the floors of HTTP itself.
"""

import argparse
import asyncio
import io
import math
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Query, Response
from PIL import Image
from torch import Tensor

from training.loading import load_artifact

WINDOW_S, MAX_BATCH = 0.005, 64


def sheet(images: Tensor) -> bytes:
    """(N, C, H, W) in [-1, 1] to one PNG, by Pillow as it comes."""
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = torch.zeros(rows * columns, height, width, dtype=torch.uint8)
    grid[:count] = images[:, 0].mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
    grid = grid.view(rows, columns, height, width).permute(0, 2, 1, 3)
    buffer = io.BytesIO()
    Image.fromarray(grid.reshape(rows * height, columns * width).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def plain(weights: Path) -> FastAPI:
    """A forward per request."""
    generator = load_artifact(weights).generator
    latent_dim = generator.config.latent_dim
    app = FastAPI()

    @app.post("/generate")
    async def generate(label: int = Query(ge=0, le=9), n: int = Query(1, ge=1)) -> Response:
        with torch.inference_mode():
            images = generator(torch.randn(n, latent_dim), torch.full((n,), label))
        return Response(sheet(images), media_type="image/png")

    return app


def batching(weights: Path) -> FastAPI:
    """The textbook's asyncio batcher: wait up to 5 ms or for a full batch, then one forward."""
    generator = load_artifact(weights).generator
    latent_dim = generator.config.latent_dim
    app = FastAPI()
    queue: asyncio.Queue[tuple[int, int, asyncio.Future[Tensor]]] = asyncio.Queue()

    def forward(labels: Tensor) -> Tensor:
        with torch.inference_mode():
            images: Tensor = generator(torch.randn(len(labels), latent_dim), labels)
        return images

    async def work() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await queue.get()]
            rows, end = batch[0][1], loop.time() + WINDOW_S
            while rows < MAX_BATCH:
                try:
                    batch.append(await asyncio.wait_for(queue.get(), end - loop.time()))
                except TimeoutError:
                    break
                rows += batch[-1][1]
            labels = torch.cat([torch.full((n,), label) for label, n, _ in batch])
            images = await loop.run_in_executor(None, forward, labels)
            for part, (_, _, future) in zip(
                images.split([n for _, n, _ in batch]), batch, strict=True
            ):
                future.set_result(part)

    tasks: list[asyncio.Task[None]] = []

    @app.post("/generate")
    async def generate(label: int = Query(ge=0, le=9), n: int = Query(1, ge=1)) -> Response:
        if not tasks:
            tasks.append(asyncio.create_task(work()))
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        queue.put_nowait((label, n, future))
        return Response(sheet(await future), media_type="image/png")

    return app


def constant(weights: Path) -> FastAPI:
    """The floor of FastAPI on uvicorn: a PNG that was made before."""
    body = _one_image(weights)
    app = FastAPI()

    @app.post("/generate")
    async def generate() -> Response:
        return Response(body, media_type="image/png")

    return app


def checked(weights: Path) -> FastAPI:
    """The same with the parameters of a request read and checked, as the others have to."""
    body = _one_image(weights)
    app = FastAPI()

    @app.post("/generate")
    async def generate(label: int = Query(ge=0, le=9), n: int = Query(1, ge=1)) -> Response:
        return Response(body, media_type="image/png")

    return app


def bare(weights: Path) -> Any:
    """The floor of uvicorn alone: an ASGI callable that answers with a PNG made before."""
    body = _one_image(weights)
    headers = [(b"content-type", b"image/png"), (b"content-length", str(len(body)).encode())]

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def _one_image(weights: Path) -> bytes:
    with torch.inference_mode():
        generator = load_artifact(weights).generator
        latents = torch.randn(1, generator.config.latent_dim)
        images: Tensor = generator(latents, torch.tensor([7]))
    return sheet(images)


BASELINES = {
    "plain": plain,
    "batching": batching,
    "checked": checked,
    "constant": constant,
    "bare": bare,
}


def main() -> None:
    """Serve one of them until stopped."""
    parser = argparse.ArgumentParser(description="Serve what the service is compared with.")
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    uvicorn.run(
        BASELINES[options.name](options.weights),
        port=options.port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
