"""Model cards: what an exported student is, how it was trained, its accuracy, and how to run it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.deploy.export import Exported
from kd.files import write_text

_MAX_CLASSES = 20
_TRAINING = {"distilled": "distilled", "compared": "distilled", "baseline": "on the labels alone"}


def read_run_metrics(checkpoint: Path) -> Mapping[str, Any]:
    """Read the metrics.json of the run that wrote a checkpoint; empty if it is missing or damaged."""
    try:
        metrics = json.loads((checkpoint.parent.parent / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def write_card(exported: Sequence[Exported], metrics: Mapping[str, Any]) -> Path:
    """Write a model card in Markdown beside the exported file; return its path.

    Args:
        exported: The exported files, the float32 file first.
        metrics: As :func:`read_run_metrics` returned them.
    """
    first = exported[0]
    metadata, recipe = first.metadata, metrics.get("recipe") or {}
    phase = str(metrics.get("phase", "unknown"))
    classes = metadata["classes"]
    names = ", ".join(classes[:_MAX_CLASSES]).replace("|", "\\|")
    if len(classes) > _MAX_CLASSES:
        names += f" and {len(classes) - _MAX_CLASSES} more"
    rows = [
        ("network", f"{metadata['architecture']}, {metadata['parameters']:,} parameters"),
        ("classes", f"{len(classes)}: {names}"),
        ("images", f"{metadata['image_size']} px, {metadata['resize']}; RGB in [0, 1], normalization built in"),
        ("training data", metrics.get("data", metadata["data"])),
        ("training", _TRAINING.get(phase, phase)),
        ("teacher", _as_text(recipe.get("teacher_model") or recipe.get("teacher"))),
        ("objective", _as_text(recipe.get("loss"))),
        ("epochs", _as_text(metrics.get("epochs"))),
        ("seed", _as_text(metrics.get("seed"))),
    ]
    lines = [
        f"# {first.path.stem}: {metadata['architecture']} for {metadata['data']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows if text),
        "",
        f"{first.images:,} validation images of {metadata['data']}; checkpoint accuracy {metadata['val_acc']:.2%}.",
        "",
        "| file | size | accuracy | agreement with the checkpoint |",
        "|---|---|---|---|",
        *(
            f"| `{file.path.name}` | {file.megabytes:.2f} MB | {file.accuracy:.2%} | {file.agreement:.2%} |"
            for file in exported
        ),
        "",
        "## Usage",
        "",
        *_usage(first),
    ]
    path = first.path.with_suffix(".md")
    write_text(path, "\n".join(lines) + "\n")
    return path


def _as_text(value: Any) -> str:  # noqa: ANN401 (whatever JSON can hold)
    if isinstance(value, list):
        return " ".join(f"`{item}`" for item in value)
    return "" if value is None else str(value)


def _usage(exported: Exported) -> list[str]:
    name, size = exported.path.name, exported.metadata["image_size"]
    images = f"images: float32 (B, 3, {size}, {size}) in [0, 1]"
    command = ["```bash", f"kd predict {name} IMAGE_OR_FOLDER", "```", ""]
    code = {
        ".onnx": [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{name}")',
            f'logits = session.run(None, {{"images": images}})[0]  # {images}',
        ],
        ".pt2": [
            "import torch",
            f'student = torch.export.load("{name}").module()  # load only files that you trust: they can run code',
            f"logits = student(images)  # {images}",
        ],
        ".safetensors": [
            "from kd import load_student",
            f'student, transform = load_student("{name}")',
            "logits = student(transform(image)[None])  # image: a Pillow image or the path of an image file",
        ],
    }[exported.path.suffix]
    return [*([] if exported.path.suffix == ".pt2" else command), "```python", *code, "```"]
