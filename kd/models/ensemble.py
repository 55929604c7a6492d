"""Several classifiers that answer as one."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.models.classifier import Classifier

AVERAGES = ("probabilities", "logits")


class Ensemble(nn.Module):
    r"""Classifiers of the same classes that answer together, each at the image size that it was made for.

    Probabilities are averaged as :math:`\log \sum_k w_k \sigma(v_k)`, which are logits again: their softmax is the
    weighted mean of the members' probabilities. Averaged logits, :math:`\sum_k w_k v_k`, are the geometric mean. A
    single member's logits stay as they are.

    Args:
        members: The classifiers.
        weights: Their weights, not negative, of any sum above 0; ``None``: all alike.
        average: What is averaged, ``probabilities`` or ``logits``.

    Shape:
        ``(B, 3, S, S)`` in [0, 1] to logits ``(B, C)``.

    Raises:
        ValueError: If there is no member, the weights are not one a member, negative or all 0, or the members differ in
            their classes.

    Source: Hinton, Vinyals & Dean (2015), section 2, https://arxiv.org/abs/1503.02531 (both means)
    """

    weights: Tensor

    def __init__(
        self, members: Sequence[Classifier], *, weights: Sequence[float] | None = None, average: str = "probabilities"
    ) -> None:
        super().__init__()
        weights = [1.0] * len(members) if not weights else list(weights)
        if not members or len(weights) != len(members):
            raise ValueError(f"an ensemble has one weight a member: {len(members)} members, {len(weights)} weights")
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"an ensemble's weights are 0 or more, and not all 0: {weights}")
        if average not in AVERAGES:
            raise ValueError(f"an ensemble averages {' or '.join(AVERAGES)}, not {average}")
        if len({member.description.classes for member in members}) > 1:
            raise ValueError("the members of an ensemble have the same classes in the same order")
        self.members: Sequence[Classifier] = nn.ModuleList(members)  # type: ignore[assignment]  # it forgets of what
        self.average = average
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))
        self.description = dataclasses.replace(
            members[0].description, architecture=" + ".join(member.description.architecture for member in members)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        answers = [member(resized(images, member.description.image_size)) for member in self.members]
        if len(answers) == 1:
            alone: Tensor = answers[0]
            return alone
        # In float32, whatever the members compute in.
        logits = torch.stack([answer.float() for answer in answers])
        weights = self.weights.float()[:, None, None]
        if self.average == "logits":
            return torch.sum(weights * logits, dim=0)
        mixture: Tensor = (F.log_softmax(logits, dim=2) + weights.log()).logsumexp(dim=0)
        return mixture

    def count_parameters(self) -> int:
        """Count the numbers that training set, of all members."""
        return sum(member.count_parameters() for member in self.members)


def resized(images: Tensor, size: int) -> Tensor:
    """Resize square images ``(B, 3, S, S)`` to ``(B, 3, size, size)``, where they differ, as a photograph would be."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
