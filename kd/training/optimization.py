"""Optimizers, learning rate schedules, and the average of weights."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Recipe:
    """How a network is optimized.

    Args:
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: Peak learning rate.
        momentum: Momentum of sgd; first beta of adamw.
        weight_decay: Of weights; biases and the scales of normalization layers have none.
        nesterov: Whether sgd uses Nesterov momentum.
        schedule: After the warm-up: ``cosine`` (to zero at the last step), ``constant``, ``step`` (times ``gamma``
            every ``step_epochs``), ``multistep`` (times ``gamma`` after each of the ``milestones``), or ``poly``
            (to zero, as the remaining fraction of the training to the power of ``poly_power``).
        warmup_epochs: Epochs over which the learning rate rises linearly.
        milestones: Epochs, from the beginning of the training.
        step_epochs: Epochs between two steps.
        gamma: Factor of a step.
        poly_power: Exponent; 1: linear.

    Source: Loshchilov & Hutter (2016), https://arxiv.org/abs/1608.03983 (cosine); (2017),
        https://arxiv.org/abs/1711.05101 (adamw); Goyal et al. (2017), https://arxiv.org/abs/1706.02677 (warm-up)
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    nesterov: bool = False
    milestones: tuple[float, ...] = ()
    step_epochs: float = 30.0
    gamma: float = 0.1
    poly_power: float = 1.0

    def build_optimizer(self, network: nn.Module, *, fused: bool = True) -> Optimizer:
        """Build the optimizer of a network's trainable parameters, with one fused kernel if the device has one."""
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [weight for weight in parameters if weight.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [bias for bias in parameters if bias.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # One pass over the weights instead of ten, which matters on a CPU from some 20 million weights on.
        fused = fused and all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                groups, lr=self.learning_rate, momentum=self.momentum, nesterov=self.nesterov, fused=fused
            )
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(self.momentum, 0.999), fused=fused)

    def build_scheduler(self, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: float) -> LambdaLR:
        """Build the learning rate schedule, to be advanced after each optimizer step."""
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)

        def factor(step: int) -> float:
            epoch = step / steps_per_epoch
            return self.factor(step, total_steps=total_steps, warmup_steps=warmup_steps, epoch=epoch)

        return LambdaLR(optimizer, factor)

    def factor(self, step: int, *, total_steps: int, warmup_steps: int, epoch: float = 0.0) -> float:
        """Return the factor of the peak learning rate after a number of steps, in an epoch and its fraction."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        # Steps are whole, epochs of a few steps are not exact.
        epoch += _ROUNDING
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        match self.schedule:
            case "constant":
                return 1.0
            case "step":
                return float(self.gamma ** (epoch // self.step_epochs))
            case "multistep":
                return float(self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
            case "poly":
                return float((1 - progress) ** self.poly_power)
            case _:
                return 0.5 * (1 + math.cos(math.pi * progress))


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network's weights and statistics, updated by ``update_parameters``.

    Lightning's ``WeightAveraging`` callback saves the average only in full checkpoints, not in those of weights alone
    for deployment, and copies the whole module.

    Args:
        model: The network; the average starts from its weights.
        decay: Fraction of the average that is kept at each step, from 0 to 1; after n steps at most (1 + n) / (10 + n),
            so that the initial weights are soon forgotten.

    Source: Tarvainen & Valpola (2017), section 2, https://arxiv.org/abs/1703.01780; the start is TensorFlow's
        ``ExponentialMovingAverage`` with ``num_updates``
    """
    # A partial of a module's function can be copied and pickled with the module that holds it.
    return AveragedModel(model, avg_fn=partial(_ramped_average, decay), use_buffers=True).requires_grad_(False)


def _ramped_average(decay: float, average: Tensor, newest: Tensor, count: Tensor | int) -> Tensor:
    if not average.is_floating_point():
        return newest
    count = torch.as_tensor(count, device=average.device)
    weight = 1 - ((1 + count) / (10 + count)).clamp(max=decay)
    return average.lerp(newest.to(average.dtype), weight.to(average.dtype))
