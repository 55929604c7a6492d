"""torchdistill's training box with the same networks and images: https://github.com/yoshitomo-matsubara/torchdistill."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import RandomSampler
from torchvision.datasets import ImageFolder

from benchmarks.plain import build_pair, training_views


def is_installed() -> bool:
    """Return whether torchdistill is installed: ``uv sync --group benchmarks``."""
    return find_spec("torchdistill") is not None


def steps(
    folder: Path, teacher_name: str, student_name: str, *, image_size: int, batch_size: int, device: str = "cpu"
) -> Iterator[None]:
    """Train indefinitely, yielding after each step; arguments as in :func:`benchmarks.plain.steps`."""
    from torchdistill.core.distillation import get_distillation_box

    images = ImageFolder(folder, training_views(image_size))
    classes = len(images.classes)
    # torchdistill leaves the teacher in training mode by default.
    teacher, student = build_pair(teacher_name, student_name, classes, image_size, device)
    paths = {"student_module_path": ".", "student_module_io": "output"}
    paths |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    distance = {"key": "KDLoss", "kwargs": paths | {"temperature": 4.0, "alpha": 0.1, "reduction": "batchmean"}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": batch_size, "num_workers": 0, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-3}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": distance, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {"train": images}, config, torch.device(device), None, False, 1)
    while True:
        for batch, labels, more in box.train_data_loader:
            loss = box.forward_process(batch.to(device), labels.to(device), more)
            box.post_forward_process(loss)
            yield
