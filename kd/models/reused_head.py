"""A student that ends in its teacher's classifier layer, behind a projection of its features (SimKD)."""

import copy
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import DualGraphModule

from kd.errors import UserError
from kd.models.catalog import REUSED_HEAD, build_classifier
from kd.models.classifier import Classifier
from kd.models.features import split_at, survey

PROJECTOR = "projector"
"""Module whose output is compared with the teacher's last feature map."""

_BOTTLENECK = 2


class ReusedHead(nn.Module):
    """A network up to its last feature map, a projection to the width of another's, and that one's frozen head.

    The projection consists of 1x1, 3x3 and 1x1 convolutions with half the teacher's width in between, each followed by
    batch normalization and ReLU. A map larger than the teacher's is average-pooled to its size first.

    Args:
        student: The network whose backbone is trained.
        teacher: The network whose head is reused.

    Raises:
        UserError: If a network can't be split at its last feature map.

    Source: Chen et al. (2022), section 3.2, https://arxiv.org/abs/2203.14001
    """

    selected: Tensor

    def __init__(self, student: Classifier, teacher: Classifier) -> None:
        super().__init__()
        self._node, self.backbone, _, (width, size) = _split(student)
        _, _, head, (teacher_width, teacher_size) = _split(teacher)
        # A copy, as the teacher stays as it is.
        self.head = copy.deepcopy(head).requires_grad_(requires_grad=False)
        inner = max(1, teacher_width // _BOTTLENECK)
        self.projector = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, teacher_width, 1, bias=False), nn.BatchNorm2d(teacher_width), nn.ReLU()),
        )
        self._pooled = teacher_size if size > teacher_size else None
        every = torch.arange(len(teacher.description.classes))
        self.register_buffer("selected", every if teacher.selected is None else teacher.selected.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, C)`` of normalized images."""
        features = self.backbone(images)[self._node]
        if self._pooled is not None:
            features = F.adaptive_avg_pool2d(features, self._pooled)
        logits: Tensor = self.head(self.projector(features))
        return logits[:, self.selected]

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Set the mode; the reused head stays in evaluation mode."""
        super().train(mode)
        self.head.eval()
        return self


class _Backbone(DualGraphModule):  # type: ignore[misc]  # torchvision has no types
    """A part of a network that, unlike torchvision's, can be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Backbone":
        root = nn.Module()
        for name in ("_modules", "_parameters", "_buffers"):
            getattr(root, name).update(copy.deepcopy(getattr(self, name), memo))
        graphs = copy.deepcopy(self.train_graph), copy.deepcopy(self.eval_graph)
        copied: _Backbone = _Backbone(root, *graphs).train(self.training)
        return copied


def _split(classifier: Classifier) -> tuple[str, _Backbone, fx.GraphModule, tuple[int, int]]:
    """Return the node of the last feature map, the parts before and after it, and its width and size."""
    node = survey(classifier).last()
    width, size, _ = survey(classifier).shapes[node]
    before, after = split_at(classifier, node)
    mode, side = classifier.training, classifier.description.image_size
    with torch.no_grad():
        features = before.eval()(classifier.normalization(torch.zeros(1, 3, side, side)))[node]
    classifier.train(mode)
    if tuple(features.shape[1:]) != (width, size, size):
        architecture = classifier.description.architecture
        raise UserError(f"--loss simkd: the features of {architecture} are tokens, not the maps of a convolution")
    return node, _Backbone(before, before.train_graph, before.eval_graph), after, (width, size)


def reuse_head(student: Classifier, teacher: Classifier) -> Classifier:
    """Return a classifier with the student's backbone and the teacher's head, with new weights between them.

    Args:
        student: The student; its backbone is shared.
        teacher: The teacher, which may be restricted to the student's classes.

    Raises:
        UserError: If one of them can't be split at its last feature map.
    """
    outputs = len(teacher.description.classes) if teacher.selected is None else _number_of_outputs(teacher)
    values = {
        "student": student.description.architecture,
        "teacher": teacher.description.architecture,
        "teacher_size": teacher.description.image_size,
        "outputs": outputs,
    }
    text = ", ".join(f"{name}={value!r}" for name, value in values.items())
    network = ReusedHead(student, teacher)
    return Classifier(network, replace(student.description, architecture=f"{REUSED_HEAD}({text})"))


def build_reused_head(
    num_classes: int, image_size: int, *, student: str, teacher: str, teacher_size: int, outputs: int
) -> ReusedHead:
    """Build such a network with new weights; ``outputs`` is the number of the teacher's classes."""
    common: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    names = tuple(map(str, range(max(num_classes, outputs))))
    parts = (
        build_classifier(student, classes=names[:num_classes], image_size=image_size, **common),
        build_classifier(teacher, classes=names[:outputs], image_size=teacher_size, **common),
    )
    return ReusedHead(parts[0], parts[1].restricted_to(names[:num_classes]))


def _number_of_outputs(classifier: Classifier) -> int:
    size = classifier.description.image_size
    whole = Classifier(classifier.network, classifier.description).eval()
    with torch.no_grad():
        return int(whole(torch.zeros(1, 3, size, size)).shape[1])
