"""One trained network in the forms that other projects save it in gives the same logits in all of them."""

import argparse
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from kd.errors import UserError
from kd.losses import build_objective
from kd.models import Classifier, Embedder, build_classifier
from kd.teachers import Foreign, FrozenTeacher, load_teacher
from kd.training import DistillationModule

CLASSES = ("ant", "bee", "cat")
SIZE = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """A network as another project trained it: its batch norms have seen images."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.resnet18(num_classes=3)
    network(torch.randn(8, 3, SIZE, SIZE))
    return network.eval()


def expected_logits(network: nn.Module, images: Tensor) -> Tensor:
    normalized = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        logits: Tensor = network(normalized)
    return logits


def load(path: Path, *, model: str = "resnet18", classes: tuple[str, ...] = CLASSES, **foreign: Any) -> Classifier:
    return load_teacher(path, model=model, classes=classes, data="pets", image_size=SIZE, foreign=Foreign(**foreign))[0]


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def save_lightning(state: dict[str, Tensor], path: Path) -> None:
    extra = {"criterion.weight": torch.ones(3), "val_metric.total": torch.zeros(())}
    torch.save({"state_dict": prefixed("model.", state) | extra, "hyper_parameters": {"lr": 0.1}, "epoch": 3}, path)


def save_timm(state: dict[str, Tensor], path: Path) -> None:
    content = {"epoch": 3, "arch": "resnet18", "state_dict": noise(state), "args": argparse.Namespace(lr=0.1)}
    torch.save(content | {"state_dict_ema": state, "metric": np.float64(0.9), "optimizer": {"state": {}}}, path)


def save_averaged(state: dict[str, Tensor], path: Path) -> None:
    average = prefixed("module.", state) | {"n_averaged": torch.tensor(4)}
    torch.save({"model": noise(state), "model_ema": average, "args": argparse.Namespace(), "epoch": 1}, path)


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, path)


FORMS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "plain.pth": torch.save,
    "plain.bin": torch.save,
    "parallel.pt": lambda state, path: torch.save(prefixed("module.", state), path),
    "compiled.pt": lambda state, path: torch.save(prefixed("_orig_mod.", state), path),
    "both.pt": lambda state, path: torch.save(prefixed("module._orig_mod.", state), path),
    "nested.pth": lambda state, path: torch.save({"model_state_dict": state, "epoch": 1, "loss": 0.5}, path),
    "net.ckpt": lambda state, path: torch.save({"net": state, "acc": 93.1, "epoch": 1}, path),
    "lightning.ckpt": save_lightning,
    "timm.pth.tar": save_timm,
    "torchvision.pth": save_averaged,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "plain.safetensors": save_safetensors,
    "wrapped.safetensors": lambda state, path: save_safetensors(prefixed("backbone.net.", state), path),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_logits(original: nn.Module, tmp_path: Path, form: str) -> None:
    FORMS[form](dict(original.state_dict()), tmp_path / form)
    images = torch.rand(4, 3, SIZE, SIZE)
    teacher = load(tmp_path / form)
    assert teacher.description.classes == CLASSES
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected_logits(original, images), rtol=0, atol=1e-4)
    assert_distills(teacher, images)


def assert_distills(teacher: Classifier, images: Tensor) -> None:
    """Check that a student gets a gradient from a teacher, which gets none and stays as it is."""
    student = build_classifier("linear", classes=teacher.description.classes, image_size=SIZE)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = DistillationModule(teacher=FrozenTeacher(teacher), student=student, objective=build_objective("kl"))
    targets = module.teacher_outputs(images)
    total, _ = module.objective(module.student_outputs(images, targets), targets, torch.zeros(len(images)).long())
    total.backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in student.parameters())
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("batch", ["dynamic", 2])
def test_an_onnx_file_gives_the_same_logits(original: nn.Module, tmp_path: Path, batch: str | int) -> None:
    pytest.importorskip("onnxruntime")
    shapes = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    example = (torch.randn(2, 3, SIZE, SIZE),)
    torch.onnx.export(original, example, tmp_path / "net.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    images = torch.rand(5, 3, SIZE, SIZE)
    teacher = load(tmp_path / "net.onnx")
    torch.testing.assert_close(teacher(images), expected_logits(original, images), rtol=0, atol=1e-3)
    assert teacher.count_parameters() > 10**6
    assert_distills(teacher, images)


def test_a_folder_of_timm_names_architecture_classes_and_normalization(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3).eval()
    save_safetensors(network.state_dict(), tmp_path / "model.safetensors")
    names = ["cat", "ant", "bee"]
    pretrained = {"mean": [0.5] * 3, "std": [0.25] * 3, "label_names": names}
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.rand(2, 3, SIZE, SIZE)
    teacher = load(tmp_path, model="resnet18")
    with torch.no_grad():
        expected = network((images - 0.5) / 0.25)[:, [1, 2, 0]]
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=1e-4)
    # The same folder, by timm's own name for it.
    foreign, name = Foreign(published=True), f"timm/local-dir:{tmp_path}"
    teacher, _ = load_teacher(None, model=name, classes=CLASSES, data="pets", image_size=SIZE, foreign=foreign)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=1e-4)


def save_transformers(folder: Path, **values: Any) -> nn.Module:
    """Save a tiny network of transformers with random weights as ``save_pretrained`` does, and return it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = ["cat", "ant", "bee"]
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    configuration = transformers.ResNetConfig(
        **settings, id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}
    )
    network: nn.Module = transformers.ResNetForImageClassification(configuration)
    network(torch.randn(8, 3, SIZE, SIZE))
    network.eval().save_pretrained(folder)  # type: ignore[operator]  # typed as a tensor
    preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": SIZE}, **values}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return network


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_folder_of_transformers_names_classes_and_normalization(tmp_path: Path, form: str) -> None:
    network = save_transformers(tmp_path)
    if form == "bin":
        torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    images = torch.rand(2, 3, SIZE, SIZE)
    teacher = load(tmp_path)
    with torch.no_grad():
        expected = network((images - 0.5) / 0.25).logits[:, [1, 2, 0]]
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=1e-4)
    assert_distills(teacher, images)
    assert teacher.description.architecture == f"transformers/{tmp_path}"


