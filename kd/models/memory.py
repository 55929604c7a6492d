"""What memory a training takes, and how many images fit into a batch."""

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.models.classifier import Classifier

_FLOAT32 = 4
# A weight, its gradient, and the two numbers that AdamW keeps of it.
_NUMBERS_A_WEIGHT = 4
_MOST = 512
_SHARE = 0.5


def training_bytes(network: Classifier, batch_size: int) -> int:
    """Estimate the bytes that it takes to train a network in float32: weights, optimizer, and what its layers leave.

    Args:
        network: The network.
        batch_size: Images in a batch.
    """
    return _FLOAT32 * (_NUMBERS_A_WEIGHT * network.count_parameters() + batch_size * _numbers_left_behind(network))


def free_memory() -> int | None:
    """Return the bytes of memory that a program may take, or ``None`` where the system does not say."""
    try:
        # Unlike what is merely free, this counts what the system keeps of files, and would give away.
        known = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        return 1024 * int(known[1]) if known else None
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return None


def largest_batch(networks: Sequence[Classifier], *, device: torch.device, most: int = _MOST) -> int:
    """Return the largest power of two of images that each of the networks can be trained on at once.

    On a GPU a step is tried. On a CPU, where memory that runs out ends the program, what a step takes is estimated, and
    half of the free memory may go.

    Args:
        networks: The networks, which stay as they are.
        device: Where they are trained.
        most: The most images.

    Returns:
        At least 1.
    """
    batch_size = 1 << (max(1, most).bit_length() - 1)
    for network in networks:
        while batch_size > 1 and not _fits(network, batch_size, device):
            batch_size //= 2
    return batch_size


def _fits(network: Classifier, batch_size: int, device: torch.device) -> bool:
    if device.type == "cpu":
        free = free_memory()
        return free is None or training_bytes(network, batch_size) <= _SHARE * free
    return can_step(copy.deepcopy(network).to(device), batch_size, device)


def can_step(network: Classifier, batch_size: int, device: torch.device) -> bool:
    """Try a step on random images; the network is not what it was after it.

    Args:
        network: The network, on the device.
        batch_size: Images in the batch.
        device: Where.
    """
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


def _numbers_left_behind(network: Classifier) -> int:
    """Count the numbers that one image leaves behind on its way through a network, for its way back."""
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:  # noqa: ARG001 (a hook's signature)
        nonlocal counted
        if isinstance(output, Tensor) and not list(module.children()):
            counted += output.numel()

    parameter = next(network.parameters())
    size = network.description.image_size
    hooks = [module.register_forward_hook(count) for module in network.modules()]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size, device=parameter.device))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return counted
