"""Ten runs from start to end in a separate process: a teacher, a baseline and eight objectives."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import plain

# The networks of the shipped commandline_args.txt.
TEACHER, STUDENT = "densenet121", "simple"
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)


def seconds(kind: str, folder: Path, *, image_size: int, batch_size: int, teacher_epochs: int, epochs: int) -> float:
    """Return the duration of a method in seconds, from the start of its process to its end.

    Args:
        kind: ``plain`` or ``kd``.
        folder: Folder of ``train`` and ``val``.
        image_size: Side of the views, in pixels.
        batch_size: Images in a batch.
        teacher_epochs: Epochs of the teacher's training.
        epochs: Epochs of each student's training.
    """
    # A new folder: nothing that an earlier measurement stored is reused.
    folder_of_run = tempfile.mkdtemp(dir=folder.parent)
    start = time.perf_counter()
    if kind == "plain":
        line = ["-m", "benchmarks.comparison", *map(str, (folder, image_size, batch_size, teacher_epochs, epochs))]
    else:
        line = ["experiment.py", "--train_teacher", "--baseline", "--allow_weak_teacher"]
        line += ["--data_dir", str(folder), "--teacher_model", TEACHER, "--student_model", STUDENT]
        line += ["--image_size", str(image_size), "--batch_size", str(batch_size)]
        line += ["--teacher_epochs", str(teacher_epochs), "--max_epochs", str(epochs)]
        line += ["--default_root_dir", f"{folder_of_run}/logs"]
        line += ["--compare_losses", *(f"ce=0.1 kl(temperature={one})=0.9" for one in TEMPERATURES)]
    environment = os.environ | {"KD_CACHE": f"{folder_of_run}/cache"}
    subprocess.run([sys.executable, *line], check=True, stdout=subprocess.DEVNULL, env=environment)  # noqa: S603 (own command)
    return time.perf_counter() - start


def main() -> None:
    """Run all ten trainings with the plain loop."""
    folder, image_size, batch_size, teacher_epochs, epochs = sys.argv[1:]
    plain.compare(
        Path(folder),
        TEACHER,
        STUDENT,
        image_size=int(image_size),
        batch_size=int(batch_size),
        teacher_epochs=int(teacher_epochs),
        epochs=int(epochs),
        temperatures=TEMPERATURES,
    )


if __name__ == "__main__":
    main()
