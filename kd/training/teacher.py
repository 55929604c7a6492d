"""The teacher: right by construction, whatever is done to the module that asks it."""

import copy

import torch
from torch import Tensor

from kd.losses import Outputs
from kd.models import Classifier


class FrozenTeacher:
    """A classifier that only answers: in evaluation mode, without gradients, never trained.

    It is a plain value and no ``torch.nn.Module``, so that a module that holds it does not register it: it is in no
    checkpoint, no optimizer, no parameter count and no bucket of DDP, and ``.train()`` can't reach it. The classifier
    is copied, so that nothing else that holds it can change the teacher, and a network may teach a copy of itself.

    Args:
        classifier: The network that was trained.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = copy.deepcopy(classifier).eval().requires_grad_(False)
        self.description = classifier.description

    def to(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Move to the device and the precision that the student is in."""
        self._classifier.to(device=device, dtype=dtype)

    def __call__(self, images: Tensor) -> Outputs:
        """Answer a batch.

        Args:
            images: ``(B, 3, S, S)`` in [0, 1]: the very tensor that the student sees.

        Returns:
            Its logits ``(B, C)``, which carry no gradient.
        """
        # Not inference_mode: its tensors can't take part in the student's backward pass.
        with torch.no_grad():
            return Outputs(logits=self._classifier(images), images=images)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of its weights and statistics."""
        return {name: value.detach().cpu().clone() for name, value in self._classifier.state_dict().items()}

    @property
    def training(self) -> bool:
        """Whether any part of it is in training mode; it never is."""
        return any(module.training for module in self._classifier.modules())
