"""The networks have the shapes that the document and every stored artifact count on."""

import itertools

import pytest
import torch
from torch import nn

from training.networks import (
    ConvDiscriminator,
    GeneratorConfig,
    MLPDiscriminator,
    MLPGenerator,
    build_generator,
    count_parameters,
)

MNIST = GeneratorConfig(num_classes=10, channels=1, image_size=28)
IMAGES = torch.rand((6, 1, 28, 28), generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(6)


def kinds(sequence: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in sequence]


def widths(sequence: nn.Sequential) -> list[tuple[int, int]]:
    linear = [layer for layer in sequence if isinstance(layer, nn.Linear)]
    return [(layer.in_features, layer.out_features) for layer in linear]


# The generator


def test_the_mnist_generator_has_the_documents_number_of_parameters() -> None:
    assert count_parameters(build_generator(MNIST)) == 1_511_412


def test_its_tensors_have_the_names_that_artifacts_store() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    affine = ("weight", "bias")
    layers = {0: affine, 2: affine, 3: norm, 5: affine, 6: norm, 8: affine, 9: norm, 11: affine}

    names = list(build_generator(MNIST).state_dict())

    assert names == [
        "label_embedding.weight",
        *(f"main.{layer}.{name}" for layer, parts in layers.items() for name in parts),
    ]


def test_its_layers_are_the_documents() -> None:
    main = build_generator(MNIST).main

    assert kinds(main) == [
        *("Linear", "LeakyReLU"),  # the first hidden layer is the one that is not normalised
        *("Linear", "BatchNorm1d", "LeakyReLU") * 3,
        *("Linear", "Tanh"),
    ]
    assert widths(main) == [(110, 128), (128, 256), (256, 512), (512, 1024), (1024, 784)]
    slopes = {layer.negative_slope for layer in main if isinstance(layer, nn.LeakyReLU)}
    assert slopes == {0.2}
    normalised = [layer.num_features for layer in main if isinstance(layer, nn.BatchNorm1d)]
    assert normalised == [256, 512, 1024]


def test_its_label_is_embedded_in_ten_dimensions_beside_a_latent_of_a_hundred() -> None:
    assert (MNIST.latent_dim, MNIST.embedding_dim) == (100, 10)
    assert build_generator(MNIST).label_embedding.weight.shape == (10, 10)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (1, 4), (3, 5)])
def test_it_makes_images_of_the_asked_for_shape_within_the_value_range(
    channels: int, size: int
) -> None:
    config = GeneratorConfig(
        num_classes=5, channels=3 if channels == 3 else 1, image_size=size, hidden=(16, 8)
    )
    generator = build_generator(config)
    with torch.no_grad():
        generator.get_parameter("main.5.weight").mul_(
            100
        )  # so that the last layer alone would leave the range

    images = generator(100 * torch.randn(7, 100), torch.arange(7) % 5)

    assert images.shape == (7, channels, size, size)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert images.abs().max() > 0.9


def test_its_image_depends_on_the_latent_and_on_the_label() -> None:
    generator = build_generator(MNIST).eval()
    latents = torch.randn(1, 100).repeat(2, 1)

    same, other = (
        generator(latents, torch.tensor([3, 4])),
        generator(-latents, torch.tensor([3, 3])),
    )

    assert not torch.equal(same[0], same[1])
    assert not torch.equal(same[0], other[0])


def test_a_single_hidden_layer_is_not_normalised() -> None:
    config = GeneratorConfig(num_classes=2, channels=1, image_size=4, hidden=(8,))
    assert kinds(MLPGenerator(config).main) == ["Linear", "LeakyReLU", "Linear", "Tanh"]


# The discriminators


def mlp_discriminator() -> MLPDiscriminator:
    return MLPDiscriminator(num_classes=10, channels=1, image_size=28)


def conv_discriminator() -> ConvDiscriminator:
    return ConvDiscriminator(num_classes=10, channels=1, image_size=28, widths=(8, 16, 32))


def test_the_documents_discriminator_has_two_hidden_layers_and_no_sigmoid() -> None:
    discriminator = mlp_discriminator()

    assert kinds(discriminator.main) == ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear"]
    assert widths(discriminator.main) == [(794, 512), (512, 256), (256, 1)]
    slopes = {m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2}


def test_the_convolutional_discriminator_halves_its_maps_and_projects_the_label() -> None:
    discriminator = conv_discriminator()

    assert kinds(discriminator.main) == [
        *("Conv2d", "LeakyReLU") * 2,
        *("Flatten", "Linear", "LeakyReLU"),
    ]
    assert widths(discriminator.main) == [(16 * 7 * 7, 32)]
    features = discriminator.main(IMAGES)
    embedded = discriminator.label_embedding.weight[LABELS]
    projected = (features * embedded).sum(1) / 32**0.5
    expected = discriminator.out(features).squeeze(1) + projected
    torch.testing.assert_close(discriminator(IMAGES, LABELS), expected)


@pytest.mark.parametrize("size", [4, 5, 7, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_convolutional_discriminator_takes_images_of_any_size(size: int, channels: int) -> None:
    discriminator = ConvDiscriminator(
        num_classes=2, channels=channels, image_size=size, widths=(4, 8, 16)
    )
    logits = discriminator(torch.randn(3, channels, size, size), torch.tensor([0, 1, 0]))
    assert logits.shape == (3,)


@pytest.mark.parametrize("build", [mlp_discriminator, conv_discriminator])
def test_logits_are_one_float32_number_an_image(build: type[nn.Module]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = build()(IMAGES, LABELS)
    assert (logits.shape, logits.dtype) == ((6,), torch.float32)


@pytest.mark.parametrize("build", [mlp_discriminator, conv_discriminator])
def test_a_logit_depends_on_its_own_image_and_label_alone(build: type[nn.Module]) -> None:
    discriminator = build()
    together = discriminator(IMAGES, LABELS)

    others = IMAGES.clone()
    others[1:] = 0.9
    assert discriminator(others, LABELS)[0] == together[0]
    alone = torch.cat([discriminator(IMAGES[i : i + 1], LABELS[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("build", [mlp_discriminator, conv_discriminator])
def test_a_logit_depends_on_the_label(build: type[nn.Module]) -> None:
    discriminator = build()
    logits = [discriminator(IMAGES[:1], torch.tensor([label])).item() for label in range(10)]
    assert all(a != b for a, b in itertools.combinations(logits, 2))
