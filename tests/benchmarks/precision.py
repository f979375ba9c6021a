"""The effect of the service's precision on quality, by the metrics of the certificate.

    python -m tests.benchmarks.precision [--data-dir DIR]

The same 10,000 images of every bundled model are made by the service's engine in float32 and in
int8, and others in float32: what the two seeds differ by is the noise of the figures. GAN-train
is left out: its noise is larger than that of all the others.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from service.inference.engine import DtypeName, Engine
from service.settings import Settings
from training.artifact import read_artifact
from training.data.named import Dataset, default_cache, default_data_dir, load_dataset
from training.quality.certificate import IMAGES, Quality, measure
from training.quality.classifier import get_classifier

CASES: tuple[tuple[DtypeName, int], ...] = (
    ("float32", 0),
    ("int8", 0),
    ("float32", 1),
    ("int8", 1),
)
SHOWN = ("gan_test", "precision", "recall", "density", "coverage", "frechet_distance", "kid")


def served(engine: Engine, like: Dataset, seed: int) -> Dataset:
    """Return the images that the service would send: the classes in turn."""
    labels = np.arange(IMAGES) % like.num_classes
    indices = np.arange(IMAGES) // like.num_classes
    seeds = np.full(IMAGES, seed, np.uint64)
    parts = np.array_split(np.arange(IMAGES), IMAGES // engine.max_batch + 1)
    pixels = np.concatenate([engine(seeds[p], indices[p], labels[p]) for p in parts])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return dataclasses.replace(like, images=images, labels=torch.from_numpy(labels))


def main() -> None:
    """Measure every bundled model in every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    options = parser.parse_args()
    print(f"{'model':<15}{'precision':<10}{'seed':>5}" + "".join(f"{n:>18}" for n in SHOWN))
    for path in sorted(Settings().models.glob("*.safetensors")):
        artifact = read_artifact(path)
        name = str(artifact.info.training["dataset"])
        train, test = (load_dataset(name, split, options.data_dir) for split in ("train", "test"))
        classifier = get_classifier(train, cache=default_cache())
        _, features = classifier.classify(test.images)
        for dtype, seed in CASES:
            engine = Engine(artifact, device="cpu", dtype=dtype, max_batch=64)
            quality = measure(classifier, served(engine, test, seed), features)
            _print(path.stem, dtype, seed, quality)


def _print(model: str, dtype: DtypeName, seed: int, quality: Quality) -> None:
    figures = dataclasses.asdict(quality)
    shown = "".join(f"{figures[name]:>18.4f}" for name in SHOWN)
    print(f"{model:<15}{dtype:<10}{seed:>5}{shown}", flush=True)


if __name__ == "__main__":
    main()
