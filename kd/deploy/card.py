"""A model card: what a shipped student is, how it was made, how good it is, and how to run it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.deploy.export import Exported

_CLASSES_SHOWN = 20


def facts_of(checkpoint: Path) -> Mapping[str, Any]:
    """Read what the training of a checkpoint left beside it; empty where there is nothing, or nothing whole."""
    try:
        facts = json.loads((checkpoint.parent.parent / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_card(exported: Sequence[Exported], facts: Mapping[str, Any]) -> Path:
    """Write the card beside the file, as Markdown; return its path.

    Args:
        exported: What was written, the whole file first.
        facts: As :func:`facts_of` read them.
    """
    first = exported[0]
    about, recipe = first.about, facts.get("recipe") or {}
    classes = about["classes"]
    named = ", ".join(classes[:_CLASSES_SHOWN]).replace("|", "\\|")
    if len(classes) > _CLASSES_SHOWN:
        named += f" and {len(classes) - _CLASSES_SHOWN} more"
    teacher = recipe.get("teacher_model") or recipe.get("teacher")
    rows = [
        ("network", f"{about['architecture']}, {about['parameters']:,} parameters"),
        ("classes", f"{len(classes)}: {named}"),
        ("images", f"{about['image_size']} px, {about['resize']}; RGB in [0, 1], normalized inside"),
        ("trained on", facts.get("data", about["data"])),
        (
            "how",
            {"distilled": "distilled", "compared": "distilled", "baseline": "on the labels alone"}.get(
                str(facts.get("phase", "")), str(facts.get("phase", "not known"))
            ),
        ),
        ("teacher", _words(teacher)),
        ("objective", _words(recipe.get("loss"))),
        ("epochs", _words(facts.get("epochs"))),
        ("seed", _words(facts.get("seed"))),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows if text)]
    measured = ["| file | size | accuracy | as the checkpoint |", "|---|---|---|---|"]
    measured += [
        f"| `{one.path.name}` | {one.megabytes:.2f} MB | {one.accuracy:.2%} | {one.agreement:.2%} of decisions |"
        for one in exported
    ]
    compared = (
        f"Measured on {first.images:,} validation images of {about['data']}; the checkpoint is right on "
        f"{first.checkpoint_accuracy:.2%} of them."
    )
    lines = [
        f"# {first.path.stem}: {about['architecture']} for {about['data']}",
        "",
        *table,
        "",
        compared,
        "",
        *measured,
        "",
        "## To run it",
        "",
        *_how_to_run(first),
    ]
    path = first.path.with_suffix(".md")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _words(value: Any) -> str:  # noqa: ANN401 (what a recipe holds)
    if isinstance(value, list):
        return " ".join(f"`{one}`" for one in value)
    return "" if value is None else str(value)


def _how_to_run(exported: Exported) -> list[str]:
    name, size = exported.path.name, exported.about["image_size"]
    command = ["```bash", f"kd predict {name} IMAGE_OR_FOLDER", "```"]
    if exported.path.suffix == ".onnx":
        code = [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{name}")',
            f'logits = session.run(None, {{"images": images}})[0]  # images: float32 (B, 3, {size}, {size}) in [0, 1]',
        ]
    else:
        code = [
            "from kd import load_student",
            f'student, transform = load_student("{name}")',
            "logits = student(transform(image)[None])  # image: a Pillow image, or the path of one",
        ]
    return [*command, "", "```python", *code, "```"]