def test_a_folder_of_transformers_without_normalization_is_read_as_such(tmp_path: Path) -> None:
    save_transformers(tmp_path, do_normalize=False)
    assert load(tmp_path).description.mean == (0.0,) * 3


def test_a_folder_of_timm_may_hold_its_weights_as_a_state_dict(original: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 3}))
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(images), expected_logits(original, images), rtol=0, atol=1e-4)


BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "nothing": ({}, "a folder must hold config.json and model.safetensors; there is no config.json"),
    "text": ({"config.json": "no"}, "not a model's configuration"),
    "unknown": ({"config.json": "{}"}, "names neither an architecture of timm nor a model type of transformers"),
    "no weights": (
        {"config.json": '{"architecture": "resnet18"}'},
        r"there are no weights in it \(model.safetensors or",
    ),
    "no classifier": ({"config.json": '{"model_type": "bert"}'}, "transformers can't read an image classifier in it"),
    "no type": ({"config.json": '{"model_type": "nothing"}'}, "transformers can't read an image classifier in it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_can_not_be_read_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    files, words = BROKEN[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_published_weights_teach_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "published.pth")
    weights = torchvision.models.get_model_weights("resnet18").DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights.value, "url", (tmp_path / "published.pth").as_uri())
    monkeypatch.setattr(torch.hub, "HASH_REGEX", re.compile("(never)"))
    foreign, classes = Foreign(published=True), ("tench", "English springer")
    teacher, notes = load_teacher(
        None, model="resnet18", classes=classes, data="pets", image_size=SIZE, foreign=foreign
    )
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected_logits(network, images)[:, [0, 217]], rtol=0, atol=1e-4)
    assert "the teacher knows 1,000 classes: its predictions are restricted to the 2 of pets" in notes
    with pytest.raises(UserError, match="resnet18 has no trained weights; add --teacher_pretrained for its published"):
        load_teacher(None, model="resnet18", classes=classes, data="pets", image_size=SIZE)


def write_own(folder: Path, body: str) -> str:
    (folder / "own.py").write_text(f"import torch\nimport torchvision\n\n\ndef net(num_classes=3):\n{body}")
    return f"{folder / 'own.py'}:net"


