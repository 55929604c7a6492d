import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from kd.training import Recipe


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_biases_and_normalization_have_no_weight_decay() -> None:
    optimizer = Recipe(weight_decay=0.3).build_optimizer(network())
    decays = {
        tuple(weight.shape): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]
    }
    assert decays == {(4, 3, 3, 3): 0.3, (2, 4): 0.3, (4,): 0.0, (2,): 0.0}


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_is_chosen_by_name(name: str, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = Recipe(optimizer=name, momentum=0.7, learning_rate=0.2).build_optimizer(network())
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.2
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.7


def test_frozen_parameters_are_not_optimized() -> None:
    linear = nn.Linear(2, 2)
    linear.weight.requires_grad_(False)
    optimizer = Recipe().build_optimizer(linear)
    assert [weight.shape for group in optimizer.param_groups for weight in group["params"]] == [(2,)]


def test_the_learning_rate_warms_up_linearly_and_decays_as_half_a_cosine() -> None:
    factor = partial(Recipe(schedule="cosine").factor, total_steps=110, warmup_steps=10)
    assert [factor(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert factor(60) == pytest.approx(0.5)
    assert factor(35) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factor(110) == pytest.approx(0.0)
    assert factor(111) == pytest.approx(0.0)


def test_a_constant_schedule_is_constant_after_the_warm_up() -> None:
    factor = partial(Recipe(schedule="constant").factor, total_steps=10, warmup_steps=2)
    assert [factor(step) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(schedule="multistep", milestones=(1, 2.5), gamma=0.1), [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]),
        (Recipe(schedule="step", step_epochs=1.5, gamma=0.5), [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]),
        (Recipe(schedule="poly"), [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (Recipe(schedule="poly", poly_power=2), [(1 - step / 8) ** 2 for step in range(8)]),
        (Recipe(schedule="multistep", milestones=(2,), warmup_epochs=1), [0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_schedules_follow_their_formulas(recipe: Recipe, expected: list[float]) -> None:
    recipe = replace(recipe, learning_rate=1.0, optimizer="sgd")
    optimizer = recipe.build_optimizer(network())
    scheduler = recipe.build_scheduler(optimizer, total_steps=8, steps_per_epoch=2)
    rates = []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


def test_sgd_may_have_nesterov_momentum() -> None:
    assert Recipe(optimizer="sgd", nesterov=True).build_optimizer(network()).param_groups[0]["nesterov"] is True


def test_the_warm_up_is_measured_in_epochs() -> None:
    recipe = Recipe(warmup_epochs=0.5, learning_rate=1.0, optimizer="sgd")
    optimizer = recipe.build_optimizer(network())
    scheduler = recipe.build_scheduler(optimizer, total_steps=100, steps_per_epoch=8)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.5, 0.75, 1.0]
