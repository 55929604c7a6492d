"""Averages: of what is logged over the steps, and of the weights over the training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class RunningMeans:
    """Means of tensors by name, without a synchronization with the device until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Return what a resumed training goes on with."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state` returned."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])

    def add(self, values: dict[str, Tensor], *, share: float = 1.0) -> None:
        """Add the scalars of a step, which counts that much."""
        for name, value in values.items():
            counted = value if share == 1 else value * share
            self._sums[name] = self._sums[name] + counted if name in self._sums else counted
            self._counts[name] = self._counts.get(name, 0.0) + share

    def take(self, names: Sequence[str], *, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the sums and how much was summed, ``(N,)`` each: as many in each process, whatever it met."""
        nothing = torch.zeros((), device=device)
        totals = torch.stack([self._sums.get(name, nothing).float() for name in names])
        counts = torch.tensor([float(self._counts.get(name, 0)) for name in names], device=device)
        self._sums, self._counts = {}, {}
        return totals, counts


def average_of_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network's weights and statistics, that follows ``update_parameters``.

    Args:
        model: The network, whose weights it begins with.
        decay: Part of the average that stays at each step, from 0 to 1, once there have been many; after n steps it is
            (1 + n) / (10 + n) while that is smaller, so that the first weights do not linger.

    Source: Tarvainen & Valpola (2017), section 2, https://arxiv.org/abs/1703.01780; the start is TensorFlow's
        ``ExponentialMovingAverage`` with ``num_updates``
    """
    return AveragedModel(model, avg_fn=_Decay(decay), use_buffers=True).requires_grad_(False)


class _Decay:
    """How the average takes in the newest weights; a class, so that it can be copied and pickled."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, average: Tensor, newest: Tensor, count: Tensor | int) -> Tensor:
        if not average.is_floating_point():
            return newest
        count = torch.as_tensor(count, device=average.device)
        share = 1 - ((1 + count) / (10 + count)).clamp(max=self.decay)
        return average.lerp(newest.to(average.dtype), share.to(average.dtype))
