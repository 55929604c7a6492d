"""A training that has left the numbers is stopped before its step spoils the weights."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from kd.errors import NotFiniteError
from kd.training.modules import ClassifierModule

_LOOK_EVERY = 50
"""Steps between two looks where looking means waiting for the device."""


class StopAtNonFinite(Callback):
    """Stops at a loss or a gradient that is infinite or no number, and says at which step and in which term.

    On a CPU it looks at each step, before the weights move. Elsewhere a look would make the program wait for the
    device, so the flags are gathered there and looked at every 50 steps, and before anything is saved. Of the gradient
    it looks at the first and the last weights: what goes wrong on the way back arrives at the first.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[int, float, tuple[str, ...], Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note whether everything is finite, and look where that costs nothing."""
        # Half precision scales its gradients until they overflow, and leaves such a step out.
        if not isinstance(pl_module, ClassifierModule) or trainer.precision == "16-mixed":
            return
        ends = [one.grad for one in pl_module.model.parameters() if one.grad is not None]
        values = [*pl_module.last_terms.values(), *(end.sum() for end in (ends[:1] + ends[-1:]))]
        names = (*pl_module.last_terms, "the gradient", "the gradient")
        flags = torch.stack([value.detach().float() for value in values]).isfinite()
        self._noted.append((trainer.global_step, float(optimizer.param_groups[0]["lr"]), names, flags))
        if pl_module.device.type == "cpu" or len(self._noted) >= _LOOK_EVERY:
            self._look()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Look before anything is saved."""
        self._look()

    def _look(self) -> None:
        noted, self._noted = self._noted, []
        for step, rate, names, flags in noted:
            wrong = [name for name, fine in zip(names, flags.tolist(), strict=False) if not fine]
            if wrong:
                # The loss is the sum of its terms: they say more.
                terms = [name for name in dict.fromkeys(wrong) if name != "loss"] or ["the loss"]
                raise NotFiniteError(
                    f"not a finite number in step {step:,} (counted from 0): {', '.join(terms)}; the learning rate was "
                    f"{rate:.3g}. A smaller --learning_rate, --warmup_epochs or --gradient_clip may help; "
                    "the checkpoints before it are whole"
                )
