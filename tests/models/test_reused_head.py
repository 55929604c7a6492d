"""SimKD: a student that ends in its teacher's classifier layer is one plain network."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kd.errors import UserError
from kd.models import PROJECTOR, Classifier, build_classifier, reuse_head, survey
from kd.models.reused_head import ReusedHead

CLASSES = ("ant", "bee", "cat")


def build(architecture: str, size: int = 32, classes: tuple[str, ...] = CLASSES) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(architecture, classes=classes, image_size=size, mean=(0.5,) * 3, std=(0.25,) * 3)


def network_of(classifier: Classifier) -> ReusedHead:
    assert isinstance(classifier.network, ReusedHead)
    return classifier.network


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("convnet(widths=[4,8])", "resnet18"), ("mobilenet_v3_small", "convnet(widths=[8,16,32])"), ("simple", "vgg11")],
)
def test_its_logits_are_the_teachers_head_on_projected_features(student: str, teacher: str) -> None:
    taught_by = build(teacher).eval()
    reused = reuse_head(build(student), taught_by).eval()
    images = torch.rand(2, 3, 32, 32)
    (width, size, _), network = survey(taught_by).shapes[survey(taught_by).last()], network_of(reused)
    projected: list[torch.Tensor] = []
    network.projector.register_forward_hook(lambda _, __, output: projected.append(output))
    with torch.no_grad():
        logits = reused(images)
        assert projected[0].shape[1] == width
        assert projected[0].shape[2] <= size
        torch.testing.assert_close(logits, network.head(projected[0]), rtol=0, atol=0)
    # The head's weights are the teacher's.
    own = taught_by.network.state_dict()
    for name, value in network.head.state_dict().items():
        assert torch.equal(value, own[name])


def test_the_head_is_frozen_and_the_rest_is_trained() -> None:
    teacher = build("resnet18")
    reused = reuse_head(build("convnet(widths=[4,8])"), teacher)
    network = network_of(reused)
    assert not any(parameter.requires_grad for parameter in network.head.parameters())
    before = {name: value.clone() for name, value in network.head.state_dict().items()}
    reused.train()
    assert not network.head.training
    F.cross_entropy(reused(torch.rand(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    for parameter in (*network.backbone.parameters(), *network.projector.parameters()):
        assert parameter.grad is not None
    for name, value in network.head.state_dict().items():
        assert torch.equal(value, before[name])
    # The teacher itself is not frozen.
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_restricted_teachers_head_gives_the_logits_of_the_students_classes() -> None:
    teacher = build("resnet18", classes=("dog", "cat", "bee", "ant")).eval()
    reused = reuse_head(build("simple"), teacher.restricted_to(CLASSES)).eval()
    images = torch.rand(2, 3, 32, 32)
    projected: list[torch.Tensor] = []
    network_of(reused).projector.register_forward_hook(lambda _, __, output: projected.append(output))
    with torch.no_grad():
        logits = reused(images)
        torch.testing.assert_close(logits, network_of(reused).head(projected[0])[:, [3, 2, 1]], rtol=0, atol=0)


def test_it_is_rebuilt_from_its_name_and_copied() -> None:
    teacher = build("resnet18", classes=("dog", "cat", "bee", "ant")).restricted_to(CLASSES)
    reused = reuse_head(build("convnet(widths=[4,8])"), teacher).eval()
    images = torch.rand(2, 3, 32, 32)
    again = build(reused.description.architecture)
    again.load_state_dict(reused.state_dict())
    copied = copy.deepcopy(reused)
    with torch.no_grad():
        expected = reused(images)
        for parameter in reused.parameters():
            parameter.zero_()
        for other in (again.eval(), copied, copied.train().eval()):
            torch.testing.assert_close(other(images), expected)


def test_its_projection_is_found_as_a_node() -> None:
    reused = reuse_head(build("simple"), build("resnet18"))
    assert survey(reused).find(PROJECTOR).startswith(f"{PROJECTOR}.")


def test_tokens_are_refused() -> None:
    pytest.importorskip("timm")
    transformer = build("timm/vit_tiny_patch16_224(img_size=32, depth=1)")
    with pytest.raises(UserError, match=r"--loss simkd: the features of timm/vit_tiny.* are tokens"):
        reuse_head(build("simple"), transformer)
