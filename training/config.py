"""What a training run is: one frozen configuration, and the presets to start from."""

from dataclasses import dataclass
from typing import Literal

from training.losses import Objective


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides a run besides the data, the seed and the device.

    Attributes:
        generator: `mlp`, the document's, or `conv`; see `training.networks`.
        generator_width: of the `conv` generator's finest feature map; no part of `mlp`.
        discriminator: `mlp`, `conv` (strided convolutions) or `residual` (only the generator is
            shipped).
        discriminator_hidden: the discriminator's widths; for `residual`, that of its finest feature
            map and that of its features.
        objective: see `training.losses`.
        penalty: gamma of the R1 + R2 penalty, which is gamma / 2 times the squared gradient norm,
            on real and on fake images; 0 for none; None to let a short probe choose it, because the
            best one differs from data set to data set.
        penalty_interval: the penalty is computed every so many steps, with gamma multiplied to
            match.
        mismatch: weight of real images with wrong labels in the discriminator's loss; 0 for none.
            More makes the classes purer, and less varied.
        batch_size: images a step.
        images: real images shown in all; the length of the run.
        lr: Adam's learning rate at the start.
        lr_schedule: `constant`, or `cosine` to zero over the run.
        beta1: Adam's first moment decay.
        beta2: Adam's second moment decay.
        precision: of the matrix products; weights, losses and penalties are float32. `bfloat16`
            becomes `float32` on a device that does not compute in it.
        ema_half_life: half-life of the generator's moving average, in images; 0 for no average.
        ema_ramp: the half-life is at most this fraction of the images seen, so that an early
            average forgets its random start (Karras et al., StyleGAN2).
        flip: whether a real image is shown mirrored half of the time.
        augment: whether real and fake images alike are distorted before the discriminator sees
            them, which keeps a small data set from being learnt by heart.
    """

    generator: Literal["mlp", "conv"]
    generator_width: int
    discriminator: Literal["mlp", "conv", "residual"]
    discriminator_hidden: tuple[int, ...]
    objective: Objective
    penalty: float | None
    penalty_interval: int
    batch_size: int
    images: int
    lr: float
    lr_schedule: Literal["constant", "cosine"]
    beta1: float
    beta2: float
    precision: Literal["float32", "bfloat16"]
    ema_half_life: float
    ema_ramp: float = 0.05
    mismatch: float = 0.0
    flip: bool = False
    augment: bool = False


PRESETS: dict[str, TrainingConfig] = {
    # The recipe of the document: plain cross-entropy, no penalty, no average.
    "paper": TrainingConfig(
        generator="mlp",
        generator_width=0,
        discriminator="mlp",
        discriminator_hidden=(512, 256),
        objective="cross-entropy",
        penalty=0.0,
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
    # The same generator against a discriminator that sees neighbouring pixels, with the objective
    # of R3GAN (arXiv 2501.05441): relativistic pairs, R1 and R2.
    "mlp": TrainingConfig(
        generator="mlp",
        generator_width=0,
        discriminator="conv",
        discriminator_hidden=(32, 64, 256),
        objective="relativistic",
        penalty=None,
        penalty_interval=4,
        batch_size=128,
        images=6_000_000,
        lr=4e-4,
        lr_schedule="cosine",
        beta1=0.0,
        beta2=0.99,
        precision="bfloat16",
        ema_half_life=200_000,
    ),
    # Convolutions on both sides, and nothing that is normalised over a batch.
    "conv": TrainingConfig(
        generator="conv",
        generator_width=16,
        discriminator="residual",
        discriminator_hidden=(24, 256),
        objective="relativistic",
        mismatch=0.1,
        penalty=None,
        penalty_interval=4,
        batch_size=128,
        images=4_000_000,
        lr=4e-4,
        lr_schedule="cosine",
        beta1=0.0,
        beta2=0.99,
        precision="bfloat16",
        ema_half_life=200_000,
    ),
}
