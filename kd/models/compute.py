"""The precision and memory layout in which a network runs fastest on this machine at the same accuracy."""

import ctypes
import platform
from dataclasses import dataclass

import torch

from kd.models.classifier import Classifier
from kd.models.cost import is_depthwise, multiply_adds
from kd.models.ensemble import Ensemble

_SMALL = 20_000_000
"""Multiply-adds an image under which nothing is to be won; the arithmetic is not what such a network waits for."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 1 << 30


@dataclass(frozen=True)
class Compute:
    """How a network computes.

    Args:
        precision: As Lightning has it: ``32-true``, ``bf16-mixed``, ``16-mixed``, ...
        channels_last: Whether the channels of a pixel lie beside each other in memory.
        why: The reason, for a person.
    """

    precision: str
    channels_last: bool
    why: str

    def __str__(self) -> str:
        """Say it to a person."""
        return f"{self.precision}{', channels last' if self.channels_last else ''}: {self.why}"

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that convolutions and matrix products compute in, where it is not that of the weights."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)


def fastest(network: Classifier | Ensemble, *, accelerator: str, trains: bool) -> Compute:
    """Choose by rules, so that two runs on one machine choose alike; ``benchmarks/`` measures what they are made from.

    On a CPU that multiplies bfloat16, dense networks train and answer in it three times as fast. Depthwise ones answer
    somewhat faster, and train more slowly.

    Args:
        network: The network.
        accelerator: ``cpu``, ``gpu``, ...: as Lightning has it.
        trains: Whether it is trained, or only answers.
    """
    if accelerator in ("gpu", "cuda") and torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported()
        precision = "bf16-mixed" if has_bfloat16 else "16-mixed"
        return Compute(precision, channels_last=True, why="this GPU's tensor cores")
    if accelerator != "cpu":
        return Compute("32-true", channels_last=False, why=f"default on {accelerator}")
    if multiply_adds(network) < _SMALL:
        return Compute("32-true", channels_last=False, why="small network")
    if not multiplies_bfloat16():
        return Compute("32-true", channels_last=True, why="this CPU has no bfloat16 instructions")
    if trains and is_depthwise(network):
        return Compute("32-true", channels_last=True, why="depthwise convolutions train more slowly in bfloat16")
    return Compute("bf16-mixed", channels_last=True, why="this CPU has bfloat16 instructions")


def multiplies_bfloat16() -> bool:
    """Say whether this CPU has instructions for products of bfloat16."""
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(capability()) if capability is not None else False


def why_not_compiled(device: str) -> str | None:
    """Say why ``torch.compile`` does not work on this machine, by trying it on a sum; ``None`` if it does.

    Args:
        device: ``cpu``, ``cuda``, ...
    """
    try:
        torch.compile(_sum_of_squares)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 (whatever a compiler, a driver or its absence raises)
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    finally:
        torch.compiler.reset()
    return None


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    return (values * values).sum()


def keep_large_blocks() -> bool:
    """Let glibc keep the memory of large tensors for the next ones, instead of giving each back to the system.

    By default it maps each block above 32 MiB anew, and each of its pages is faulted in again. It holds for the whole
    process, and does nothing where the C library is another one.

    Returns:
        Whether the library took it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
