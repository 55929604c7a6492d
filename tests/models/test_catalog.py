import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from kd.errors import UserError
from kd.models import Classifier, allow_checkpointing, build_classifier, parameters_by_name, usual_statistics
from kd.models.catalog import torchvision_names
from kd.models.classifier import Normalization

CLASSES = ("ant", "bee", "cat")


def build(architecture: str, **options: Any) -> Classifier:
    defaults: dict[str, Any] = {"classes": CLASSES, "image_size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return build_classifier(architecture, **defaults | options)


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v3_small", 32),
        ("squeezenet1_1", 32),
        ("densenet121", 32),
        ("googlenet", 32),
        ("inception_v3", 75),
        ("simple", 32),
        ("convnet(widths=[4, 8])", 32),
        ("timm/mobilenetv3_small_050", 32),
    ],
)
def test_a_network_has_one_logit_per_class(architecture: str, size: int) -> None:
    classifier = build(architecture, image_size=size)
    assert classifier.training
    # No auxiliary heads in training mode.
    assert classifier(torch.rand(2, 3, size, size)).shape == (2, 3)
    assert classifier.description.architecture == architecture


def test_a_classifier_normalizes_its_input() -> None:
    classifier = build("linear", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = torch.rand(2, 3, 32, 32)
    normalized = torch.stack(
        [(images[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)])], 1
    )
    torch.testing.assert_close(classifier(images), classifier.network(normalized))
    assert {"normalization.mean", "normalization.std"} <= classifier.state_dict().keys()


def test_normalization_uses_the_precision_of_its_module() -> None:
    normalization = Normalization((0.5,) * 3, (0.5,) * 3).to(torch.bfloat16)
    assert normalization(torch.rand(1, 3, 2, 2)).dtype == torch.bfloat16


