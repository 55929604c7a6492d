"""What a classifier costs to run: its size, its arithmetic, its speed on this machine."""

import platform
import statistics
import time
from typing import Any

import torch

from kd.models.classifier import Classifier
from kd.models.cost import multiply_adds
from kd.models.ensemble import Ensemble

_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_BATCH = 32
_SINGLE_TIMES, _BATCH_TIMES = 15, 3
_ENOUGH_SECONDS = 0.5


def price(network: Classifier | Ensemble) -> dict[str, Any]:
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
