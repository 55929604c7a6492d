"""The precision and memory layout in which a network runs fastest on this machine at the same accuracy."""

import ctypes
import platform
from dataclasses import dataclass

import torch

from kd.models.classifier import Classifier, Ensemble
from kd.models.cost import is_depthwise, multiply_adds

_SMALL = 20_000_000
"""Multiply-adds per image below which arithmetic is not the bottleneck, so that lower precision gains nothing."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 1 << 30


@dataclass(frozen=True)
class Compute:
    """Precision (in Lightning's names) and memory layout of a network, and the reason for the choice."""

    precision: str
    channels_last: bool
    reason: str

    def __str__(self) -> str:
        """Return precision, layout and reason."""
        return f"{self.precision}{', channels last' if self.channels_last else ''}: {self.reason}"

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast type, or ``None`` if convolutions and matrix products use the type of the weights."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)


def fastest(network: Classifier | Ensemble, *, accelerator: str, trains: bool) -> Compute:
    """Choose precision and memory layout for training or for inference.

    The choice follows from rules, not from measurements, so that it is reproducible; ``benchmarks/`` measures them. On
    a CPU with bfloat16 instructions, dense networks run three times as fast in bfloat16; depthwise ones are somewhat
    faster in inference, but slower in training.
    """
    if accelerator in ("gpu", "cuda") and torch.cuda.is_available():
        precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
        return Compute(precision, channels_last=True, reason="this GPU's tensor cores")
    if accelerator != "cpu":
        return Compute("32-true", channels_last=False, reason=f"default on {accelerator}")
    if multiply_adds(network) < _SMALL:
        return Compute("32-true", channels_last=False, reason="small network")
    if not multiplies_bfloat16():
        return Compute("32-true", channels_last=True, reason="this CPU has no bfloat16 instructions")
    if trains and is_depthwise(network):
        return Compute("32-true", channels_last=True, reason="depthwise convolutions train more slowly in bfloat16")
    return Compute("bf16-mixed", channels_last=True, reason="this CPU has bfloat16 instructions")


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products."""
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return capability is not None and bool(capability())


def why_not_compiled(device: str) -> str | None:
    """Return why ``torch.compile`` fails on this machine, by compiling a sum; ``None`` if it works."""

    def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
        return (values * values).sum()

    try:
        torch.compile(sum_of_squares)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 (a compiler, a driver or their absence may raise anything)
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    finally:
        torch.compiler.reset()
    return None


def keep_large_blocks() -> bool:
    """Let glibc reuse the memory of large tensors instead of returning it to the system; return whether it will.

    By default it maps every block above 32 MiB anew, with a page fault for each page. The setting holds for the whole
    process; other C libraries have none.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