def test_the_normalization_is_not_counted_as_parameters() -> None:
    assert build("linear").count_parameters() == 3 * 32 * 32 * 3 + 3


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("resnet19", r"there is no network 'resnet19'; did you mean 'resnet1\d"),
        ("timm/resnet19x", r"there is no network 'timm/resnet19x'; did you mean"),
        ("convnet(width=[4])", r"no hyperparameter 'width'; did you mean 'widths'\?"),
        ("convnet(widths=8)", r"widths must be a list of positive integers, such as \[16, 32\], not 8"),
        ("mlp(hidden=[2.5])", "hidden must be a list of positive integers"),
        ("convnet(widths=[])", "widths must be a list of positive integers"),
        ("convnet(widths=[-4])", r"convnet\(widths=\[-4\]\) can't be built for images of 32 px"),
        ("resnet18(nonsense=3)", r"resnet18\(nonsense=3\) can't be built for .*nonsense"),
        ("absent.py:factory", "there is no file"),
    ],
)
def test_an_unknown_network_or_hyperparameter_is_an_error(architecture: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(architecture)


@pytest.mark.parametrize(
    ("architecture", "size", "words"),
    [
        (
            "inception_v3",
            64,
            r"inception_v3 can't process images of 64 px \(designed for 299 px\); change --image_size",
        ),
        ("vit_b_16", 32, r"vit_b_16 can't process images of 32 px \(designed for 224 px\)"),
        ("timm/vit_tiny_patch16_224", 32, r"can't process images of 32 px \(designed for 224 px\)"),
        ("simple", 4, "simple can't be built for images of 4 px and 3 classes: three poolings"),
        ("convnet", 2, r"convnet can't process images of 2 px"),
    ],
)
def test_an_unsupported_image_size_is_refused(architecture: str, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(architecture, image_size=size)


def own(tmp_path: Path, body: str) -> str:
    file = tmp_path / "mine.py"
    file.write_text(f"from torch import nn\ndef net(num_classes, width=4):\n    {body}\n")
    return f"{file}:net"


def test_a_users_factory_is_called_with_the_number_of_classes(tmp_path: Path) -> None:
    name = own(tmp_path, "return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, num_classes))")
    assert build(name).network[2].out_features == 3  # type: ignore[index]
    assert build(f"{name}(width=7)").network[2].in_features == 7  # type: ignore[index]
    with pytest.raises(UserError, match="is your own code; load the weights there"):
        build(name, pretrained=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 3", "the factory returned a int, not a torch.nn.Module"),
        (
            "return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))",
            r"logits of shape \(2, 3\) for 2 images, got shape \(2, 5\)",
        ),
        ("return nn.Conv2d(3, 3, 3)", r"logits of shape \(2, 3\) for 2 images, got shape \(2, 3, 30, 30\)"),
        ("return nn.LSTM(32, 3)", "can't process images|got a tuple"),
        ("return nn.Linear(7, 3)", "can't process images of 32 px"),
    ],
)
def test_a_users_factory_that_returns_no_classifier_is_refused(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(own(tmp_path, body))


def publish(name: str, state: dict[str, torch.Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace a network's published weights by a local file, which the real code downloads and checks."""
    plain = folder / "plain.pth"
    torch.save(state, plain)
    checksum = hashlib.sha256(plain.read_bytes()).hexdigest()[:8]
    file = plain.rename(folder / f"{name}-{checksum}.pth")
    monkeypatch.setattr(torchvision.models.get_model_weights(name).DEFAULT.value, "url", file.as_uri())
    return file


def test_the_layer_names_in_the_published_densenet_file_are_converted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = torchvision.models.densenet121().state_dict()
    # The names in the hosted file: denselayer1.norm.1.weight for denselayer1.norm1.weight.
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value
        for name, value in published.items()
        if not name.endswith("num_batches_tracked")
    }
    assert set(old) != set(published)
    publish("densenet121", old, tmp_path, monkeypatch)
    own = build("densenet121", pretrained=True).network.state_dict()
    changed = {name for name in own if not torch.equal(own[name], published[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
def test_a_pretrained_network_with_another_pixel_range_is_rebuilt_from_its_description(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = torchvision.models.get_model(name, weights=None, init_weights=True)
    publish(name, network.state_dict(), tmp_path, monkeypatch)
    classifier = build(name, pretrained=True, image_size=size).eval()
    description = classifier.description
    again = build(name, image_size=size, mean=description.mean, std=description.std).eval()
    again.load_state_dict(classifier.state_dict())
    images = torch.rand(2, 3, size, size)
    torch.testing.assert_close(again(images), classifier(images), rtol=0, atol=0)
    # The normalization includes the input transform that torchvision applies after ImageNet's normalization.
    theirs = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(theirs._transform_input(normalize(images)), classifier.normalization(images))


def test_published_weights_that_do_not_match_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish("mobilenet_v3_small", torchvision.models.mobilenet_v3_small().state_dict(), tmp_path, monkeypatch)
    with pytest.raises(UserError, match="--teacher_pretrained mobilenet_v3_small: the published weights don't match"):
        build("mobilenet_v3_small(width_mult=0.5)", pretrained=True)


def test_published_weights_are_used_except_for_the_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = torchvision.models.resnet18()
    file = publish("resnet18", published.state_dict(), tmp_path, monkeypatch)
    classifier = build("resnet18", pretrained=True)
    own_state, state = classifier.network.state_dict(), published.state_dict()
    changed = {name for name in state if not torch.equal(own_state[name], state[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert classifier.description.mean == (0.485, 0.456, 0.406)
    assert classifier.description.std == (0.229, 0.224, 0.225)
    assert (tmp_path / "torch" / "hub" / "checkpoints" / file.name).is_file()


def test_a_failed_download_names_the_file_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = publish("resnet18", torchvision.models.resnet18().state_dict(), tmp_path, monkeypatch)
    file.unlink()
    with pytest.raises(UserError) as error:
        build("resnet18", pretrained=True)
    message = str(error.value)
    assert f"The missing file is {file.name}" in message
    assert f"put that file into {tmp_path}/torch/hub/checkpoints" in message
    assert "--no-teacher_pretrained" in message


def test_a_network_for_gray_images_sees_the_luminance() -> None:
    pytest.importorskip("timm")
    classifier = build("timm/resnet10t(in_chans=1)").eval()
    assert (classifier.description.channels, len(classifier.description.mean)) == (1, 1)
    images = torch.rand(2, 3, 64, 64)
    gray = torchvision.transforms.functional.rgb_to_grayscale(images)
    expected = (gray - classifier.description.mean[0]) / classifier.description.std[0]
    # torchvision's weights of the colors have a sum of 0.9999.
    torch.testing.assert_close(classifier.normalization(images), expected, rtol=0, atol=1e-3)
    again = build("timm/resnet10t(in_chans=1)").eval()
    again.load_state_dict(classifier.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(images), classifier(images), rtol=0, atol=0)


def test_a_network_that_ends_in_a_softmax_is_refused(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes), nn.Softmax(1))\n"
    )
    with pytest.raises(UserError, match=r"net.py:net: the network's outputs are probabilities; .* need logits"):
        build(f"{code}:net", image_size=8)


@pytest.mark.parametrize("prefix", ["local-dir:", "hf-hub:"])
def test_networks_of_timm_may_come_from_a_folder_or_the_hub(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    # Without waiting for a network that isn't there.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    overlay = {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    network = timm.create_model("resnet10t", num_classes=5, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(network, tmp_path / "net")
    if prefix == "hf-hub:":
        with pytest.raises(UserError, match="the weights can't be downloaded"):
            build("timm/hf-hub:nobody/nothing")
        return
    architecture = f"timm/{prefix}{tmp_path / 'net'}"
    classifier = build(architecture, pretrained=True)
    own, published = classifier.network.state_dict(), network.state_dict()
    changed = {name for name in own if not torch.equal(own[name], published[name])}
    assert changed <= {"fc.weight", "fc.bias"}
    assert usual_statistics(architecture) == (classifier.description.mean, classifier.description.std)
    assert classifier.description.mean == (0.1,) * 3
    with pytest.raises(UserError, match=r"there is no config\.json of timm in this folder"):
        build(f"timm/local-dir:{tmp_path}")


def test_the_small_networks_have_no_published_weights() -> None:
    with pytest.raises(UserError, match="--student_pretrained: there are no published weights for simple"):
        build("simple", pretrained=True, pretrained_flag="--student_pretrained")


def test_networks_are_listed_with_their_number_of_parameters() -> None:
    rows = {name: (origin, parameters) for name, origin, parameters in parameters_by_name()}
    assert rows["resnet18"] == ("torchvision", 11689512)
    assert rows["linear"] == ("kd, at 224 px", 3 * 224 * 224 * 1000 + 1000)
    assert set(torchvision_names()) < set(rows)
    assert not any(name.startswith("quantized") for name in rows)
    assert any(name == "timm/resnet18" for name, _, _ in parameters_by_name(with_timm=True))


def test_checkpointed_activations_give_the_same_gradients() -> None:
    pytest.importorskip("timm")
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        classifier = build("timm/resnet10t", image_size=32)
        if checkpointed:
            allow_checkpointing(classifier)
        classifier(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        gradients.append([weight.grad for weight in classifier.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    with pytest.raises(UserError, match="it has no gradient checkpointing; many networks of timm/"):
        allow_checkpointing(build("resnet18", image_size=32))
