"""Steps of the document's pair of multilayer perceptrons on a CPU, without a graph.

At these sizes a CPU spends as long on bookkeeping as on products: on building a graph, on casting
weights and their gradients, and on fetching from memory what it has had before. Here a network goes
forwards and backwards layer by layer, by hand. A weight is updated, and cast for the next product,
as soon as its gradient is known, while all of it still lies in the processor's cache; and no
gradient is computed that nobody uses.

The layers are those of `training.networks`, and the optimisers keep their state as they always do.
A test holds these steps to those of `training.loop`.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import TrainingConfig
from training.data.named import Dataset
from training.loop import TrainState, draw_batch, schedule, update_ema
from training.networks import MLPDiscriminator, MLPGenerator

_aten = torch.ops.aten


class ManualStepper:
    """Makes steps of a pair that `applies` to; see `training.loop.Stepper`.

    It holds the weights in the precision of the products, so whoever loads other weights into the
    state makes another stepper.
    """

    @staticmethod
    def applies(state: TrainState, config: TrainingConfig) -> bool:
        """Whether these are steps of multilayer perceptrons, on one CPU, with cross-entropy."""
        return (
            isinstance(state.generator, MLPGenerator)
            and isinstance(state.discriminator, MLPDiscriminator)
            and state.rng.device.type == "cpu"
            and state.world.size == 1
            and config.objective == "cross-entropy"
            and not (config.penalty or config.mismatch or config.augment)
        )

    def __init__(self, state: TrainState, dataset: Dataset, config: TrainingConfig) -> None:
        assert isinstance(state.generator, MLPGenerator)
        assert isinstance(state.discriminator, MLPDiscriminator)
        self._state, self._dataset, self._config = state, dataset, config
        self._dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self._generator = _Network(state.generator, state.generator_optimizer, self._dtype)
        self._discriminator = _Network(
            state.discriminator, state.discriminator_optimizer, self._dtype
        )
        aims = torch.tensor([[1.0], [0.0]]).repeat_interleave(config.batch_size, dim=0)
        self._real_and_fake, self._real = aims, aims[: config.batch_size]  # (2N, 1) and (N, 1)

    @torch.inference_mode()
    def __call__(self, used: float) -> Tensor:
        """Make one step; returns what `training.loop.train_step` does."""
        state, config = self._state, self._config
        schedule(state, config, used=used, steps=1)
        real, real_labels, latents, fake_labels = draw_batch(state, self._dataset, config)
        fake = self._generator.forward(latents.to(self._dtype), fake_labels)  # (N, C * H * W)
        images = torch.cat([real.flatten(1).to(self._dtype), fake])
        labels = torch.cat([real_labels, fake_labels])

        logits = self._discriminator.forward(images, labels).float()  # (2N, 1)
        d_loss, gradient = self._cross_entropy(logits, self._real_and_fake)
        self._discriminator.backward(gradient, update=True)

        fake_logits = self._discriminator.forward(fake, fake_labels).float()  # (N, 1)
        g_loss, gradient = self._cross_entropy(fake_logits, self._real)
        gradient = self._discriminator.backward(gradient, update=False)
        self._generator.backward(gradient, update=True)

        if config.ema_half_life > 0:
            update_ema(state)
        means = logits.view(2, -1).mean(1)  # of the real and of the fake
        return torch.stack([d_loss, g_loss, *means, torch.zeros(())])

    def _cross_entropy(self, logits: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of `training.losses` as its mean over the batch, and its gradient at the logits.

        Real and fake images are two terms of one loss, so their sum is over N, not over 2N.
        """
        batch_size = self._config.batch_size
        loss = F.binary_cross_entropy_with_logits(logits, aims, reduction="sum") / batch_size
        return loss, logits.sigmoid().sub_(aims).div_(batch_size).to(self._dtype)


