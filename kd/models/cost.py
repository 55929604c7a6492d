"""What a network costs to compute."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd.models.classifier import Classifier
from kd.models.ensemble import Ensemble


def multiply_adds(classifier: Classifier | Ensemble) -> int:
    """Count the multiplications with an addition that one image costs, in convolutions and matrix products."""
    size = classifier.description.image_size
    device = next(classifier.parameters()).device
    training = classifier.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier.eval()(torch.zeros(1, 3, size, size, device=device))
    classifier.train(training)
    return int(counter.get_total_flops()) // 2


def is_depthwise(network: nn.Module) -> bool:
    """Say whether a network has convolutions of each channel for itself: bound by memory, not by arithmetic."""
    return any(isinstance(one, nn.Conv2d) and one.groups == one.in_channels > 1 for one in network.modules())
