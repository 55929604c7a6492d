"""Knowledge distillation of image classifiers, on PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.api import compare, distill, load_images, load_teacher, train_teacher
    from kd.deploy import open_student
    from kd.deploy.loading import load_student
    from kd.errors import UserError
    from kd.losses import build_objective
    from kd.models import build_classifier, load_classifier
    from kd.training import ClassifierModule, DistillationModule

__version__ = "0.2.0"
__all__ = [
    "ClassifierModule",
    "DistillationModule",
    "UserError",
    "build_classifier",
    "build_objective",
    "compare",
    "distill",
    "load_classifier",
    "load_images",
    "load_student",
    "load_teacher",
    "open_student",
    "train_teacher",
]

_MODULES = {
    **dict.fromkeys(("compare", "distill", "load_images", "load_teacher", "train_teacher"), "kd.api"),
    **dict.fromkeys(("ClassifierModule", "DistillationModule"), "kd.training"),
    **dict.fromkeys(("build_classifier", "load_classifier"), "kd.models"),
    "UserError": "kd.errors",
    "build_objective": "kd.losses",
    "load_student": "kd.deploy.loading",
    "open_student": "kd.deploy",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    """Import public names on first use: commands start fast, and running ONNX files needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
