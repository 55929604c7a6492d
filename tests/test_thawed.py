"""A published example trains its teacher along with the student; the loop that shows it does the one or the other."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from benchmarks import thawed
from kd.models import Classifier, build_classifier
from tests.conftest import REPOSITORY


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Classifier:
    monkeypatch.chdir(REPOSITORY)
    digits = tuple("0123456789")
    name = f"{thawed.NETWORK}(widths=[4,8])"
    return build_classifier(name, classes=digits, image_size=28, resize="squash", mean=(0.13,) * 3, std=(0.31,) * 3)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 10, (count,), generator=generator)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_teacher_stays_as_it_was_only_if_it_is_frozen(teacher: Classifier, is_frozen: bool) -> None:
    before = copy.deepcopy(teacher.state_dict())
    run = thawed.train(teacher, images(96, 0), images(50, 1), is_frozen=is_frozen, seed=0)
    weights = [name for name, _ in teacher.named_parameters()]
    moved = {name for name in weights if not torch.equal(teacher.state_dict()[name], before[name])}
    assert moved == (set() if is_frozen else set(weights))
    assert (len(set(run.teacher_acc)) == 1) or not is_frozen


def test_the_loss_is_the_examples(teacher: Classifier) -> None:
    pixels, labels = images(20, 0)
    seen = (pixels.float() / 255).expand(-1, 3, -1, -1)
    torch.manual_seed(7)
    about: dict[str, Any] = {
        "classes": teacher.description.classes,
        "image_size": 28,
        "mean": (0.1307,) * 3,
        "std": (0.3081,) * 3,
    }
    student = build_classifier(thawed.NETWORK, **about)
    with torch.no_grad():
        z, v = student(seen).double().numpy(), teacher(seen).double().numpy()
    run = thawed.train(teacher, (pixels, labels), images(50, 1), is_frozen=True, seed=7)
    label_loss = -log_softmax(z, axis=1)[np.arange(20), labels.numpy()].mean()
    soft_loss = 10**2 * rel_entr(softmax(v / 10, axis=1), softmax(z / 10, axis=1)).sum(axis=1).mean()
    # Twenty images are one batch, so that the first epoch's loss is that of the initial weights.
    assert run.loss[0] == pytest.approx(0.1 * label_loss + 0.9 * soft_loss, rel=1e-4)
    assert run.loss[2] < run.loss[1] < run.loss[0]
