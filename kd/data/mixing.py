"""Mixing the images of a batch with one another, and their labels with them."""

import torch
from torch import Tensor
from torchvision.transforms import v2


class Mixing:
    """Mixup, CutMix, or for each batch one of the two by chance, drawn from torch's generator.

    Args:
        mixup: The parameter alpha of the Beta distribution that the weight of an image is drawn from; 0: no mixup.
        cutmix: The same for the area that is cut; 0: no CutMix.
        num_classes: Number of classes C.

    Raises:
        ValueError: If both are 0, or one is negative.

    Source: Zhang et al. (2017), section 2, https://arxiv.org/abs/1710.09412 (mixup); Yun et al. (2019), section 3,
        https://arxiv.org/abs/1905.04899 (CutMix)
    """

    def __init__(self, *, mixup: float = 0.0, cutmix: float = 0.0, num_classes: int) -> None:
        if min(mixup, cutmix) < 0 or not (mixup or cutmix):
            raise ValueError(f"mixup and cutmix are 0 or more, and one of them above: {mixup}, {cutmix}")
        # Images without a label are a class more, so that it shows which mixtures hold one.
        kinds = [
            kind(alpha=alpha, num_classes=num_classes + 1)
            for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha
        ]
        self._mix = kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)
        self._num_classes = num_classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: ``(B, 3, S, S)``, floating point.
            labels: ``(B,)``, integers; -1 for an image without a label.

        Returns:
            The mixed images, and the probabilities of their classes ``(B, C)``; where an image without a label is part
            of the mixture, all of them are 0.
        """
        images, mixed = self._mix(images, labels.where(labels >= 0, torch.full_like(labels, self._num_classes)))
        unknown = mixed[:, self._num_classes :] > 0
        return images, mixed[:, : self._num_classes].masked_fill(unknown, 0.0)
