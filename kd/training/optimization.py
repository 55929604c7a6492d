"""Optimizers and schedules of the learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Recipe:
    """How a network is optimized.

    Args:
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: Its peak.
        momentum: Of sgd; the first beta of adamw.
        weight_decay: Of weights; biases and the scales of normalization layers have none.
        schedule: ``cosine`` (to zero at the last step) or ``constant``, after the warm-up.
        warmup_epochs: Epochs over which the learning rate rises linearly.

    Source: Loshchilov & Hutter (2016), https://arxiv.org/abs/1608.03983 (cosine); (2017),
        https://arxiv.org/abs/1711.05101 (adamw); Goyal et al. (2017), https://arxiv.org/abs/1706.02677 (warm-up)
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup_epochs: float = 0.0

    def build_optimizer(self, network: nn.Module, *, fused: bool = True) -> Optimizer:
        """Build the optimizer of a network's parameters.

        Args:
            network: The network.
            fused: Whether it may go over the weights in one pass, where their device has such a one.
        """
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # One pass over the weights instead of ten, for which a student of 26 million weights waits on a CPU.
        fused = fused and all(one.device.type in ("cpu", "cuda") for one in parameters)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=fused)
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(self.momentum, 0.999), fused=fused)

    def build_scheduler(self, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: float) -> LambdaLR:
        """Build the schedule of the learning rate, to be advanced after each optimizer step."""
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        return LambdaLR(optimizer, self.factor(total_steps=total_steps, warmup_steps=warmup_steps))

    def factor(self, *, total_steps: int, warmup_steps: int) -> Callable[[int], float]:
        """Return what the peak learning rate is multiplied by, as a function of the number of steps made."""

        def of_step(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            if self.schedule == "constant":
                return 1.0
            progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        return of_step
