"""The networks have the shapes that the document and every stored artifact count on."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.config import PRESETS
from training.generator_config import ConvGeneratorConfig, MLPGeneratorConfig
from training.networks import (
    ConvDiscriminator,
    ConvGenerator,
    MLPDiscriminator,
    MLPGenerator,
    ResidualBlock,
    build_generator,
    count_parameters,
    doubling_widths,
)

MNIST = MLPGeneratorConfig(num_classes=10, channels=1, image_size=28)
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
    main = MLPGenerator(MNIST).main

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
    config = MLPGeneratorConfig(
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
    config = MLPGeneratorConfig(num_classes=2, channels=1, image_size=4, hidden=(8,))
    assert kinds(MLPGenerator(config).main) == ["Linear", "LeakyReLU", "Linear", "Tanh"]


# The convolutional generator


def conv_config(size: int = 28, channels: int = 1, finest: int = 24) -> ConvGeneratorConfig:
    """As training chooses it; small where the width does not matter."""
    return ConvGeneratorConfig(
        num_classes=10,
        channels=3 if channels == 3 else 1,
        image_size=size,
        widths=doubling_widths(size, finest)[::-1],
    )


def conv_generator(config: ConvGeneratorConfig, *, trained: bool = False) -> ConvGenerator:
    """A seeded one; `trained` moves every parameter away from the neutral value it starts with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = ConvGenerator(config).eval()
        if trained:
            with torch.no_grad():
                for parameter in generator.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
    return generator


def latents(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, 64), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 36, 37, 48, 64])
def test_the_convolutional_generator_makes_images_of_any_size_within_the_value_range(
    size: int, channels: int
) -> None:
    generator = conv_generator(conv_config(size, channels, finest=4))
    images = generator(30 * latents(3), torch.tensor([0, 5, 9]))

    assert images.shape == (3, channels, size, size)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert images.abs().max() > 0.9
    # Every pixel is made, the last row and column of an odd size too.
    assert (generator(latents(3), torch.tensor([0, 5, 9])).std((0, 1)) > 0).all()


@settings(deadline=None, max_examples=25)
@given(size=st.integers(4, 80), channels=st.sampled_from([1, 3]))
def test_levels_double_from_a_small_map_to_half_the_image(size: int, channels: int) -> None:
    config = conv_config(size, channels, finest=2)
    generator = conv_generator(config)

    assert generator.sizes[-1] == (size + 1) // 2
    assert generator.sizes[0] <= 8
    for coarse, fine in itertools.pairwise(generator.sizes):
        assert coarse == (fine + 1) // 2
    for wide, narrow in itertools.pairwise(config.widths):
        assert wide == 2 * narrow
    assert generator(latents(1), torch.tensor([3])).shape == (1, channels, size, size)


def test_the_preset_costs_at_most_twenty_million_operations_an_mnist_image() -> None:
    generator = conv_generator(conv_config(finest=PRESETS["conv"].generator_width))
    with FlopCounterMode(display=False) as counter:
        generator(latents(4), torch.arange(4))
    assert 0 < counter.get_total_flops() / 4 <= 20e6


@pytest.mark.parametrize("size", [28, 64])
def test_at_first_different_latents_give_clearly_different_images(size: int) -> None:
    """A signal that faded on its way would give one grey for all."""
    config = conv_config(size, finest=PRESETS["conv"].generator_width)
    images = conv_generator(config)(latents(64), torch.zeros(64, dtype=torch.long))

    between = images.std(0).mean()  # over latents, at each pixel
    assert between > 0.3
    assert (images.abs() > 0.999).float().mean() < 0.2  # nor are they saturated
    weak = conv_generator(config)
    for module in weak.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    faded = weak(latents(64), torch.zeros(64, dtype=torch.long)).std(0).mean()
    assert faded < between / 3


