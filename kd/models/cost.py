"""The cost of a classifier: parameters, multiply-adds, latency and throughput on this machine, training memory."""

import copy
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd.models.catalog import build_classifier, usual_size
from kd.models.classifier import Classifier, Ensemble

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
"""The networks of ``kd cost`` by default: common teachers and students."""

_USUAL_SIZE = 224
_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_BATCH = 32
_SINGLE_REPETITIONS, _BATCH_REPETITIONS = 15, 3
_ENOUGH_SECONDS = 0.5

# A weight, its gradient, and the two moments of AdamW.
_TRAINING_VALUES_PER_WEIGHT = 4
_USABLE_MEMORY = 0.5


def multiply_adds(classifier: Classifier | Ensemble) -> int:
    """Count the multiply-adds of one image in convolutions and matrix products; 0 if its logits are looked up."""
    if any(getattr(module, "is_lookup", False) for module in classifier.modules()):
        return 0
    training = classifier.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier.eval()(_one_image(classifier))
    classifier.train(training)
    return int(counter.get_total_flops()) // 2


def is_depthwise(network: nn.Module) -> bool:
    """Return whether a network has depthwise convolutions, which are bound by memory bandwidth, not by arithmetic."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    return any(convolution.groups == convolution.in_channels > 1 for convolution in convolutions)


def measure_cost(network: Classifier | Ensemble) -> dict[str, Any]:
    """Measure the cost of a classifier, which is left on the CPU in evaluation mode.

    Returns:
        ``parameters``; ``multiply_adds`` of one image; ``megabytes`` (10^6 bytes) of the weights by type; ``speed`` by
        device: ``latency_ms`` of one image and ``images_per_second`` in batches of 32, medians in float32; ``threads``
        and ``machine``.
    """
    network = network.eval()
    values = sum(value.numel() for value in network.state_dict().values())
    speed = {"cpu": _measure_speed(network, "cpu")}
    if torch.cuda.is_available():
        speed["gpu"] = _measure_speed(network.to("cuda"), "cuda")
        network.to("cpu")
    return {
        "parameters": network.count_parameters(),
        "multiply_adds": multiply_adds(network),
        "megabytes": {name: values * size / 1e6 for name, size in _BYTES.items()},
        "speed": speed,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def measure_cost_by_name(
    architecture: str, *, num_classes: int = 1000, image_size: int | None = None
) -> dict[str, Any]:
    """Measure the cost of a network with random weights, by default at its usual image size in pixels, or 224.

    Returns:
        The result of :func:`measure_cost`, with ``model``, ``num_classes`` and ``image_size``.
    """
    size = image_size or usual_size(architecture) or _USUAL_SIZE
    classes = tuple(map(str, range(num_classes)))
    network = build_classifier(architecture, classes=classes, image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return {"model": architecture, "num_classes": num_classes, "image_size": size} | measure_cost(network)


def _measure_speed(network: Classifier | Ensemble, device: str) -> dict[str, float]:
    size = network.description.image_size

    def seconds(count: int, repetitions: int) -> float:
        images = torch.rand(count, 3, size, size, device=device)
        times = []
        with torch.no_grad():
            for _ in range(repetitions + 1):
                start = time.perf_counter()
                network(images)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                if sum(times[1:]) > _ENOUGH_SECONDS:
                    break
        # The first pass allocates memory and selects kernels.
        return statistics.median(times[1:])

    latency, batch = seconds(1, _SINGLE_REPETITIONS), seconds(_BATCH, _BATCH_REPETITIONS)
    return {"latency_ms": 1000 * latency, "images_per_second": _BATCH / batch}


def training_bytes(network: Classifier, batch_size: int) -> int:
    """Estimate the memory for training a network in float32 with AdamW, in bytes."""
    saved = batch_size * _count_activations(network)
    return 4 * (_TRAINING_VALUES_PER_WEIGHT * network.count_parameters() + saved)


def free_memory() -> int | None:
    """Return the available memory in bytes, or ``None`` if the system doesn't report it."""
    try:
        # Unlike MemFree, this counts the file cache, which the system gives up on demand.
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        return 1024 * int(available[1]) if available else None
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return None


def largest_batch(networks: Sequence[Classifier], *, device: torch.device, most: int) -> int:
    """Return the largest power of two, at most ``most``, of images on which each of the networks can be trained.

    On a GPU, a training step is tried. On a CPU, where running out of memory kills the process, the memory is estimated
    and limited to half of what is available.
    """
    batch_size = 1 << (max(1, most).bit_length() - 1)
    for network in networks:
        while batch_size > 1 and not _fits(network, batch_size, device):
            batch_size //= 2
    return batch_size


def _fits(network: Classifier, batch_size: int, device: torch.device) -> bool:
    if device.type == "cpu":
        free = free_memory()
        return free is None or training_bytes(network, batch_size) <= _USABLE_MEMORY * free
    return can_step(copy.deepcopy(network).to(device), batch_size, device)


def can_step(network: Classifier, batch_size: int, device: torch.device) -> bool:
    """Return whether memory suffices for a training step, which changes the network, on random images."""
    size = network.description.image_size
    optimizer = torch.optim.AdamW(network.parameters())
    try:
        images = torch.rand(batch_size, 3, size, size, device=device)
        loss = F.cross_entropy(network(images), torch.zeros(batch_size, dtype=torch.long, device=device))
        torch.autograd.backward(loss)
        optimizer.step()
    except torch.OutOfMemoryError:
        return False
    finally:
        network.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _count_activations(network: Classifier) -> int:
    """Count the values that the layers output for one image, which the backward pass needs."""
    outputs: list[int] = []

    def count(module: nn.Module, _: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor) and not list(module.children()):
            outputs.append(output.numel())

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(_one_image(network))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return sum(outputs)


def _one_image(network: Classifier | Ensemble) -> Tensor:
    size = network.description.image_size
    return torch.zeros(1, 3, size, size, device=next(chain(network.parameters(), network.buffers())).device)
