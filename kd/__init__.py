"""Knowledge distillation of image classifiers, on PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.deploy import open_student
    from kd.deploy.loading import load_student
    from kd.losses import build_objective
    from kd.models import build_classifier, load_classifier

__version__ = "0.2.0"
__all__ = ["build_classifier", "build_objective", "load_classifier", "load_student", "open_student"]

_MODULES = {
    "build_classifier": "kd.models",
    "build_objective": "kd.losses",
    "load_classifier": "kd.models",
    "load_student": "kd.deploy.loading",
    "open_student": "kd.deploy",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    """Import public names on first use: commands start fast, and running ONNX files needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
