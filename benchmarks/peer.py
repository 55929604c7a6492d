"""torchdistill's training box with the same networks and images: https://github.com/yoshitomo-matsubara/torchdistill."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch.utils.data import RandomSampler
from torchvision.datasets import ImageFolder

from benchmarks.plain import Task, training_views


def is_installed() -> bool:
    """Return whether torchdistill is installed: ``uv sync --group benchmarks``."""
    return find_spec("torchdistill") is not None


def steps(task: Task) -> Iterator[None]:
    """Train indefinitely, yielding after each step."""
    from torchdistill.core.distillation import get_distillation_box

    images = ImageFolder(task.folder, training_views(task.image_size))
    # torchdistill leaves the teacher in training mode by default.
    teacher, student = task.networks(len(images.classes))
    paths = {"student_module_path": ".", "student_module_io": "output"}
    paths |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    distance = {"key": "KDLoss", "kwargs": paths | {"temperature": 4.0, "alpha": 0.1, "reduction": "batchmean"}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": task.batch_size, "num_workers": 0, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-3}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": distance, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {"train": images}, config, torch.device(task.device), None, False, 1)
    while True:
        for batch, labels, extra in box.train_data_loader:
            loss = box.forward_process(batch.to(task.device), labels.to(task.device), extra)
            box.post_forward_process(loss)
            yield
