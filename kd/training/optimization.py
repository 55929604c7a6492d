"""Optimizers, learning rate schedules, and the average of weights."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from kd.errors import UserError
from kd.models import TIMM, import_timm
from kd.registry import accepts, check_hyperparameters, parse_choice, suggestion

_NETWORK = "model.network."
"""Prefix of a network's parameters in the module that trains it."""

_ROUNDING = 1e-9
# As torch.optim.lr_scheduler.OneCycleLR.
_RISE, _START = 0.3, 1 / 25
_END = _START / 1e4
_NO_CLOSURE = ("LBFGS", "SparseAdam", "Optimizer")
OPTIMIZERS = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and name not in _NO_CLOSURE
}
"""The optimizers of torch by name; LBFGS needs the loss several times a step, SparseAdam sparse gradients."""


@dataclass(frozen=True)
class Recipe:
    """How a network is optimized.

    Args:
        optimizer: ``sgd``, ``adamw``, another class of ``torch.optim`` in lower case, or ``timm/NAME``; also with
            options, ``name(key=value)``.
        learning_rate: Peak learning rate.
        momentum: Momentum of sgd; first of the betas of adamw and its kin.
        weight_decay: Of weights; biases and the scales of normalization layers have none.
        nesterov: Whether sgd uses Nesterov momentum.
        schedule: After the warm-up: ``cosine`` (to zero at the last step), ``constant``, ``step`` (times ``gamma``
            every ``step_epochs``), ``multistep`` (times ``gamma`` after each of the ``milestones``), ``poly`` (to zero,
            as the remaining fraction of the training to the power of ``poly_power``), or ``onecycle`` (from a
            twenty-fifth up to the peak in 30 % of the training, then to nearly zero, both as half a cosine).
        warmup_epochs: Epochs over which the learning rate rises linearly.
        milestones: Epochs, from the beginning of the training.
        step_epochs: Epochs between two steps.
        gamma: Factor of a step.
        poly_power: Exponent; 1: linear.
        layer_decay: Factor of the learning rate from each block of the network to the one before it, the last having
            the full rate; ``None``: all have.
        freeze: ``backbone``: train the classifier layer alone, a linear probe; a number: for so many epochs; ``None``:
            never. Frozen layers are in evaluation mode.
        swa: First epoch, from 1, from which on the weights at the end of each epoch are averaged; ``None``: no average.
        update_bn: Whether to recompute the statistics of batch normalization on training images before each validation.

    Source: Loshchilov & Hutter (2016), https://arxiv.org/abs/1608.03983 (cosine); (2017),
        https://arxiv.org/abs/1711.05101 (adamw); Goyal et al. (2017), https://arxiv.org/abs/1706.02677 (warm-up);
        Smith & Topin (2017), https://arxiv.org/abs/1708.07120 (onecycle); Clark et al. (2020), section 3.2,
        https://arxiv.org/abs/2003.10555 (layer decay); Izmailov et al. (2018), https://arxiv.org/abs/1803.05407 (swa);
        Wu & Johnson (2021), section 3.1, https://arxiv.org/abs/2105.07576 (statistics of batch normalization)
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
    layer_decay: float | None = None
    freeze: int | str | None = None
    swa: int | None = None
    update_bn: bool = False

    def build_optimizer(self, network: nn.Module, *, fused: bool = True) -> Optimizer:
        """Build the optimizer of a network's trainable parameters, with one fused kernel if the device has one.

        Raises:
            UserError: If there is no such optimizer, or it doesn't take the options or the parameters.
        """
        named = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        scales = dict.fromkeys(named, 1.0) if self.layer_decay is None else layer_scales(named, self.layer_decay)
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, weight in named.items():
            decay = self.weight_decay if weight.ndim > 1 else 0.0
            learning_rate = self.learning_rate * scales[name]
            group = {"params": [], "weight_decay": decay, "lr": learning_rate}
            groups.setdefault((-scales[name], -decay), group)["params"].append(weight)
        ordered = [groups[key] for key in sorted(groups)]
        # One pass over the weights instead of ten, which matters on a CPU from some 20 million weights on.
        fused = fused and all(weight.device.type in ("cpu", "cuda") for weight in named.values())
        try:
            return self._create(ordered, fused=fused)
        except UserError as error:
            raise UserError(f"--optimizer {self.optimizer}: {error}") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--optimizer {self.optimizer}: can't be built: {error}") from None

    def _create(self, groups: list[dict[str, Any]], *, fused: bool) -> Optimizer:
        name, options = parse_choice(self.optimizer)
        if name.startswith(TIMM):
            return _create_from_timm(name.removeprefix(TIMM), groups, lr=self.learning_rate, **options)
        kind = OPTIMIZERS.get(name)
        if kind is None:
            raise UserError(
                f"there is no such optimizer{suggestion(name, OPTIMIZERS)} (there are: {', '.join(OPTIMIZERS)})"
            )
        check_hyperparameters(kind, options, choice=self.optimizer)
        defaults: dict[str, Any] = {"fused": True} if fused and accepts(kind, "fused") else {}
        if kind is torch.optim.SGD:
            defaults |= {"momentum": self.momentum, "nesterov": self.nesterov}
        elif accepts(kind, "betas"):
            defaults["betas"] = (self.momentum, inspect.signature(kind).parameters["betas"].default[1])
        # Each group has its own learning rate.
        return kind(groups, **defaults | options)

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
        factors: dict[str, Callable[[], float]] = {
            "constant": lambda: 1.0,
            "step": lambda: self.gamma ** (epoch // self.step_epochs),
            "multistep": lambda: self.gamma ** sum(epoch >= milestone for milestone in self.milestones),
            "poly": lambda: (1 - progress) ** self.poly_power,
            "onecycle": lambda: _one_cycle(progress),
            "cosine": lambda: _half_cosine(progress),
        }
        return float(factors[self.schedule]())


def _half_cosine(progress: float) -> float:
    """Fall from 1 to 0 as the progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_cycle(progress: float) -> float:
    if progress < _RISE:
        return 1 - (1 - _START) * _half_cosine(progress / _RISE)
    return _END + (1 - _END) * _half_cosine((progress - _RISE) / (1 - _RISE))


