"""A frozen teacher, which training can't change."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import Outputs
from kd.metrics import decide
from kd.models import Classifier, Compute, Embedder, Ensemble, FeatureReader, Survey, survey
from kd.models.classifier import resized

_FEATURES = "features"


class FrozenTeacher:
    """A classifier or an ensemble for inference only: in evaluation mode, without gradients to its weights.

    It isn't a ``torch.nn.Module``, so that a module that holds it doesn't register it: it is in no checkpoint, no
    optimizer, no parameter count and no DDP bucket, and ``.train()`` doesn't reach it. The network is copied, so that
    the original can be trained further, even as the student.

    Args:
        network: The trained network.
        compute: Inference precision and memory layout; ``None``: those of the training.
        compiled: Whether to compile the network, where only its logits are needed.
    """

    def __init__(
        self, network: Classifier | Ensemble, *, compute: Compute | None = None, compiled: bool = False
    ) -> None:
        self._compute = compute
        ensemble = network if isinstance(network, Ensemble) else Ensemble([network])
        self.network = copy.deepcopy(ensemble).eval().requires_grad_(False)
        if compute is not None and compute.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compiled:
            self.network.compile()
        self._computes_gradients = False
        self._reader: FeatureReader | None = None
        self.description = network.description

    @property
    def features_only(self) -> bool:
        """Whether it has no classifier layer, so that its only output is the node ``features``."""
        return isinstance(self.network.members[0], Embedder)

    def survey(self) -> Survey:
        """List the nodes of the network, if it is a single one."""
        member = self._only_member
        if not self.features_only:
            return survey(member)
        size, device = self.description.image_size, member.normalization.mean.device
        with torch.no_grad():
            width = int(member(torch.zeros(1, 3, size, size, device=device)).shape[1])
        shapes = {_FEATURES: (width, 1, 1)}
        return Survey(
            self.description.architecture, shapes, (), (_FEATURES, _FEATURES), frozenset(shapes), (_FEATURES,)
        )

    def with_outputs(self, *, nodes: Sequence[str] = (), gradients: bool = False) -> "FrozenTeacher":
        """Return a teacher with the same network that also outputs features or gradients.

        Args:
            nodes: Nodes of the network whose features are output.
            gradients: Whether to output the gradients of the top logit with respect to the images.
        """
        teacher = copy.copy(self)
        teacher._computes_gradients = gradients  # noqa: SLF001 (its own copy)
        reads_nodes = nodes and not self.features_only
        teacher._reader = FeatureReader(self._only_member, nodes) if reads_nodes else None  # noqa: SLF001
        return teacher

    @property
    def _only_member(self) -> Classifier:
        members = self.network.members
        if len(members) > 1:
            raise UserError(
                f"--loss: features are compared with those of one teacher, not of {len(members)}: "
                f"{self.description.architecture}; name a single --teacher_model"
            )
        return members[0]

    def to(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Move to the student's device and precision."""
        self.network.to(device=device, dtype=dtype)
        if self._reader is not None:
            self._reader.to(device=device, dtype=dtype)

    def __call__(self, images: Tensor) -> Outputs:
        """Compute the detached outputs for the student's images ``(B, 3, S, S)`` in [0, 1]."""
        if self._computes_gradients:
            images = images.detach().requires_grad_()
        # Not inference_mode: its tensors can't take part in the student's backward pass.
        with torch.set_grad_enabled(self._computes_gradients), self._precision(images.device):
            if self.features_only:
                # It has no logits.
                logits = images.new_empty(len(images), 0)
                features = {_FEATURES: self.network(images)[:, :, None, None]}
            elif self._reader is None:
                logits, features = self.network(images), dict[str, Tensor]()
            else:
                logits, features = self._reader(resized(images, self.description.image_size))
        gradients = None
        if self._computes_gradients:
            top = logits.gather(1, logits.argmax(dim=1, keepdim=True))
            (gradients,) = torch.autograd.grad(top.sum(), images)
        detached = {node: feature.detach() for node, feature in features.items()}
        return Outputs(logits=logits.detach(), features=detached, gradients=gradients)

    def decisions(self, images: Tensor) -> Tensor:
        """Return the predicted classes ``(B,)``, or with several labels an image ``(B, C)``."""
        with torch.no_grad(), self._precision(images.device):
            return decide(self.network(images), multilabel=self.description.multilabel)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context of the teacher's own precision, whatever the student's is."""
        if self._compute is None:
            return nullcontext()
        dtype = self._compute.autocast
        return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
