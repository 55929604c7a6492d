"""Mixup and CutMix of a batch."""

import pytest
import torch

from kd.data import Mixing

IMAGES = torch.arange(4.0)[:, None, None, None].expand(-1, 3, 8, 8) / 4
LABELS = torch.tensor([0, 1, 2, 0])


def test_labels_are_mixed_as_the_images_are() -> None:
    torch.manual_seed(0)
    images, labels = Mixing(mixup=1.0, num_classes=3)(IMAGES, LABELS)
    # Each image is one gray; each mixture is of an image and its neighbor, at one weight for the batch.
    weight = ((images[1, 0, 0, 0] - IMAGES[0, 0, 0, 0]) / 0.25).item()
    assert 0 < weight < 1
    torch.testing.assert_close(images, weight * IMAGES + (1 - weight) * IMAGES.roll(1, 0))
    one_hot = torch.eye(3)[LABELS]
    torch.testing.assert_close(labels, weight * one_hot + (1 - weight) * one_hot.roll(1, 0))


def test_labels_of_cut_images_are_the_parts_of_the_area() -> None:
    torch.manual_seed(3)
    images, labels = Mixing(cutmix=1.0, num_classes=3)(IMAGES, LABELS)
    kept = (images == IMAGES)[1, 0].float().mean().item()
    assert 0 < kept < 1
    torch.testing.assert_close(labels[1], torch.tensor([1 - kept, kept, 0.0]))


def test_both_are_drawn_by_chance() -> None:
    mixing = Mixing(mixup=1.0, cutmix=1.0, num_classes=3)
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        images, _ = mixing(IMAGES, LABELS)
        kinds.add("cutmix" if len(images[1].unique()) == 2 else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_the_same_generator_gives_the_same_mixture() -> None:
    mixing = Mixing(mixup=1.0, cutmix=1.0, num_classes=3)
    for seed in range(3):
        torch.manual_seed(seed)
        first = mixing(IMAGES, LABELS)
        torch.manual_seed(seed)
        torch.testing.assert_close(mixing(IMAGES, LABELS), first, rtol=0, atol=0)


def test_a_mixture_with_an_image_without_a_label_has_none() -> None:
    torch.manual_seed(0)
    _, labels = Mixing(mixup=1.0, num_classes=3)(IMAGES, torch.tensor([0, -1, 2, 0]))
    # The second and, after it, the third are mixed with the second.
    assert (labels.sum(dim=1) > 0).tolist() == [True, False, False, True]
    torch.testing.assert_close(labels.sum(dim=1)[[0, 3]], torch.ones(2))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (-1.0, 1.0)])
def test_parameters_that_make_no_sense_are_refused(mixup: float, cutmix: float) -> None:
    with pytest.raises(ValueError, match="0 or more, and one of them above"):
        Mixing(mixup=mixup, cutmix=cutmix, num_classes=3)