def test_the_users_code_may_load_its_own_weights(original: nn.Module, tmp_path: Path) -> None:
    torch.save(original.state_dict(), tmp_path / "theirs.pth")
    body = (
        "    network = torchvision.models.resnet18(num_classes=3)\n"
        f"    network.load_state_dict(torch.load({str(tmp_path / 'theirs.pth')!r}))\n    return network\n"
    )
    model, images = write_own(tmp_path, body), torch.rand(2, 3, SIZE, SIZE)
    teacher, notes = load_teacher(None, model=model, classes=CLASSES, data="pets", image_size=SIZE)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected_logits(original, images), rtol=0, atol=1e-4)
    assert any("normalization of ImageNet assumed" in note for note in notes)
    assert any("doesn't name its classes" in note for note in notes)
    with pytest.raises(UserError, match=r"expected logits of shape \(2, 2\).* list them in the order of the outputs"):
        load_teacher(None, model=model, classes=("ant", "bee"), data="pets", image_size=SIZE)
    (tmp_path / "names").write_text("ant\nbee\ncat\n")
    foreign = Foreign(classes=str(tmp_path / "names"))
    teacher, _ = load_teacher(None, model=model, classes=("bee", "cat"), data="pets", image_size=SIZE, foreign=foreign)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected_logits(original, images)[:, [1, 2]], rtol=0, atol=1e-4)


def load_features(path: Path | None, model: str) -> tuple[Classifier, list[str]]:
    foreign = Foreign(features_only=True)
    return load_teacher(path, model=model, classes=CLASSES, data="pets", image_size=SIZE, foreign=foreign)


@pytest.mark.parametrize("form", ["plain.pth", "headless.pth", "parallel.pth"])
def test_a_network_without_its_classifier_layer_gives_features(original: nn.Module, tmp_path: Path, form: str) -> None:
    state = {key: value for key, value in original.state_dict().items() if "fc" not in key or form != "headless.pth"}
    torch.save(prefixed("module." if form == "parallel.pth" else "", state), tmp_path / form)
    teacher, notes = load_features(tmp_path / form, "resnet18")
    assert isinstance(teacher, Embedder)
    images = torch.rand(2, 3, SIZE, SIZE)
    backbone = nn.Sequential(*list(original.children())[:-1], nn.Flatten())
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected_logits(backbone, images), rtol=0, atol=1e-4)
    assert any("fc.bias, fc.weight not used" in note for note in notes) == (form != "headless.pth")


def test_a_file_without_a_classifier_layer_is_refused_with_the_remedy(original: nn.Module, tmp_path: Path) -> None:
    torch.save({key: value for key, value in original.state_dict().items() if "fc" not in key}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"2 missing \(fc.weight, fc.bias\); .* --teacher_features --loss"):
        load(tmp_path / "net.pth")


def test_backbones_of_timm_transformers_and_own_code_give_features(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    images, mean, std = torch.rand(2, 3, SIZE, SIZE), torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=1, num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "dino.pth")
    teacher, _ = load_features(tmp_path / "dino.pth", f"timm/vit_tiny_patch16_224(img_size={SIZE}, depth=1)")
    with torch.no_grad():
        # Published with a mean and a deviation of one half.
        torch.testing.assert_close(teacher(images), network((images - 0.5) / 0.5), rtol=0, atol=1e-4)
    save_transformers(tmp_path / "folder")
    teacher, _ = load_features(tmp_path / "folder", "resnet18")
    assert tuple(teacher(images).shape) == (2, 16)
    model = write_own(tmp_path, "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())\n")
    teacher, _ = load_features(None, model)
    pooled = nn.functional.adaptive_avg_pool2d((images - mean) / std, 2).flatten(1)
    torch.testing.assert_close(teacher(images), pooled)


def load_named(path: Path, names: Path | str, classes: tuple[str, ...]) -> tuple[Classifier, list[str]]:
    foreign = Foreign(classes=str(names))
    return load_teacher(path, model="resnet18", classes=classes, data="pets", image_size=SIZE, foreign=foreign)


@pytest.mark.parametrize(
    "text",
    ["cat\nant\nbee\n", '["cat", "ant", "bee"]', '{"0": "cat", "2": "bee", "1": "ant"}'],
    ids=["text", "list", "map"],
)
def test_classes_are_matched_by_name(original: nn.Module, tmp_path: Path, text: str) -> None:
    torch.save(original.state_dict(), tmp_path / "net.pth")
    (tmp_path / "names").write_text(text)
    images = torch.rand(2, 3, SIZE, SIZE)
    expected = expected_logits(original, images)
    teacher, notes = load_named(tmp_path / "net.pth", tmp_path / "names", ("ant", "cat"))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected[:, [1, 0]], rtol=0, atol=1e-4)
    assert "the teacher knows 3 classes: its predictions are restricted to the 2 of pets" in notes
    teacher, _ = load_named(tmp_path / "net.pth", tmp_path / "names", CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected[:, [1, 2, 0]], rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"other classes: only the teacher has bee; only pets has dog"):
        load_named(tmp_path / "net.pth", tmp_path / "names", ("ant", "cat", "dog"))


