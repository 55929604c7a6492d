"""Finding nodes and reading their features."""

import pytest
import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.models import Classifier, Description, FeatureReader, build_classifier, survey
from kd.models.features import as_map

CLASSES = ("ant", "bee", "cat")


def network(architecture: str, size: int = 64) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(architecture, classes=CLASSES, image_size=size, mean=(0.4,) * 3, std=(0.2,) * 3)


def wrap(module: nn.Module, size: int = 8) -> Classifier:
    name = f"{type(module).__name__}-{id(module)}"
    return Classifier(module, Description(name, CLASSES, size, "crop", (0.4,) * 3, (0.2,) * 3))


@pytest.mark.parametrize(
    ("architecture", "size", "stages", "shape"),
    [
        ("simple", 64, ("0", "3", "6", "8"), (64, 8, 8)),
        ("convnet(widths=[4,6])", 16, ("1", "6"), (6, 8, 8)),
        (
            "resnet18",
            64,
            ("relu", "layer1.1.relu_1", "layer2.1.relu_1", "layer3.1.relu_1", "layer4.1.relu_1"),
            (512, 2, 2),
        ),
        (
            "mobilenet_v3_small",
            64,
            ("features.0", "features.2.block.0", "features.4.block.0", "features.9.block.0", "features.12"),
            (576, 2, 2),
        ),
        # Channels last inside; a class token before the map.
        ("swin_t", 64, ("features.1.1.add_1", "features.3.1.add_1", "features.5.5.add_1", "permute"), (768, 2, 2)),
        ("vit_b_32(image_size=64)", 64, ("encoder.ln",), (768, 2, 2)),
        # Parallel branches are excluded.
        (
            "googlenet",
            64,
            ("conv1.relu", "conv3.relu", "inception3b.cat", "inception4e.cat", "inception5b.cat"),
            (1024, 2, 2),
        ),
    ],
)
def test_the_last_map_of_each_stage_is_found(
    architecture: str, size: int, stages: tuple[str, ...], shape: tuple[int, int, int]
) -> None:
    found = survey(network(architecture, size))
    assert found.stages == stages
    assert found.last() == stages[-1]
    assert found.shapes[found.last()] == shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ["resnet18", "simple", "googlenet"])
def test_reading_features_does_not_change_the_logits(architecture: str, training: bool) -> None:
    classifier = network(architecture)
    reader = FeatureReader(classifier, [survey(classifier).last()])
    classifier.train(training)
    images = torch.rand(2, 3, 64, 64)
    torch.manual_seed(1)
    logits, features = reader(images)
    torch.manual_seed(1)
    torch.testing.assert_close(logits, classifier(images), rtol=0, atol=0)
    assert {name: tuple(value.shape[1:]) for name, value in features.items()} == {
        survey(classifier).last(): survey(classifier).shapes[survey(classifier).last()]
    }
    assert classifier.training is training


def test_features_are_the_outputs_of_the_layer() -> None:
    classifier = network("resnet18")
    captured: list[Tensor] = []
    classifier.network.get_submodule("layer3").register_forward_hook(lambda *arguments: captured.append(arguments[2]))
    classifier.eval()
    images = torch.rand(2, 3, 64, 64)
    classifier(images)
    _, features = FeatureReader(classifier, [survey(classifier).find("layer3")])(images)
    torch.testing.assert_close(features["layer3.1.relu_1"], captured[0])


def test_features_are_not_overwritten_by_inplace_operations() -> None:
    classifier = network("resnet18").eval()
    captured: list[Tensor] = []
    hook = classifier.network.get_submodule("bn1").register_forward_hook(
        lambda *arguments: captured.append(arguments[2].clone())
    )
    images = torch.rand(2, 3, 64, 64)
    logits = classifier(images)
    hook.remove()
    logits_with_features, features = FeatureReader(classifier, ["bn1"])(images)
    torch.testing.assert_close(features["bn1"], captured[0])
    assert features["bn1"].min() < 0
    torch.testing.assert_close(logits_with_features, logits, rtol=0, atol=0)


def test_gradients_through_features_reach_the_weights() -> None:
    classifier = network("simple", 16)
    _, features = FeatureReader(classifier, ["8"])(torch.rand(2, 3, 16, 16))
    features["8"].sum().backward()
    weights = classifier.network.get_submodule("0").weight
    assert isinstance(weights, nn.Parameter)
    assert weights.grad is not None
    assert weights.grad.any()


