"""Knowledge distillation of image classifiers, on PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.deploy.loading import load_student

__version__ = "0.2.0"
__all__ = ["load_student"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever is asked for)
    """Import what is heavy when it is asked for: the commands answer at once, and ONNX files need no torch."""
    if name == "load_student":
        from kd.deploy.loading import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
