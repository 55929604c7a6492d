"""Precision and memory layout."""

import platform

import pytest
import torch

from kd.models import Classifier, build_classifier, fastest, keep_large_blocks, why_not_compiled
from kd.models.cost import is_depthwise, multiply_adds
from kd.teachers import FrozenTeacher
from kd.training import Hardware


def network(architecture: str, size: int = 64) -> Classifier:
    return build_classifier(architecture, classes=("a", "b"), image_size=size, mean=(0.4,) * 3, std=(0.2,) * 3)


def test_multiply_adds_are_those_counted_by_hand() -> None:
    # 8x8 pixels, a 3x3 convolution of 3 to 4 channels, and a head of 4 to 2.
    assert multiply_adds(network("convnet(widths=[4])", 8)) == 8 * 8 * 4 * 3 * 9 + 4 * 2
    assert multiply_adds(network("linear", 8)) == 3 * 8 * 8 * 2


@pytest.mark.parametrize(
    ("architecture", "depthwise"), [("mobilenet_v3_small", True), ("resnet18", False), ("resnext50_32x4d", False)]
)
def test_depthwise_convolutions_are_detected(architecture: str, depthwise: bool) -> None:
    assert is_depthwise(network(architecture)) is depthwise


@pytest.mark.parametrize(
    ("architecture", "trains", "bfloat16", "expected"),
    [
        ("resnet18", True, True, ("bf16-mixed", True)),
        ("resnet18", True, False, ("32-true", True)),
        ("mobilenet_v3_large", True, True, ("32-true", True)),
        ("mobilenet_v3_large", False, True, ("bf16-mixed", True)),
        ("convnet(widths=[4])", True, True, ("32-true", False)),
    ],
)
def test_the_precision_on_a_cpu_depends_on_the_network(
    architecture: str, trains: bool, bfloat16: bool, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.models.compute.multiplies_bfloat16", lambda: bfloat16)
    chosen = fastest(network(architecture, 96), accelerator="cpu", trains=trains)
    assert (chosen.precision, chosen.channels_last) == expected
    assert chosen.reason in str(chosen)


@pytest.mark.parametrize(("bfloat16", "precision"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_the_precision_on_a_gpu_depends_on_bfloat16_support(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
    hardware = Hardware()
    assert hardware.resolved()[0].accelerator == "gpu"
    assert hardware.compute_for(network("linear"), trains=True).precision == precision


def test_explicit_settings_override_the_automatic_choice() -> None:
    hardware = Hardware(accelerator="cpu", precision="32-true", channels_last="false")
    chosen = hardware.compute_for(network("resnet18", 96), trains=False)
    assert (chosen.precision, chosen.channels_last, chosen.autocast) == ("32-true", False, None)
    assert Hardware(accelerator="cpu", channels_last="true").compute_for(network("linear"), trains=True).channels_last


def test_a_teacher_computes_in_its_own_precision() -> None:
    classifier = network("resnet18").eval()
    images = torch.rand(2, 3, 64, 64)
    half = Hardware(accelerator="cpu", precision="bf16-mixed").compute_for(classifier, trains=False)
    full = Hardware(accelerator="cpu", precision="32-true").compute_for(classifier, trains=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            FrozenTeacher(classifier, compute=full)(images).logits,
            classifier.float()(images).float(),
            rtol=0.1,
            atol=0.05,
        )
        assert FrozenTeacher(classifier, compute=full)(images).logits.dtype == torch.float32
    assert FrozenTeacher(classifier, compute=half)(images).logits.dtype == torch.bfloat16
    assert all(
        value.dtype != torch.bfloat16 for value in FrozenTeacher(classifier, compute=half).network.state_dict().values()
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_glibc_keeps_large_blocks() -> None:
    assert keep_large_blocks()


def test_a_compiled_network_computes_the_same_logits() -> None:
    plain = network("convnet(widths=[4])", 8).eval()
    teacher, compiled = (FrozenTeacher(plain, compiled=compiled) for compiled in (False, True))
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(compiled(images).logits, teacher(images).logits)
    assert compiled.network.state_dict().keys() == teacher.network.state_dict().keys()


def test_a_missing_compiler_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_compiled("cpu") is None

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("\nno C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fails)
    assert why_not_compiled("cpu") == "no C++ compiler"