def test_an_image_of_the_convolutional_generator_depends_on_its_own_row_alone() -> None:
    generator = conv_generator(conv_config(), trained=True)
    z, labels = latents(6), torch.arange(6)
    together = generator(z, labels)

    alone = torch.cat([generator(z[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    others = z.clone()
    others[1:] = 9.0
    torch.testing.assert_close(generator(others, labels)[0], together[0], rtol=1e-5, atol=1e-5)


def test_its_training_and_evaluation_modes_are_one_for_nothing_is_normalised() -> None:
    generator = conv_generator(conv_config())
    assert {type(m).__name__ for m in generator.modules() if not list(m.children())} == {
        *("Embedding", "Linear", "LeakyReLU", "Conv2d")
    }
    assert list(generator.buffers()) == []
    evaluated = generator(latents(4), torch.arange(4))
    assert torch.equal(generator.train()(latents(4), torch.arange(4)), evaluated)


def test_its_image_depends_on_the_label_and_on_the_latent() -> None:
    generator = conv_generator(conv_config())
    same = latents(1).repeat(10, 1)
    images = generator(same, torch.arange(10))
    for one, other in itertools.combinations(images, 2):
        assert (one - other).abs().mean() > 0.05
    moved = generator(-same, torch.arange(10))
    assert ((moved - images).abs().mean((1, 2, 3)) > 0.05).all()


def test_every_parameter_of_it_takes_part_in_the_image() -> None:
    generator = conv_generator(conv_config(finest=4), trained=True)
    generator(latents(10), torch.arange(10)).square().sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_its_styles_scale_the_channels_that_enter_a_block() -> None:
    block = ResidualBlock(3)
    nn.init.normal_(block.second.weight)
    x = torch.rand(2, 3, 5, 5)  # positive, so that its activation is the identity
    style = torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.0, 0.0]])
    scaled = block(x, style)
    expected = x[:1] + (
        block(x[:1] * (1 + style[:1, :, None, None])) - x[:1] * (1 + style[:1, :, None, None])
    )
    torch.testing.assert_close(scaled[:1], expected)
    torch.testing.assert_close(scaled[1:], block(x[1:]))


# The discriminators


def mlp_discriminator() -> MLPDiscriminator:
    return MLPDiscriminator(num_classes=10, channels=1, image_size=28)


def conv_discriminator() -> ConvDiscriminator:
    return ConvDiscriminator(num_classes=10, channels=1, image_size=28, widths=(8, 16, 32))


def residual_discriminator() -> ConvDiscriminator:
    return ConvDiscriminator(
        num_classes=10, channels=1, image_size=28, widths=(8, 16, 32), residual=True
    )


Build = Callable[[], MLPDiscriminator | ConvDiscriminator]
RESIDUAL = pytest.mark.parametrize("residual", [False, True])
EVERY = pytest.mark.parametrize(
    "build", [mlp_discriminator, conv_discriminator, residual_discriminator]
)


def test_the_documents_discriminator_has_two_hidden_layers_and_no_sigmoid() -> None:
    discriminator = mlp_discriminator()

    assert kinds(discriminator.main) == ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear"]
    assert widths(discriminator.main) == [(794, 512), (512, 256), (256, 1)]
    slopes = {m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2}


@pytest.mark.parametrize(
    ("build", "level"),
    [
        (conv_discriminator, ("Conv2d", "LeakyReLU")),
        (residual_discriminator, ("Conv2d", "ResidualBlock", "LeakyReLU")),
    ],
)
def test_a_convolutional_discriminator_halves_its_maps_and_projects_the_label(
    build: Callable[[], ConvDiscriminator], level: tuple[str, ...]
) -> None:
    discriminator = build()

    assert kinds(discriminator.main) == [*level * 2, "Flatten", "Linear", "LeakyReLU"]
    assert widths(discriminator.main) == [(16 * 7 * 7, 32)]
    features = discriminator.main(IMAGES)
    embedded = discriminator.label_embedding.weight[LABELS]
    projected = (features * embedded).sum(1) / 32**0.5
    expected = discriminator.out(features).squeeze(1) + projected
    torch.testing.assert_close(discriminator(IMAGES, LABELS), expected)


@pytest.mark.parametrize("size", [4, 5, 7, 32])
@pytest.mark.parametrize("channels", [1, 3])
@RESIDUAL
def test_a_convolutional_discriminator_takes_images_of_any_size(
    residual: bool, size: int, channels: int
) -> None:
    discriminator = ConvDiscriminator(
        num_classes=2, channels=channels, image_size=size, widths=(4, 8, 16), residual=residual
    )
    logits = discriminator(torch.randn(3, channels, size, size), torch.tensor([0, 1, 0]))
    assert logits.shape == (3,)


@EVERY
def test_logits_are_one_float32_number_an_image(build: Build) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = build()(IMAGES, LABELS)
    assert (logits.shape, logits.dtype) == ((6,), torch.float32)


@EVERY
def test_a_logit_depends_on_its_own_image_and_label_alone(build: Build) -> None:
    discriminator = build()
    together = discriminator(IMAGES, LABELS)

    others = IMAGES.clone()
    others[1:] = 0.9
    assert discriminator(others, LABELS)[0] == together[0]
    alone = torch.cat([discriminator(IMAGES[i : i + 1], LABELS[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together)


@EVERY
def test_a_logit_depends_on_the_label(build: Build) -> None:
    discriminator = build()
    logits = [discriminator(IMAGES[:1], torch.tensor([label])).item() for label in range(10)]
    assert all(a != b for a, b in itertools.combinations(logits, 2))


def test_a_residual_block_is_the_identity_at_first_and_not_for_ever() -> None:
    block = ResidualBlock(4)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    assert torch.equal(block(x, torch.randn(2, 4)), x)
    block(x).square().sum().backward()
    assert block.second.weight.grad is not None
    assert block.second.weight.grad.abs().max() > 0
    with torch.no_grad():
        block.second.weight.sub_(0.01 * block.second.weight.grad)
    assert not torch.equal(block(x), x)


def test_every_block_of_both_residual_networks_starts_as_the_identity() -> None:
    for network in (residual_discriminator(), conv_generator(conv_config(finest=4))):
        blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
        assert len(blocks) == 2
        for block in blocks:
            x = torch.randn(1, block.first.in_channels, 6, 6)
            assert torch.equal(block(x), x)


def test_the_initial_signal_keeps_its_strength_through_the_residual_discriminator() -> None:
    """At the width and depth of the preset, on images of unit variance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        finest, features = PRESETS["conv"].discriminator_widths
        discriminator = ConvDiscriminator(
            num_classes=10,
            channels=1,
            image_size=64,
            widths=(*doubling_widths(64, finest), features),
            residual=True,
        )
        strength = discriminator.main(torch.randn(16, 1, 64, 64)).square().mean().sqrt()
    assert 0.3 < strength < 3


def test_counting_parameters_counts_every_value_once() -> None:
    network = conv_generator(conv_config(finest=4))
    assert count_parameters(network) == sum(prod(p.shape) for p in network.parameters())
    assert count_parameters(conv_generator(replace(conv_config(finest=4), num_classes=11))) == (
        count_parameters(network) + network.config.embedding_dim
    )


@RESIDUAL
def test_several_labels_of_an_image_are_scored_as_each_alone(residual: bool) -> None:
    torch.manual_seed(0)
    network = ConvDiscriminator(
        num_classes=4, channels=1, image_size=8, widths=(4, 8), residual=residual
    )
    images = torch.randn(5, 1, 8, 8)
    labels = torch.randint(4, (5, 3))
    together = network(images, labels)
    assert together.shape == (5, 3)
    for column in range(3):
        assert torch.allclose(together[:, column], network(images, labels[:, column]), atol=1e-6)
