"""Draw the figures of "What distillation does" from two experiments on scikit-learn's digits.

python docs/figures.py logs/quickstart logs/temperature
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from kd import load_student

ASSETS = Path(__file__).parent / "assets"
TEMPERATURES = (1, 2, 4, 8)
IMAGE_COUNT = 3
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8c8c8c")


def main(quickstart: Path, temperature: Path) -> None:
    """Draw both figures into docs/assets."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kd", "font.size": 10, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False})
    draw_soft_targets(quickstart / "teacher" / "version_0" / "checkpoints" / "best.ckpt")
    draw_temperatures(json.loads((temperature / "summary.json").read_text(encoding="utf-8")))


def draw_soft_targets(checkpoint: Path) -> None:
    """Draw the teacher's soft targets of some validation images at several temperatures.

    The images are correctly classified with the lowest confidence, and of different classes.
    """
    teacher, transform = load_student(checkpoint)
    digits = load_digits()
    # Every fifth digit is a validation image.
    images, labels = digits.images[::5], digits.target[::5]
    inputs = [Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in images]
    with torch.no_grad():
        logits = teacher(torch.stack([transform(image) for image in inputs])).double().numpy()
    confidence = softmax(logits, 1)[np.arange(len(labels)), labels]
    correct = [int(index) for index in np.argsort(confidence) if logits[index].argmax() == labels[index]]
    selected = [index for rank, index in enumerate(correct) if labels[index] not in labels[correct[:rank]]]

    ratios = [0.6, *[1.0] * len(TEMPERATURES)]
    figure, rows = plt.subplots(IMAGE_COUNT, len(ratios), figsize=(9, 4.6), width_ratios=ratios, layout="constrained")
    for index, (image_axes, *bar_axes) in zip(selected[:IMAGE_COUNT], rows, strict=True):
        image_axes.imshow(images[index], cmap="gray_r")
        image_axes.axis("off")
        image_axes.set(title=f"label {labels[index]}")
        for axes, temperature in zip(bar_axes, TEMPERATURES, strict=True):
            color = [COLORS[1] if label == labels[index] else COLORS[0] for label in range(10)]
            axes.bar(range(10), softmax(logits[[index]], temperature)[0], color=color)
            axes.set(ylim=(0, 1), xticks=range(10), yticks=[0, 0.5, 1])
            axes.tick_params(labelsize=7)
            if index == selected[0]:
                axes.set_title(f"T = {temperature}")
    save(figure, "soft-targets.svg")


def draw_temperatures(summary: dict[str, Any]) -> None:
    """Plot the distilled student's accuracy against the temperature, with teacher and baseline for comparison."""
    points = []
    for row in summary["compared"]:
        match = re.search(r"temperature=(\d+)", row["objective"])
        if match:
            points.append((int(match[1]), 100 * row["val_acc_mean"], 100 * row["val_acc_std"]))
    temperatures, means, deviations = zip(*sorted(points), strict=True)
    figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    label = "student, distilled (mean ± std of 3 seeds)"
    axes.errorbar(temperatures, means, deviations, marker="o", capsize=4, color=COLORS[0], label=label)
    baseline, teacher = (summary["phases"][phase] for phase in ("baseline", "teacher"))
    mean, deviation = 100 * baseline["val_acc_mean"], 100 * baseline["val_acc_std"]
    axes.axhline(mean, color=COLORS[1], label="student, labels only")
    axes.axhspan(mean - deviation, mean + deviation, color=COLORS[1], alpha=0.15)
    axes.axhline(100 * teacher["val_acc_mean"], color=COLORS[3], linestyle="--", label="teacher")
    axes.set_xscale("log", base=2)
    axes.set(xticks=temperatures, xticklabels=temperatures, xlabel="temperature T", ylabel="validation accuracy, %")
    axes.legend(frameon=False, fontsize=9, loc="center right")
    save(figure, "temperature.svg")


def softmax(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return the softmax of each row at a temperature."""
    shifted = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def save(figure: Figure, name: str) -> None:
    """Write a figure on a white background, to be readable in the dark mode of the site."""
    figure.savefig(ASSETS / name, facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
