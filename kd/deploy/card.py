"""Model cards: what an exported student is, how it was trained, its accuracy, and how to run it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.deploy.export import Exported
from kd.files import write_text

_MAX_CLASSES = 20
_TRAINING = {"distilled": "distilled", "compared": "distilled", "baseline": "on the labels alone"}


def write_card(exported: Sequence[Exported], checkpoint: Path) -> Path:
    """Write a model card in Markdown beside the exported files, the float32 file first, and return its path."""
    first, metrics = exported[0], _read_run_metrics(checkpoint)
    metadata, settings, phase = (
        first.metadata,
        (metrics.get("provenance") or {}).get("settings") or {},
        str(metrics.get("phase", "unknown")),
    )
    classes = metadata["classes"]
    names = ", ".join(classes[:_MAX_CLASSES]).replace("|", "\\|")
    if len(classes) > _MAX_CLASSES:
        names += f" and {len(classes) - _MAX_CLASSES} more"
    rows = [
        ("network", f"{metadata['architecture']}, {metadata['parameters']:,} parameters"),
        ("classes", f"{len(classes)}: {names}"),
        ("images", f"{metadata['image_size']} px, {metadata['resize']}; RGB in [0, 1], normalization built in"),
        ("labels", _describe_labels(metadata)),
        ("gray values", _as_text(" to ".join(f"{value:g}" for value in metadata.get("pixel_range", ())) or None)),
        ("training data", metrics.get("data", metadata["data"])),
        ("training", _TRAINING.get(phase, phase)),
        ("teacher", _as_text(settings.get("teacher_model") or metrics.get("teacher_checkpoints"))),
        ("objective", _as_text(settings.get("loss"))),
        ("epochs", _as_text(metrics.get("epochs"))),
        ("seed", _as_text(metrics.get("seed"))),
    ]
    facts = "\n".join(f"| {name} | {text} |" for name, text in rows if text)
    results = "\n".join(
        f"| `{file.path.name}` | {file.megabytes:.2f} MB | {_percent(file.accuracy)} | {file.agreement:.2%} |"
        for file in exported
    )
    data, measured = metrics.get("data", metadata["data"]), f"checkpoint accuracy {_percent(metadata['val_acc'])}."
    images = f"{first.images:,} validation images of {metadata['data']}; {measured}"
    if first.accuracy is None:
        images = f"Verified on {first.images} random images, as the validation images weren't there: accuracy was not "
        images += f"measured on the exported file. In training: {measured}"
    card = f"""# {first.path.stem}: {metadata["architecture"]} for {data or "unknown data"}

| | |
|---|---|
{facts}

{images}

| file | size | accuracy | agreement with the checkpoint |
|---|---|---|---|
{results}

## Usage

{_usage(first)}
"""
    path = first.path.with_suffix(".md")
    write_text(path, card)
    return path


def _describe_labels(metadata: Mapping[str, Any]) -> str:
    """Describe how logits become labels, with several labels an image."""
    if not metadata.get("multilabel"):
        return ""
    thresholds = metadata.get("thresholds") or [0.5] * len(metadata["classes"])
    listed = ", ".join(f"{value:.2f}" for value in thresholds[:_MAX_CLASSES])
    return f"several an image: sigmoid of each logit, from a probability of {listed} on (by class)"


def _read_run_metrics(checkpoint: Path) -> Mapping[str, Any]:
    """Read the metrics.json of the run that wrote a checkpoint; empty if it is missing or damaged."""
    try:
        metrics = json.loads((checkpoint.parent.parent / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.2%}"


def _as_text(value: Any) -> str:  # noqa: ANN401 (whatever JSON can hold)
    if isinstance(value, list):
        return " ".join(f"`{item}`" for item in value)
    return "" if value is None else str(value)


def _usage(exported: Exported) -> str:
    name, size, suffix = exported.path.name, exported.metadata["image_size"], exported.path.suffix
    command = "" if suffix == ".pt2" else f"```bash\nkd predict {name} IMAGE_OR_FOLDER\n```\n\n"
    images = f"images: float32 (B, 3, {size}, {size}) in [0, 1]"
    code = {
        ".onnx": f"""import onnxruntime
session = onnxruntime.InferenceSession("{name}")
logits = session.run(None, {{"images": images}})[0]  # {images}""",
        ".pt2": f"""import torch
student = torch.export.load("{name}").module()  # load only files that you trust: they can run code
logits = student(images)  # {images}""",
        ".safetensors": f"""from kd import load_student
student, transform = load_student("{name}")
logits = student(transform(image)[None])  # image: a Pillow image or the path of an image file""",
    }
    return f"{command}```python\n{code[suffix]}\n```"
