"""The evaluation of an artifact against a data set."""

from pathlib import Path

from training.artifact import ArtifactError, ArtifactInfo
from training.data.named import Dataset
from training.generator_config import GeneratorConfig
from training.networks import Generator
from training.prepare import load_splits, select_device
from training.quality.certificate import Certificate
from training.quality.evaluator import Evaluator


def certify_artifact(
    path: Path,
    generator: Generator,
    info: ArtifactInfo,
    dataset: str,
    *,
    device: str,
    data_dir: Path | None,
) -> Certificate:
    """Evaluate a generator on a data set; it stays on the device.

    Raises:
        ArtifactError: its images have another shape, or it was trained on other images.
        DataError: the data set cannot be loaded.
        ClassifierError: the reference classifier is not the committed one.
    """
    shape, torch_device = info.network, select_device(device)
    train_set, test_set = load_splits(
        dataset, data_dir, torch_device, size=shape.image_size, channels=shape.channels
    )
    made, real = image_shape(shape), image_shape(test_set)
    if made != real:
        raise ArtifactError(path, f"generates images of {made}, but {dataset} has {real}")
    names = test_set.class_names
    if info.class_names != names and sorted(info.class_names) == sorted(names):
        raise ArtifactError(path, f"has its classes in another order than {dataset}")
    if info.training.get("dataset_sha256", train_set.digest) != train_set.digest:
        raise ArtifactError(path, f"was trained on other images than {dataset} contains now")
    return Evaluator.create(train_set, test_set).certify(generator.to(torch_device))


def image_shape(images: GeneratorConfig | Dataset) -> str:
    """Return size, channels and number of classes as text."""
    size = f"{images.image_size}x{images.image_size}x{images.channels}"
    return f"{size} in {images.num_classes} classes"
