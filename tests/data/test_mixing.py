"""Mixup and CutMix."""

import pytest
import torch

from kd.data import Mixing

IMAGES = torch.arange(4.0)[:, None, None, None].expand(-1, 3, 8, 8) / 4
LABELS = torch.tensor([0, 1, 2, 0])


def test_mixup_mixes_labels_like_images() -> None:
    torch.manual_seed(0)
    images, labels = Mixing(mixup=1.0, num_classes=3)(IMAGES, LABELS)
    # Each image is uniformly gray and is mixed with its neighbor; all with the same weight.
    weight = ((images[1, 0, 0, 0] - IMAGES[0, 0, 0, 0]) / 0.25).item()
    assert 0 < weight < 1
    torch.testing.assert_close(images, weight * IMAGES + (1 - weight) * IMAGES.roll(1, 0))
    one_hot = torch.eye(3)[LABELS]
    torch.testing.assert_close(labels, weight * one_hot + (1 - weight) * one_hot.roll(1, 0))


def test_cutmix_mixes_labels_by_area() -> None:
    torch.manual_seed(3)
    images, labels = Mixing(cutmix=1.0, num_classes=3)(IMAGES, LABELS)
    kept = (images == IMAGES)[1, 0].float().mean().item()
    assert 0 < kept < 1
    torch.testing.assert_close(labels[1], torch.tensor([1 - kept, kept, 0.0]))


def test_mixup_and_cutmix_alternate_at_random() -> None:
    mixing = Mixing(mixup=1.0, cutmix=1.0, num_classes=3)
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        images, _ = mixing(IMAGES, LABELS)
        kinds.add("cutmix" if len(images[1].unique()) == 2 else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_mixing_is_reproducible() -> None:
    mixing = Mixing(mixup=1.0, cutmix=1.0, num_classes=3)
    for seed in range(3):
        torch.manual_seed(seed)
        first = mixing(IMAGES, LABELS)
        torch.manual_seed(seed)
        torch.testing.assert_close(mixing(IMAGES, LABELS), first, rtol=0, atol=0)


def test_a_mixture_with_an_unlabeled_image_is_unlabeled() -> None:
    torch.manual_seed(0)
    _, labels = Mixing(mixup=1.0, num_classes=3)(IMAGES, torch.tensor([0, -1, 2, 0]))
    # The second image is unlabeled, and the third is mixed with it.
    assert (labels.sum(dim=1) > 0).tolist() == [True, False, False, True]
    torch.testing.assert_close(labels.sum(dim=1)[[0, 3]], torch.ones(2))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (-1.0, 1.0)])
def test_invalid_parameters_are_refused(mixup: float, cutmix: float) -> None:
    with pytest.raises(ValueError, match="must be 0 or more, and not both 0"):
        Mixing(mixup=mixup, cutmix=cutmix, num_classes=3)
