"""The teacher: right by construction, whatever is done to the module that asks it."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import Outputs
from kd.models import Classifier, Compute, Ensemble, FeatureReader, Survey, survey
from kd.models.ensemble import resized


class FrozenTeacher:
    """A classifier, or several that answer as one, that only answers: in evaluation mode, without gradients.

    It is a plain value and no ``torch.nn.Module``, so that a module that holds it does not register it: it is in no
    checkpoint, no optimizer, no parameter count and no bucket of DDP, and ``.train()`` can't reach it. The network is
    copied, so that nothing else that holds it can change the teacher, and a network may teach a copy of itself.

    Args:
        network: The network that was trained.
        compute: How it computes; ``None``: in the precision of the run that asks.
        compiled: Whether its network is compiled, where its logits alone are asked for.
    """

    def __init__(
        self, network: Classifier | Ensemble, *, compute: Compute | None = None, compiled: bool = False
    ) -> None:
        self._compute = compute
        network = network if isinstance(network, Ensemble) else Ensemble([network])
        self._network = copy.deepcopy(network).eval().requires_grad_(False)
        if compute is not None and compute.channels_last:
            self._network.to(memory_format=torch.channels_last)
        if compiled:
            self._network.compile()
        self._gives_gradients = False
        self._reader: FeatureReader | None = None
        self.description = network.description

    def survey(self) -> Survey:
        """List the nodes of its network.

        Raises:
            UserError: If it is several networks, or its features can't be read.
        """
        return survey(self._only_member)

    def giving(self, *, nodes: Sequence[str] = (), gradients: bool = False) -> "FrozenTeacher":
        """Return the same teacher, the network shared, that gives more than its logits.

        Args:
            nodes: Nodes whose features it gives.
            gradients: Whether it gives the gradients to the images.

        Raises:
            UserError: If it is several networks, or its features can't be read.
        """
        teacher = copy.copy(self)
        teacher._gives_gradients = gradients  # noqa: SLF001 (its own copy)
        teacher._reader = FeatureReader(self._only_member, nodes) if nodes else None  # noqa: SLF001
        return teacher

    @property
    def _only_member(self) -> Classifier:
        if len(self._network.members) > 1:
            raise UserError(
                f"--loss: features are compared with those of one teacher, and these are {len(self._network.members)}: "
                f"{self.description.architecture}"
            )
        return self._network.members[0]

    def to(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Move to the device and the precision that the student is in."""
        self._network.to(device=device, dtype=dtype)
        if self._reader is not None:
            self._reader.to(device=device, dtype=dtype)

    def __call__(self, images: Tensor) -> Outputs:
        """Answer a batch.

        Args:
            images: ``(B, 3, S, S)`` in [0, 1]: the very tensor that the student sees.

        Returns:
            Its logits ``(B, C)``, and its features and its gradients ``(B, 3, S, S)`` where it gives them. Nothing
            of it carries a gradient.
        """
        if self._gives_gradients:
            images = images.detach().requires_grad_()
        # Not inference_mode: its tensors can't take part in the student's backward pass.
        with torch.set_grad_enabled(self._gives_gradients), self._precision(images.device):
            if self._reader is None:
                logits, features = self._network(images), dict[str, Tensor]()
            else:
                logits, features = self._reader(resized(images, self.description.image_size))
        gradients = None
        if self._gives_gradients:
            top = logits.gather(1, logits.argmax(dim=1, keepdim=True))
            (gradients,) = torch.autograd.grad(top.sum(), images)
        detached = {node: one.detach() for node, one in features.items()}
        return Outputs(logits=logits.detach(), features=detached, gradients=gradients)

    def decisions(self, images: Tensor) -> Tensor:
        """Return the classes ``(B,)`` that it decides for."""
        with torch.no_grad(), self._precision(images.device):
            decisions: Tensor = self._network(images).argmax(dim=1)
        return decisions

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Let it compute in its own precision, whatever the student computes in."""
        if self._compute is None:
            return nullcontext()
        dtype = self._compute.autocast
        return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of its weights and statistics."""
        return {name: value.detach().cpu().clone() for name, value in self._network.state_dict().items()}

    @property
    def training(self) -> bool:
        """Whether any part of it is in training mode; it never is."""
        return any(module.training for module in self._network.modules())