def test_imagenet_is_known_by_synsets_and_english_names(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    images = torch.rand(2, 3, SIZE, SIZE)
    expected = expected_logits(network, images)[:, [0, 217]]
    for classes in (("n01440764", "n02102040"), ("tench", "English springer")):
        teacher, _ = load_named(tmp_path / "net.pth", "imagenet", classes)
        with torch.no_grad():
            torch.testing.assert_close(teacher(images), expected, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"has 1,000 outputs, .* known as --teacher_classes imagenet"):
        load(tmp_path / "net.pth")


def test_normalization_may_be_given(original: nn.Module, tmp_path: Path) -> None:
    torch.save(original.state_dict(), tmp_path / "net.pth")
    images = torch.rand(2, 3, SIZE, SIZE)
    teacher = load(tmp_path / "net.pth", mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), original((images - 0.5) / 0.5), rtol=0, atol=1e-4)


class Dangerous:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (exec, ("open('executed', 'w')",))


def save_softmax(network: nn.Module, path: Path) -> None:
    path.with_name("net.py").write_text(
        "import torch, torchvision\n\n\ndef net(num_classes):\n"
        "    return torch.nn.Sequential(torchvision.models.resnet18(num_classes=num_classes), torch.nn.Softmax(1))\n"
    )
    torch.save(prefixed("0.", dict(network.state_dict())), path)


WRONG: dict[str, tuple[Callable[[nn.Module, Path], object], str, str]] = {
    "module.pt": (torch.save, "resnet18", r"(?s)torchvision\.models\.resnet\.ResNet.*torch\.load.*torch\.save"),
    "script.pt": (
        lambda network, path: torch.jit.save(torch.jit.trace(network, torch.rand(1, 3, SIZE, SIZE)), path),
        "resnet18",
        r"TorchScript file.*\n.*torch\.jit\.load",
    ),
    "code.pt": (
        lambda _, path: path.write_bytes(pickle.dumps(Dangerous())),
        "resnet18",
        "can't be read as a checkpoint",
    ),
    "other.pth": (
        lambda network, path: torch.save(network.state_dict(), path),
        "resnet50",
        r"don't fit resnet50: \d+ missing \(.*\); .*of another shape \(.*; they fit --teacher_model resnet18",
    ),
    "nothing.pth": (lambda _, path: torch.save({"epoch": 1}, path), "resnet18", "no state dict in it; its keys: epoch"),
    "softmax.pth": (save_softmax, "{folder}/net.py:net", "outputs are probabilities; .* leave out the softmax"),
    "text.safetensors": (lambda _, path: path.write_text("no"), "resnet18", "not a safetensors file"),
    "text.onnx": (lambda _, path: path.write_text("no"), "resnet18", "onnxruntime can't read it"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("form", WRONG)
def test_wrong_forms_are_refused_with_the_remedy(
    original: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write, model, words = WRONG[form]
    write(original, tmp_path / form)
    with pytest.raises(UserError, match=words):
        load(tmp_path / form, model=model.format(folder=tmp_path))
    assert not Path("executed").exists()


def test_names_that_do_not_fit_the_outputs_are_refused(original: nn.Module, tmp_path: Path) -> None:
    torch.save(original.state_dict(), tmp_path / "net.pth")
    (tmp_path / "names").write_text("ant\nbee\n")
    with pytest.raises(UserError, match=r"has 3 outputs, and was given 2 class names; list them"):
        load_named(tmp_path / "net.pth", tmp_path / "names", ("ant", "bee"))
    (tmp_path / "names").write_text("ant\nant\nbee\n")
    with pytest.raises(UserError, match=r"--teacher_classes .*names: class 'ant' is listed twice"):
        load_named(tmp_path / "net.pth", tmp_path / "names", ("ant", "bee"))


def test_networks_with_several_outputs_give_their_logits() -> None:
    classifier = build_classifier("linear", classes=CLASSES, image_size=8, mean=(0.5,), std=(0.5,))
    images, linear = torch.rand(2, 3, 8, 8), classifier.network
    expected = classifier(images)

    class Several(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, images: Tensor) -> Any:
            logits = linear(images)
            return {"tuple": (logits, logits[:, :1]), "mapping": {"loss": None, "logits": logits}}[self.kind]

    for kind in ("tuple", "mapping"):
        torch.testing.assert_close(Classifier(Several(kind), classifier.description)(images), expected)
