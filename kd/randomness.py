"""Everything random hangs on seeds that are derived by name, never on what happened to be drawn before."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """Derive a seed from parts, such as (seed, epoch, image); the same on every machine and in every process.

    Args:
        parts: What the draw hangs on.

    Returns:
        An integer from 0 to 2**63 - 1.

    Example:
        >>> derive_seed(0, "weights") == derive_seed(0, "weights") != derive_seed(1, "weights")
        True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_draws(seed: int, device: torch.device) -> None:
    """Let what is drawn from now on, on the CPU and on a device, hang on a seed.

    ``torch.manual_seed`` does it for all devices there could be, and where CUDA was never used it notes each call
    with its stack for later: half a millisecond a step, and memory that grows.

    Args:
        seed: An integer from 0 to 2**63 - 1.
        device: Where is computed.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Let torch's CPU generator draw from the derived seed inside the block, and go on as before after it.

    torchvision's transforms and torch's initializers draw from that one generator and take no other.

    Args:
        parts: What the draws inside hang on, as in :func:`derive_seed`.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        generator.set_state(before)
