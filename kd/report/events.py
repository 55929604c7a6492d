"""The report in TensorBoard, beside the curves of the runs."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

RUN = "report"


def write_events(folder: Path, text: str, pictures: Mapping[str, Path]) -> None:
    """Write or replace the run ``report`` of an experiment: its text in the TEXT tab, its figures in IMAGES.

    Args:
        folder: The experiment's folder.
        text: The report in Markdown.
        pictures: The PNG files, by name.
    """
    shutil.rmtree(folder / RUN, ignore_errors=True)
    # TensorBoard can't show the image files that the Markdown links to.
    text = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
    with SummaryWriter(str(folder / RUN)) as writer:
        writer.add_text(RUN, text)
        for name, path in pictures.items():
            with Image.open(path) as image:
                writer.add_image(f"{RUN}/{name}", np.asarray(image.convert("RGB")), dataformats="HWC")