def _create_from_timm(name: str, groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    import_timm()
    optim = importlib.import_module("timm.optim")
    known = optim.list_optimizers()
    if name not in known:
        raise UserError(
            f"there is no such optimizer{suggestion(name, known)} (timm.optim.list_optimizers() lists them)"
        )
    optimizer: Optimizer = optim.create_optimizer_v2(groups, opt=name, **options)
    return optimizer


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter of a network, decaying towards its first block.

    Blocks are the shortest parts of a name that end in a number, such as ``layer1``, ``features.3`` and ``blocks.0``,
    or else the first part; in the order in which the network registers them. Parameters outside the network, such as
    adapters, have a factor of 1.

    Args:
        names: Of the parameters, in order; those of the network itself may begin with ``model.network.``.
        decay: Factor from each block to the one before it.
    """
    names = list(names)
    prefix = _NETWORK if any(name.startswith(_NETWORK) for name in names) else ""
    blocks: dict[str, str] = {}
    for name in names:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split(".")
            depth = next((index for index, part in enumerate(parts[:-1], 1) if part[-1:].isdigit()), 1)
            blocks[name] = ".".join(parts[:depth])
    order = list(dict.fromkeys(blocks.values()))
    return {name: decay ** (len(order) - 1 - order.index(blocks[name])) if name in blocks else 1.0 for name in names}


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


def average_epochs(model: nn.Module) -> AveragedModel:
    """Return the mean of a network's weights and statistics over the calls of ``update_parameters``.

    Source: Izmailov et al. (2018), section 3.2, https://arxiv.org/abs/1803.05407; statistics are averaged like weights
    """
    return AveragedModel(model, avg_fn=_equal_average, use_buffers=True).requires_grad_(False)


def _equal_average(average: Tensor, newest: Tensor, count: Tensor | int) -> Tensor:
    if not average.is_floating_point():
        return newest
    return average + (newest.to(average.dtype) - average) / (count + 1)


def _ramped_average(decay: float, average: Tensor, newest: Tensor, count: Tensor | int) -> Tensor:
    if not average.is_floating_point():
        return newest
    count = torch.as_tensor(count, device=average.device)
    weight = 1 - ((1 + count) / (10 + count)).clamp(max=decay)
    return average.lerp(newest.to(average.dtype), weight.to(average.dtype))
