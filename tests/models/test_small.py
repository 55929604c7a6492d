import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kd.models.small import convnet, linear, mlp, simple


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("size", [8, 16, 30, 33, 64])
@pytest.mark.parametrize("factory", [simple, convnet, mlp, linear])
def test_small_networks_take_any_image_size(size: int, factory: Callable[..., torch.nn.Sequential]) -> None:
    network = factory(7, size)
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_simple_has_the_documented_number_of_parameters() -> None:
    convolutions = sum(9 * inputs * outputs + outputs for inputs, outputs in ((3, 16), (16, 32), (32, 64)))
    assert count(simple(10, 224)) == convolutions + (64 * 28 * 28 + 1) * 512 + (512 + 1) * 10
    assert [layer.p for layer in simple(10, 16) if isinstance(layer, torch.nn.Dropout)] == [0.25]


def test_hyperparameters_set_the_widths() -> None:
    assert count(linear(10, 28)) == 3 * 28 * 28 * 10 + 10
    assert count(mlp(10, 8, hidden=(5, 4))) == (192 * 5 + 5) + (5 * 4 + 4) + (4 * 10 + 10)
    layers = [layer for layer in convnet(10, 16, widths=[4, 6]) if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [4, 6]


@pytest.mark.parametrize("build", [simple, convnet])
def test_max_pooling_before_relu_is_bit_identical(build: Callable[..., nn.Sequential]) -> None:
    torch.manual_seed(0)
    network = build(3, 16).eval()
    usual = list(network)
    for index, (first, second) in enumerate(itertools.pairwise(network)):
        if isinstance(first, nn.MaxPool2d) and isinstance(second, nn.ReLU):
            usual[index : index + 2] = second, first
    assert usual != list(network)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    results = []
    for order in (network, nn.Sequential(*usual)):
        order.zero_grad()
        logits = order(images)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        results.append([logits, *(value.grad.clone() for value in order.parameters() if value.grad is not None)])
        # Checkpoints with the usual order have the same names.
        assert order.state_dict().keys() == network.state_dict().keys()
    assert len(results[0]) > 5
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
