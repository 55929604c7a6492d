"""The running statistics of batch normalization: recomputed, and suspected where validation stays at chance."""

import copy
from collections import Counter
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from torch import nn
from torch.optim.swa_utils import update_bn

from kd.data import Batches, ImageData
from kd.randomness import seeded
from kd.teachers import is_no_better_than_chance
from kd.training.callbacks import batches_of, current_metrics

_IMAGES = 2_048
_TRIED = 512
_GAP = 0.2
_SECOND = 2
_CAUGHT_UP = 10
"""Steps, in units of 1 / momentum, after which statistics have long followed the weights."""
_BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 (the common base of its dimensions)


def recompute_statistics(network: nn.Module, data: Batches, device: torch.device, *, images: int = _IMAGES) -> None:
    """Replace the running statistics of batch normalization by the mean over training images of the first epoch.

    Training doesn't use them, so that it isn't changed.

    Args:
        network: The network, changed in place; its mode is kept.
        data: The images, the same in all processes.
        device: Where the network is.
        images: Number of images.

    Source: Wu & Johnson (2021), section 3.1, https://arxiv.org/abs/2105.07576
    """
    batches = (views.float() / 255 for views in data.sample_views(images))
    with seeded("batch normalization"):
        update_bn(batches, network, device=device)


class ValidationAtChance(Callback):
    """Says once, after the second epoch or later, that validation stays at chance though training succeeds, and why.

    The likely cause is found by trial: statistics of batch normalization that lag behind the weights.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._is_done = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the accuracies of training and validation."""
        if self._is_done or trainer.current_epoch + 1 < _SECOND:
            return
        metrics, data = current_metrics(trainer), batches_of(trainer)
        trained, validated = metrics.get("train/acc"), metrics.get("val/acc")
        if data.splits.multilabel:
            return
        labels = data.splits.val.strata
        if trained is None or validated is None or trained - validated < _GAP:
            return
        if is_no_better_than_chance(validated, labels, images=len(labels)):
            self._is_done = True
            if trainer.is_global_zero:
                left = trainer.estimated_stepping_batches - trainer.global_step
                self.console.print(_explain(trained, validated, pl_module, data, steps_left=left))


def _explain(trained: float, validated: float, module: LightningModule, data: Batches, *, steps_left: float) -> str:
    """Return what was found out by recomputing the statistics of batch normalization."""
    text = f"validation accuracy {validated:.1%} is at chance, but training accuracy is {trained:.1%}"
    evaluated: Any = module.evaluated
    network: nn.Module = copy.deepcopy(evaluated)
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    if layers and isinstance(data, ImageData):
        recompute_statistics(network, data, module.device, images=_TRIED)
        accuracy = _measure(network.eval(), data, module.device)
        if not is_no_better_than_chance(accuracy, data.splits.val.strata, images=min(_TRIED, len(data.splits.val))):
            momentum = Counter(layer.momentum for layer in layers).most_common(1)[0][0]
            passes = momentum is not None and steps_left * momentum > _CAUGHT_UP
            advice = "this passes as training goes on" if passes else "add --update_bn, or train longer"
            return (
                f"{'note' if passes else 'warning'}: {text}: the running statistics of batch normalization (momentum "
                f"{momentum}) lag behind the weights; recomputed on {_TRIED} training images, they give "
                f"{accuracy:.1%}; {advice}"
            )
    other = "; recomputed statistics of batch normalization don't change that" if layers else ""
    return f"warning: {text}{other}; do training and validation images, their classes and their sizes agree?"


def _measure(network: nn.Module, data: ImageData, device: torch.device) -> float:
    """Return a network's accuracy on some validation images."""
    indices, correct = data.validation_indices()[:_TRIED], 0
    for start in range(0, len(indices), data.batch_size):
        positions = [(0, index) for index in indices[start : start + data.batch_size]]
        views, labels = data.val_views.__getitems__(positions)
        with torch.no_grad():
            decisions = network(views.to(device).float() / 255).argmax(dim=1).cpu()
        correct += int((decisions == labels).sum())
    return correct / len(indices)
