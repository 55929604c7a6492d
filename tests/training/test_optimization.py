import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from kd.errors import UserError
from kd.models import build_classifier
from kd.training import Recipe
from kd.training.optimization import average_epochs, layer_scales


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


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("rmsprop(alpha=0.7, momentum=0.2)", "RMSprop", {"alpha": 0.7, "momentum": 0.2}),
        ("adam(eps=1e-5)", "Adam", {"eps": 1e-5, "betas": (0.8, 0.999)}),
        ("nadam", "NAdam", {"betas": (0.8, 0.999)}),
        ("adagrad(lr_decay=0.1)", "Adagrad", {"lr_decay": 0.1}),
        ("timm/lamb(max_grad_norm=2.0)", "Lamb", {"max_grad_norm": 2.0}),
        ("timm/lion", "Lion", {}),
    ],
)
def test_other_optimizers_are_chosen_by_name_with_options(text: str, kind: str, expected: dict[str, object]) -> None:
    if text.startswith("timm"):
        pytest.importorskip("timm")
    optimizer = Recipe(optimizer=text, momentum=0.8, learning_rate=0.2, weight_decay=0.3).build_optimizer(network())
    assert type(optimizer).__name__ == kind
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.2, 0.3), (0.2, 0.0)}
    optimizer.zero_grad()
    sum(weight.sum() for group in optimizer.param_groups for weight in group["params"]).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamm", r"--optimizer adamm: there is no such optimizer; did you mean 'adam'\?"),
        ("lbfgs", "--optimizer lbfgs: there is no such optimizer"),
        ("sgd(beta=1)", r"--optimizer sgd\(beta=1\): .*there is no hyperparameter 'beta'"),
        ("adam(eps=-1)", r"--optimizer adam\(eps=-1\): can't be built: Invalid epsilon"),
        ("muon", "--optimizer muon: can't be built: Muon only supports 2D"),
        ("timm/lyon", r"--optimizer timm/lyon: there is no such optimizer; did you mean 'lion'\?"),
        ("timm/lion(nonsense=1)", "can't be built"),
    ],
)
def test_an_unknown_optimizer_or_option_is_refused(text: str, message: str) -> None:
    if text.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        Recipe(optimizer=text).build_optimizer(network())


def test_the_learning_rate_of_onecycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101, cycle_momentum=False)
    factor = partial(Recipe(schedule="onecycle").factor, total_steps=100, warmup_steps=0)
    for step in range(101):
        # Torch's rise ends a step earlier.
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=0.03)
        optimizer.step()
        if step < 100:
            scheduler.step()
    assert (factor(0), factor(30)) == pytest.approx((0.04, 1.0))
    assert factor(100) == pytest.approx(0.04 / 1e4)


def test_layers_have_smaller_learning_rates_towards_the_first() -> None:
    resnet = build_classifier("resnet18", classes=("a", "b"), image_size=32)
    names = [f"model.{name}" for name, _ in resnet.named_parameters()]
    scales = layer_scales([*names, "adapters.0.weight"], 0.5)
    depth = {"conv1": 6, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1, "fc": 0}
    for name in names:
        assert scales[name] == 0.5 ** depth[name.removeprefix("model.network.").split(".")[0]]
    assert scales["adapters.0.weight"] == 1
    mobile = build_classifier("mobilenet_v3_small", classes=("a", "b"), image_size=32)
    found = layer_scales([name for name, _ in mobile.network.named_parameters()], 0.9)
    assert found["classifier.3.weight"] == 1
    assert found["features.0.0.weight"] == min(found.values()) == pytest.approx(0.9 ** (len(set(found.values())) - 1))
    optimizer = Recipe(layer_decay=0.5, learning_rate=0.2).build_optimizer(resnet)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    named = dict(resnet.named_parameters())
    assert rates[id(named["network.conv1.weight"])] == pytest.approx(0.2 * 0.5**6)
    assert rates[id(named["network.fc.bias"])] == 0.2


def test_epochs_are_averaged_equally() -> None:
    linear, norm = nn.Linear(1, 1), nn.BatchNorm1d(1)
    average = average_epochs(nn.Sequential(linear, norm))
    for value in (1.0, 2.0, 6.0):
        linear.weight.data.fill_(value)
        norm.running_mean = torch.tensor([-value])
        norm.num_batches_tracked = torch.tensor(value).long()
        average.update_parameters(nn.Sequential(linear, norm))
    found = average.module.state_dict()
    assert [float(found[name]) for name in ("0.weight", "1.running_mean", "1.num_batches_tracked")] == [3, -3, 6]


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
