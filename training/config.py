"""Training configurations: one frozen dataclass, and the presets."""

from dataclasses import dataclass
from typing import Literal

from training.losses import Objective


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that determines a run apart from the data, the seed and the device.

    Attributes:
        generator: `mlp` (Mirza & Osindero) or `conv`; see `training.networks`.
        generator_width: channels of the `conv` generator's finest feature map; unused by `mlp`.
        discriminator: `mlp`, `conv` (strided convolutions) or `residual`.
        discriminator_widths: widths of the discriminator's layers; for `residual`, the channels of
            its finest feature map and the number of features.
        objective: see `training.losses`.
        r1_gamma: weight of the gradient penalty on real (R1) and fake (R2) images, which is
            gamma / 2 times the squared gradient norm; 0 disables it, None lets the gamma search
            choose it.
        penalty_interval: steps from one gradient penalty to the next; gamma is multiplied by it.
        mismatch_weight: weight of real images with wrong labels in the discriminator's loss; 0
            disables it. A larger weight gives purer and less varied classes.
        batch_size: images per step.
        images: length of the run in real images shown.
        lr: initial learning rate of Adam.
        lr_schedule: `constant`, or `cosine` to zero over the run.
        lr_warmup: images over which the learning rate rises from zero. Without it Adam's first
            steps, all of full length, can leave a generator that draws the same image always.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        precision: of the matrix products; weights, losses and penalties are float32. `bfloat16`
            becomes `float32` on a device without native bfloat16.
        ema_half_life: half-life of the generator's moving average in images; 0 disables it.
        ema_ramp: upper bound of the half-life as a fraction of the images seen, so that an early
            average forgets its random start (Karras et al., StyleGAN2).
        flip: mirror half of the real images.
        augment: distort real and fake images before the discriminator (DiffAugment), which keeps
            it from memorising a small data set.
    """

    generator: Literal["mlp", "conv"]
    generator_width: int = 0
    discriminator: Literal["mlp", "conv", "residual"]
    discriminator_widths: tuple[int, ...]
    objective: Objective = "relativistic"
    r1_gamma: float | None = None
    penalty_interval: int = 4
    batch_size: int = 128
    images: int
    lr: float = 4e-4
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    lr_warmup: int = 0
    beta1: float = 0.0
    beta2: float = 0.99
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    ema_half_life: float = 200_000
    ema_ramp: float = 0.05
    mismatch_weight: float = 0.0
    flip: bool = False
    augment: bool = False


PRESETS: dict[str, TrainingConfig] = {
    # Mirza & Osindero (arXiv 1411.1784): cross-entropy, no penalty, no moving average.
    "paper": TrainingConfig(
        generator="mlp",
        discriminator="mlp",
        discriminator_widths=(512, 256),
        objective="cross-entropy",
        r1_gamma=0.0,
        penalty_interval=1,
        batch_size=64,
        images=7_680_000,
        lr=2e-4,
        lr_schedule="constant",
        beta1=0.5,
        beta2=0.999,
        precision="float32",
        ema_half_life=0.0,
    ),
    # The same generator against a convolutional discriminator, with the objective of R3GAN
    # (arXiv 2501.05441): relativistic pairs, R1 and R2.
    "mlp": TrainingConfig(
        generator="mlp",
        discriminator="conv",
        discriminator_widths=(32, 64, 256),
        images=6_000_000,
        lr_warmup=10_000,
    ),
    # Convolutions on both sides, and no normalisation over a batch.
    "conv": TrainingConfig(
        generator="conv",
        generator_width=16,
        discriminator="residual",
        discriminator_widths=(24, 256),
        mismatch_weight=0.1,
        images=4_000_000,
        lr_warmup=10_000,
    ),
}
