"""Synthetic images, and folders of any number of images."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(folder: Path, *, classes: int = 10, count: int = 64) -> Path:
    """Write JPEGs of 500x375 px of smooth noise, which compresses about as well as photographs."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        class_folder = folder / f"class{label}"
        class_folder.mkdir(parents=True)
        for index in range(count):
            coarse = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            grain = generator.normal(0, 6, (375, 500, 3))
            pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(class_folder / f"{index}.jpg", quality=90)
    return folder


def link_images(source: Path, folder: Path, count: int) -> Path:
    """Create a balanced folder of ``count`` symbolic links to the images of another, repeated as needed."""
    classes = [sorted(path.iterdir()) for path in sorted(source.iterdir()) if path.is_dir()]
    for index in range(count):
        number, label = divmod(index, len(classes))
        image = classes[label][number % len(classes[label])]
        class_folder = folder / image.parent.name
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / f"{number:05d}{image.suffix}").symlink_to(image.resolve())
    return folder