def test_a_module_name_stands_for_its_last_node() -> None:
    found = survey(network("resnet18"))
    assert found.find("layer4") == "layer4.1.relu_1"
    assert found.find("layer4.0.conv1") == "layer4.0.conv1"
    assert found.find("fc") == "fc"
    assert found.shapes["fc"] == (3, 1, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layr4", r"resnet18 has no node 'layr4'; did you mean 'layer4'\?; its stages end in relu, layer1.1.relu_1"),
        ("layer4.2", r"has no node 'layer4.2'; did you mean 'layer4"),
        ("", "has no node ''"),
    ],
)
def test_an_unknown_node_is_refused_with_a_suggestion(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        survey(network("resnet18")).find(name)


def test_a_node_without_a_feature_map_is_refused() -> None:
    found = survey(network("swin_t"))
    with pytest.raises(UserError, match=r"the output of node 'features.1.0.attn._get_rel.*' is not a feature map"):
        found.find("features.1.0.attn._get_relative_position_bias")


def test_a_network_without_feature_maps_is_refused() -> None:
    found = survey(network("mlp(hidden=[5])", 8))
    with pytest.raises(UserError, match=r"mlp\(hidden=\[5\]\) has no last feature map; name a node \(0, 1, 2"):
        found.last()
    assert found.shapes[found.find("2")] == (5, 1, 1)


class Branching(nn.Module):
    """Branches on pixel values, so that it can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits if images.sum() > 0 else -logits


class ComputesMore(Branching):
    """Computes something after its logits."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        logits.exp()
        return logits


class OtherInTraining(Branching):
    """Has a node that is missing in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        images = images.flatten(1)
        logits: Tensor = self.layer(images if self.training else images.relu())
        return logits


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"its features can't be read, as torch\.fx can't trace it: symbolically traced"
    ):
        survey(wrap(Branching()))
    with pytest.raises(UserError, match="its features can't be read, as its last node is not its logits"):
        survey(wrap(ComputesMore()))


def test_a_network_that_fails_after_tracing_is_refused_without_output_of_torch_fx(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class FailsAfterTracing(Branching):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.layer(images.flatten(1))
            # A tracer's proxies are not tensors.
            return logits.view(len(logits.shape), -1) if isinstance(logits, Tensor) else logits.absent()

    with pytest.raises(UserError, match=r"as torch\.fx can't trace it: 'Tensor' object has no attribute 'absent'"):
        survey(wrap(FailsAfterTracing()))
    assert capsys.readouterr().err == ""


def test_a_node_must_exist_in_training_mode() -> None:
    classifier = wrap(OtherInTraining())
    assert survey(classifier).find("relu") == "relu"
    with pytest.raises(UserError, match="has node 'relu' in evaluation mode only, not in training"):
        FeatureReader(classifier, ["relu"])


def test_tokens_are_reshaped_to_their_map() -> None:
    pixels = torch.rand(2, 5, 4, 4)
    tokens = pixels.flatten(2).transpose(1, 2)
    for prefix in (0, 1, 2, 5):
        with_prefix = torch.cat([torch.zeros(2, prefix, 5), tokens], dim=1)
        torch.testing.assert_close(as_map(with_prefix), pixels, rtol=0, atol=0)
    torch.testing.assert_close(as_map(pixels.permute(0, 2, 3, 1)), pixels, rtol=0, atol=0)
    torch.testing.assert_close(as_map(pixels), pixels, rtol=0, atol=0)
    torch.testing.assert_close(as_map(pixels[:, :, 0, 0])[:, :, 0, 0], pixels[:, :, 0, 0], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 501, 35), (2, 2, 3, 4, 4), (2,)])
def test_features_that_are_not_a_map_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not a feature map"):
        as_map(torch.zeros(shape))


def test_a_reader_moves_to_another_precision() -> None:
    # Swin uses its position bias outside of a module.
    classifier = network("swin_t").eval()
    reader = FeatureReader(classifier, ["permute"])
    classifier.to(torch.float64)
    reader.to(device=torch.device("cpu"), dtype=torch.float64)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    logits, features = reader(images)
    assert (logits.dtype, features["permute"].dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(logits, classifier(images))
