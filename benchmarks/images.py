"""Synthetic images, and folders of any number of images."""

from pathlib import Path

import numpy as np
from PIL import Image


def photographs(folder: Path, *, classes: int = 10, count: int = 64) -> Path:
    """Write JPEGs of 500x375 px: smooth noise, which compresses about as well as photographs."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for index in range(count):
            coarse = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            grain = generator.normal(0, 6, (375, 500, 3))
            pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.jpg", quality=90)
    return folder


def linked(given: Path, folder: Path, count: int) -> Path:
    """Make a folder of ``count`` images, the classes in turn: links to the given images, repeated as needed."""
    classes = [
        sorted(path for path in place.iterdir() if path.is_file())
        for place in sorted(given.iterdir())
        if place.is_dir()
    ]
    for number in range(count):
        label, turn = number % len(classes), number // len(classes)
        source = classes[label][turn % len(classes[label])]
        place = folder / source.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{turn:05d}{source.suffix}").symlink_to(source.resolve())
    return folder
