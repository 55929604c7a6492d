"""A plain distillation loop: float32, Pillow transforms, teacher under ``torch.no_grad``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from kd.models.small import simple

NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def network(name: str, classes: int, image_size: int) -> nn.Module:
    """Build a network without kd's optimizations."""
    if name == "simple":
        return nn.Sequential(*simple(classes, image_size))
    network: nn.Module = torchvision.models.get_model(name, num_classes=classes)
    return network


@dataclass(frozen=True)
class Task:
    """Images and networks that all methods train on.

    Args:
        folder: Folder of class folders.
        image_size: Side of the views, in pixels.
        batch_size: Images per batch.
        teacher_name: The teacher's network.
        student_name: The student's network.
        num_workers: Number of data-loading workers.
        device: Device to train on.
    """

    folder: Path
    image_size: int
    batch_size: int
    teacher_name: str = "simple"
    student_name: str = "simple"
    num_workers: int = 0
    device: str = "cpu"

    def networks(self, classes: int) -> tuple[nn.Module, nn.Module]:
        """Build the teacher in evaluation mode and the student in training mode, without kd's optimizations."""
        names = (self.teacher_name, self.student_name)
        teacher, student = (network(name, classes, self.image_size).to(self.device) for name in names)
        return teacher.eval(), student.train()


def training_views(image_size: int) -> transforms.Compose:
    """Return the transforms of the training images."""
    return transforms.Compose(
        [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALIZE]
    )


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return 0.1 times the cross-entropy plus 0.9 times the softened KL divergence from the teacher."""
    soft = F.log_softmax(teacher / temperature, dim=1)
    log = F.log_softmax(student / temperature, dim=1)
    divergence = F.kl_div(log, soft, reduction="batchmean", log_target=True) * temperature**2
    return 0.1 * F.cross_entropy(student, labels) + 0.9 * divergence


def steps(task: Task) -> Iterator[None]:
    """Train indefinitely, yielding after each step."""
    images = ImageFolder(task.folder, training_views(task.image_size))
    loader = DataLoader(images, task.batch_size, shuffle=True, drop_last=True, num_workers=task.num_workers)
    teacher, student = task.networks(len(images.classes))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    while True:
        for batch, labels in loader:
            train_step(student, optimizer, batch.to(task.device), labels.to(task.device), teacher)
            yield


def train_step(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    labels: Tensor,
    teacher: nn.Module | None,
    *,
    temperature: float = 4.0,
) -> None:
    """Run one training step, with a teacher or on the labels only."""
    logits = student(batch)
    if teacher is None:
        loss = F.cross_entropy(logits, labels)
    else:
        with torch.no_grad():
            teacher_logits = teacher(batch)
        loss = distillation_loss(logits, teacher_logits, labels, temperature=temperature)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def batches(task: Task) -> Iterator[None]:
    """Load training batches indefinitely, yielding after each."""
    views = transforms.Compose(training_views(task.image_size).transforms[:-1])
    loader = DataLoader(ImageFolder(task.folder, views), task.batch_size, shuffle=True, drop_last=True)
    while True:
        for _ in loader:
            yield


def compare(task: Task, *, teacher_epochs: int, epochs: int, temperatures: Sequence[float]) -> None:
    """Train a teacher, a baseline, and a student per temperature, with validation after each epoch.

    Args:
        task: Images and networks; its folder contains ``train`` and ``val``.
        teacher_epochs: Training epochs of the teacher.
        epochs: Training epochs of each student.
        temperatures: Temperature of each distilled student.
    """
    image_size = task.image_size
    images = ImageFolder(task.folder / "train", training_views(image_size))
    resize = [transforms.Resize(round(image_size * 8 / 7)), transforms.CenterCrop(image_size)]
    val_images = ImageFolder(task.folder / "val", transforms.Compose([*resize, transforms.ToTensor(), NORMALIZE]))
    loader = DataLoader(images, task.batch_size, shuffle=True)
    validation = DataLoader(val_images, task.batch_size)
    classes = len(images.classes)

    def train(name: str, epochs: int, teacher: nn.Module | None, temperature: float) -> nn.Module:
        student = network(name, classes, image_size)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        for _ in range(epochs):
            student.train()
            for batch, labels in loader:
                train_step(student, optimizer, batch, labels, teacher, temperature=temperature)
            student.eval()
            correct = 0.0
            with torch.no_grad():
                for batch, labels in validation:
                    correct += float((student(batch).argmax(dim=1) == labels).sum())
        return student

    teacher = train(task.teacher_name, teacher_epochs, None, 1.0).eval()
    train(task.student_name, epochs, None, 1.0)
    for temperature in temperatures:
        train(task.student_name, epochs, teacher, temperature)