class _Network:
    """A multilayer perceptron that goes forwards and backwards, and takes its optimiser's steps."""

    def __init__(
        self,
        network: MLPGenerator | MLPDiscriminator,
        optimizer: torch.optim.Adam,
        dtype: torch.dtype,
    ) -> None:
        self._optimizer = _Adam(optimizer)
        self._embedding = network.label_embedding
        largest = max(parameter.numel() for parameter in network.parameters())
        room = torch.empty(largest, dtype=dtype), torch.empty(largest)
        self._layers: list[_Layer] = []
        for layer, after in pairwise([*network.main, None]):
            if isinstance(layer, nn.Linear):
                slope = after.negative_slope if isinstance(after, nn.LeakyReLU) else None
                self._layers.append(_Dense(layer, slope, self._optimizer, dtype, room))
            elif isinstance(layer, nn.BatchNorm1d):
                assert isinstance(after, nn.LeakyReLU)
                self._layers.append(_Norm(layer, after.negative_slope, self._optimizer))
            elif isinstance(layer, nn.Tanh):
                self._layers.append(_Tanh())
            else:  # it belongs to the layer before it
                assert isinstance(layer, nn.LeakyReLU)
        self._step = self._optimizer.of(self._embedding.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The output (N, outputs) for inputs (N, inputs) and labels (N,)."""
        self._labels = labels
        x = torch.cat([x, F.embedding(labels, self._embedding.weight).to(x.dtype)], dim=1)
        for layer in self._layers:
            x = layer.forward(x)
        return x

    def backward(self, gradient: Tensor, *, update: bool) -> Tensor:
        """Go back through the last `forward`.

        Args:
            gradient: of the loss at the output, (N, outputs).
            update: whether all parameters take their step.

        Returns:
            the gradient at the inputs (N, inputs); with `update`, where it is wanted no further,
            that at the embedded labels (N, embedding).
        """
        if update:
            self._optimizer.count()
        embedding = self._embedding.embedding_dim
        for layer in reversed(self._layers[1:]):
            gradient = layer.backward(gradient, slice(None), update)
        columns = slice(-embedding, None) if update else slice(-embedding)
        gradient = self._layers[0].backward(gradient, columns, update)
        if update:
            table = torch.zeros_like(self._embedding.weight)
            table.index_add_(0, self._labels, gradient.float())
            self._step([table])
        return gradient


class _Adam:
    """An optimiser that takes its step for a few parameters at a time."""

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        (self._group,) = optimizer.param_groups
        parameters, self._states = self._group["params"], optimizer.state
        for parameter in parameters:
            if not self._states[parameter]:  # as the optimiser itself begins
                self._states[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        # Counted all at once.
        self._steps = torch.stack([self._states[parameter]["step"] for parameter in parameters])
        for parameter, step in zip(parameters, self._steps, strict=True):
            self._states[parameter]["step"] = step

    def count(self) -> None:
        """Begin a step of all parameters."""
        self._steps.add_(1)

    def of(self, *parameters: Tensor) -> Callable[[list[Tensor]], None]:
        """The step of some parameters, in place, as a function of their gradients."""
        group, states = self._group, [self._states[parameter] for parameter in parameters]
        first, second, steps = (
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        beta1, beta2 = group["betas"]
        constants = {name: group[name] for name in ("weight_decay", "eps", "amsgrad", "maximize")}

        def step(gradients: list[Tensor]) -> None:
            # The optimiser's own kernel: its public forms take as long to be called as to compute.
            torch._fused_adam_(
                list(parameters),
                gradients,
                first,
                second,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                **constants,
            )

        return step


class _Dense:
    """`nn.Linear` and the leaky ReLU after it, if there is one.

    In another precision than float32 it has copies of the weight and the bias.
    """

    def __init__(
        self,
        layer: nn.Linear,
        slope: float | None,
        optimizer: _Adam,
        dtype: torch.dtype,
        room: tuple[Tensor, Tensor],
    ) -> None:
        self._slope, self._step = slope, optimizer.of(layer.weight, layer.bias)
        self._masters = layer.weight.detach(), layer.bias.detach()
        self._weight, self._bias = (master.to(dtype) for master in self._masters)
        self._cast = dtype != torch.float32
        # Not in float32, where there is no rounding in between to be saved.
        self._fuse = self._cast and slope is not None and _fuses_bfloat16()
        # One after another, all gradients lie in the same place, so that it stays in the cache.
        self._product, self._gradient = (
            r[: layer.weight.numel()].view_as(layer.weight) for r in room
        )

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        if self._fuse:
            # Private, and what compiled networks call: one pass over the output instead of two.
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "leaky_relu", [self._slope], ""
            )
            self._y = fused
            return fused
        self._y = F.linear(x, self._weight, self._bias)
        return self._y if self._slope is None else F.leaky_relu_(self._y, self._slope)

    def backward(self, gradient: Tensor, columns: slice, update: bool) -> Tensor:
        if self._slope is not None:
            gradient = _aten.leaky_relu_backward(gradient, self._y, self._slope, True)
        weight = self._weight[:, columns]
        # A single output needs no product.
        further = gradient * weight if len(weight) == 1 else gradient @ weight
        if update:
            torch.mm(gradient.t(), self._x, out=self._product)
            if self._cast:
                self._gradient.copy_(self._product)
            bias = gradient.sum(0, dtype=torch.float32)
            self._step([self._gradient if self._cast else self._product, bias])
            if self._cast:
                self._weight.copy_(self._masters[0])
                self._bias.copy_(self._masters[1])
        return further


def _fuses_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


class _Norm:
    """`nn.BatchNorm1d` in training, and the leaky ReLU after it."""

    def __init__(self, layer: nn.BatchNorm1d, slope: float, optimizer: _Adam) -> None:
        assert layer.num_batches_tracked is not None
        self._slope, self._step = slope, optimizer.of(layer.weight, layer.bias)
        self._weight, self._bias, self._batches = (
            layer.weight,
            layer.bias,
            layer.num_batches_tracked,
        )
        self._running = layer.running_mean, layer.running_var
        self._momentum, self._eps = layer.momentum, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        self._batches.add_(1)
        self._y: Tensor
        self._y, *self._statistics = _aten.native_batch_norm(
            x, self._weight, self._bias, *self._running, True, self._momentum, self._eps
        )
        return F.leaky_relu_(self._y, self._slope)

    def backward(self, gradient: Tensor, _columns: slice, update: bool) -> Tensor:
        further: Tensor
        further, *gradients = _aten.native_batch_norm_backward(
            _aten.leaky_relu_backward(gradient, self._y, self._slope, True),
            self._x,
            self._weight,
            *self._running,
            *self._statistics,
            True,
            self._eps,
            [True, update, update],
        )
        if update:
            self._step(gradients)
        return further


class _Tanh:
    """`nn.Tanh`, in place."""

    def forward(self, x: Tensor) -> Tensor:
        self._y = x.tanh_()
        return self._y

    def backward(self, gradient: Tensor, _columns: slice, _update: bool) -> Tensor:
        further: Tensor = _aten.tanh_backward(gradient, self._y)
        return further


_Layer = _Dense | _Norm | _Tanh
