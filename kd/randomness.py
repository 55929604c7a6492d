"""Random seeds derived by name, so that draws never depend on the draws before them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """Derive a seed, from 0 to 2**63 - 1, from parts such as (seed, epoch, image key); identical on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of one device.

    ``torch.manual_seed`` seeds all devices; while CUDA is not initialized, it queues each call with its stack trace,
    which costs half a millisecond per step and memory that grows.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's CPU generator with a derived seed inside the block, and restore its state afterwards.

    torchvision's transforms and torch's initializers draw from that generator and accept no other.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        generator.set_state(before)
