"""The computational cost of a classifier: size, multiply-adds, latency and throughput on this machine."""

import platform
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd.models.catalog import build_classifier, usual_size
from kd.models.classifier import Classifier
from kd.models.ensemble import Ensemble

CLASSIC = (
    "vgg16",
    "inception_v3",
    "resnet50",
    "densenet121",
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "simple",
    "convnet(widths=[16,32,64,128])",
)
"""The networks that such tables are made of, and students of our own."""

_USUAL_SIZE = 224
_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_BATCH = 32
_SINGLE_TIMES, _BATCH_TIMES = 15, 3
_ENOUGH_SECONDS = 0.5


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


def measure_cost(network: Classifier | Ensemble) -> dict[str, Any]:
    """Measure what a classifier costs.

    Args:
        network: The classifier; it is left on the CPU, in evaluation mode.

    Returns:
        ``parameters``; ``multiply_adds`` of one image; ``megabytes`` (10^6 bytes) of its weights by their type;
        ``speed`` by device: ``latency_ms`` of one image and ``images_per_second`` in batches of 32, medians, in
        float32; ``threads`` and ``machine`` that the CPU's were measured with.
    """
    network = network.eval()
    numbers = sum(value.numel() for value in network.state_dict().values())
    speed = {"cpu": _speed(network, "cpu")}
    if torch.cuda.is_available():
        speed["gpu"] = _speed(network.to("cuda"), "cuda")
        network.to("cpu")
    return {
        "parameters": network.count_parameters(),
        "multiply_adds": multiply_adds(network),
        "megabytes": {name: numbers * size / 1e6 for name, size in _BYTES.items()},
        "speed": speed,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def measure_cost_by_name(
    architecture: str, *, num_classes: int = 1000, image_size: int | None = None
) -> dict[str, Any]:
    """Measure what a network costs, with weights drawn at random.

    Args:
        architecture: As for :func:`kd.models.build_classifier`.
        num_classes: Number of classes.
        image_size: Side of the images, in pixels; ``None``: that which it was made for, or 224.

    Returns:
        What :func:`measure_cost` returns, with ``model``, ``num_classes`` and ``image_size``.

    Raises:
        UserError: If there is no such network, or not for such images.
    """
    size = image_size or usual_size(architecture) or _USUAL_SIZE
    classes = tuple(map(str, range(num_classes)))
    network = build_classifier(
        architecture, classes=classes, image_size=size, resize="crop", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return {"model": architecture, "num_classes": num_classes, "image_size": size} | measure_cost(network)


def _speed(network: Classifier | Ensemble, device: str) -> dict[str, float]:
    size = network.description.image_size

    def seconds(count: int, times: int) -> float:
        images = torch.rand(count, 3, size, size, device=device)
        taken = []
        with torch.no_grad():
            for _ in range(times + 1):
                start = time.perf_counter()
                network(images)
                if device == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
                # What takes long is measured well by few.
                if sum(taken[1:]) > _ENOUGH_SECONDS:
                    break
        # The first one is slower: memory and kernels are got then.
        return statistics.median(taken[1:])

    return {"latency_ms": 1000 * seconds(1, _SINGLE_TIMES), "images_per_second": _BATCH / seconds(_BATCH, _BATCH_TIMES)}
