"""Mixup and CutMix."""

import torch
from torch import Tensor
from torchvision.transforms import v2


class Mixing:
    """Mixup, CutMix, or one of the two at random for each batch, drawn from torch's global generator.

    Args:
        mixup: Parameter alpha of the Beta distribution of an image's weight; 0: no mixup.
        cutmix: Parameter alpha of the Beta distribution of the area pasted; 0: no CutMix.
        num_classes: Number of classes C.

    Source: Zhang et al. (2017), section 2, https://arxiv.org/abs/1710.09412 (mixup); Yun et al. (2019), section 3,
    https://arxiv.org/abs/1905.04899 (CutMix)
    """

    def __init__(self, *, mixup: float = 0.0, cutmix: float = 0.0, num_classes: int) -> None:
        if min(mixup, cutmix) < 0 or not (mixup or cutmix):
            raise ValueError(f"mixup and cutmix must be 0 or more, and not both 0: {mixup}, {cutmix}")
        # Unlabeled images get a class of their own, which shows which mixtures contain one.
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        transforms = [kind(alpha=alpha, num_classes=num_classes + 1) for kind, alpha in kinds if alpha]
        self._mix = transforms[0] if len(transforms) == 1 else v2.RandomChoice(transforms)
        self._num_classes = num_classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images ``(B, 3, S, S)``, floating point, with labels ``(B,)``, -1 for unlabeled images.

        Labels become class probabilities ``(B, C)``, all 0 if a mixture contains an unlabeled image.
        """
        images, mixed = self._mix(images, labels.where(labels >= 0, torch.full_like(labels, self._num_classes)))
        has_unlabeled = mixed[:, self._num_classes :] > 0
        return images, mixed[:, : self._num_classes].masked_fill(has_unlabeled, 0.0)
