"""End-to-end duration of ten trainings: a teacher, a baseline and eight objectives."""

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
    """Return the run time of a method's process in seconds.

    Args:
        kind: ``plain`` or ``kd``.
        folder: Folder of ``train`` and ``val``.
        image_size: Side of the views, in pixels.
        batch_size: Images per batch.
        teacher_epochs: Training epochs of the teacher.
        epochs: Training epochs of each student.
    """
    # A new folder, so that nothing cached by an earlier measurement is reused.
    run_folder = tempfile.mkdtemp(dir=folder.parent)
    start = time.perf_counter()
    if kind == "plain":
        command = ["-m", "benchmarks.comparison", *map(str, (folder, image_size, batch_size, teacher_epochs, epochs))]
    else:
        command = ["experiment.py", "--train_teacher", "--baseline", "--allow_weak_teacher"]
        command += ["--data_dir", str(folder), "--teacher_model", TEACHER, "--student_model", STUDENT]
        command += ["--image_size", str(image_size), "--batch_size", str(batch_size)]
        command += ["--teacher_epochs", str(teacher_epochs), "--max_epochs", str(epochs)]
        command += ["--default_root_dir", f"{run_folder}/logs"]
        command += ["--compare_losses", *(f"ce=0.1 kl(temperature={temperature})=0.9" for temperature in TEMPERATURES)]
    environment = os.environ | {"KD_CACHE": f"{run_folder}/cache"}
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=environment)  # noqa: S603 (own command)
    return time.perf_counter() - start


def main() -> None:
    """Run all ten trainings with the plain loop."""
    folder, *numbers = sys.argv[1:]
    image_size, batch_size, teacher_epochs, epochs = map(int, numbers)
    task = plain.Task(Path(folder), image_size, batch_size, TEACHER, STUDENT)
    plain.compare(task, teacher_epochs=teacher_epochs, epochs=epochs, temperatures=TEMPERATURES)


if __name__ == "__main__":
    main()
