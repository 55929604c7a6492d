"""Ensembles of classifiers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.models import Classifier, Description, Ensemble, build_classifier
from kd.models.classifier import resized

CLASSES = ("ant", "bee", "cat")


class Constant(nn.Module):
    """Returns the same logits for every image, and records the image sizes."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(images.shape[-1])
        return self.logits.expand(len(images), -1)


def constant(logits: list[float], *, size: int = 8, name: str = "constant") -> Classifier:
    return Classifier(Constant(torch.tensor(logits)), Description(name, CLASSES, size, "crop", (0.5,) * 3, (0.5,) * 3))


ONE, OTHER = [2.0, 0.0, -1.0], [-1.0, 3.0, 0.5]
IMAGES = torch.rand(4, 3, 8, 8)


def test_probabilities_are_averaged() -> None:
    ensemble = Ensemble([constant(ONE), constant(OTHER)], weights=[3, 1])
    expected = 0.75 * F.softmax(torch.tensor(ONE), 0) + 0.25 * F.softmax(torch.tensor(OTHER), 0)
    torch.testing.assert_close(F.softmax(ensemble(IMAGES), dim=1), expected.expand(4, -1))


def test_logits_are_averaged() -> None:
    ensemble = Ensemble([constant(ONE), constant(OTHER)], average="logits")
    torch.testing.assert_close(ensemble(IMAGES), (torch.tensor(ONE) + torch.tensor(OTHER)).expand(4, -1) / 2)


def test_averaged_logits_are_the_geometric_mean_of_the_probabilities() -> None:
    ensemble = Ensemble([constant(ONE), constant(OTHER)], average="logits")
    geometric = (F.softmax(torch.tensor(ONE), 0) * F.softmax(torch.tensor(OTHER), 0)).sqrt()
    torch.testing.assert_close(F.softmax(ensemble(IMAGES), dim=1)[0], geometric / geometric.sum())


def test_the_logits_of_a_single_member_are_unchanged() -> None:
    torch.testing.assert_close(Ensemble([constant(ONE)])(IMAGES)[0], torch.tensor(ONE), rtol=0, atol=0)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_a_member_with_weight_zero_has_no_effect_and_extreme_logits_are_finite(average: str) -> None:
    ensemble = Ensemble([constant(ONE), constant([1e4, -1e4, 0.0])], weights=[1, 0], average=average)
    torch.testing.assert_close(F.softmax(ensemble(IMAGES), 1)[0], F.softmax(torch.tensor(ONE), 0))
    extreme = Ensemble([constant([-1e4, 1e4, 0.0]), constant([1e4, -1e4, 0.0])], average=average)(IMAGES)
    assert torch.isfinite(extreme).all()


def test_images_are_resized_for_each_member() -> None:
    members = [constant(ONE, size=8), constant(OTHER, size=12)]
    Ensemble(members)(IMAGES)
    assert [member.network.sizes for member in members] == [[8], [12]]


def test_resizing_keeps_the_mean_and_constant_images() -> None:
    assert resized(IMAGES, 8) is IMAGES
    smaller = resized(IMAGES, 4)
    torch.testing.assert_close(smaller.mean(), IMAGES.mean(), rtol=0.02, atol=0)
    gray = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(resized(gray, 5), torch.full((1, 3, 5, 5), 0.25))


def test_the_description_and_the_parameters_are_those_of_all_members() -> None:
    members = [
        build_classifier(name, classes=CLASSES, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
        for name in ("linear", "mlp(hidden=[4])")
    ]
    ensemble = Ensemble(members)
    assert ensemble.description == dataclasses.replace(members[0].description, architecture="linear + mlp(hidden=[4])")
    assert ensemble.count_parameters() == sum(member.count_parameters() for member in members)


@pytest.mark.parametrize(
    ("count", "weights", "average", "words"),
    [
        (0, None, "logits", "one weight per member, not 0 for 0 members"),
        (2, [1.0], "logits", "one weight per member, not 1 for 2 members"),
        (2, [1.0, -1.0], "logits", "weights of an ensemble must be nonnegative"),
        (2, [0.0, 0.0], "logits", "not all 0"),
        (2, None, "votes", "averages probabilities or logits, not votes"),
    ],
)
def test_invalid_arguments_of_an_ensemble_are_refused(
    count: int, weights: list[float] | None, average: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Ensemble([constant(ONE)] * count, weights=weights, average=average)


def test_members_with_different_classes_are_refused() -> None:
    other = Classifier(
        Constant(torch.zeros(3)), dataclasses.replace(constant(ONE).description, classes=("ant", "cat", "bee"))
    )
    with pytest.raises(ValueError, match="the same classes in the same order"):
        Ensemble([constant(ONE), other])
