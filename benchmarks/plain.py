"""A plain distillation loop: float32, Pillow transforms, teacher under ``torch.no_grad``."""

from collections.abc import Iterator, Sequence
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


def build_pair(
    teacher_name: str, student_name: str, classes: int, image_size: int, device: str
) -> tuple[nn.Module, nn.Module]:
    """Build a teacher in evaluation mode and a student in training mode."""
    teacher, student = (network(name, classes, image_size).to(device) for name in (teacher_name, student_name))
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


def steps(
    folder: Path,
    teacher_name: str,
    student_name: str,
    *,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    device: str = "cpu",
) -> Iterator[None]:
    """Train indefinitely, yielding after each step.

    Args:
        folder: Folder of class folders.
        teacher_name: The teacher's network.
        student_name: The student's network.
        image_size: Side of the views, in pixels.
        batch_size: Images per batch.
        num_workers: Number of data-loading workers.
        device: Device to train on.
    """
    images = ImageFolder(folder, training_views(image_size))
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=num_workers)
    classes = len(images.classes)
    teacher, student = build_pair(teacher_name, student_name, classes, image_size, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    while True:
        for batch, labels in loader:
            train_step(student, optimizer, batch.to(device), labels.to(device), teacher)
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


def batches(folder: Path, *, image_size: int, batch_size: int) -> Iterator[None]:
    """Load training batches indefinitely, yielding after each."""
    views = transforms.Compose(training_views(image_size).transforms[:-1])
    loader = DataLoader(ImageFolder(folder, views), batch_size, shuffle=True, drop_last=True)
    while True:
        for _ in loader:
            yield


def compare(
    folder: Path,
    teacher_name: str,
    student_name: str,
    *,
    image_size: int,
    batch_size: int,
    teacher_epochs: int,
    epochs: int,
    temperatures: Sequence[float],
) -> None:
    """Train a teacher, a baseline, and a student per temperature, with validation after each epoch.

    Args:
        folder: Folder of ``train`` and ``val``.
        teacher_name: The teacher's network.
        student_name: The student's network.
        image_size: Side of the views, in pixels.
        batch_size: Images per batch.
        teacher_epochs: Training epochs of the teacher.
        epochs: Training epochs of each student.
        temperatures: Temperature of each distilled student.
    """
    images = ImageFolder(str(folder / "train"), training_views(image_size))
    resize = [transforms.Resize(round(image_size * 8 / 7)), transforms.CenterCrop(image_size)]
    val_images = ImageFolder(str(folder / "val"), transforms.Compose([*resize, transforms.ToTensor(), NORMALIZE]))
    loader = DataLoader(images, batch_size, shuffle=True)
    validation = DataLoader(val_images, batch_size)
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

    teacher = train(teacher_name, teacher_epochs, None, 1.0).eval()
    train(student_name, epochs, None, 1.0)
    for temperature in temperatures:
        train(student_name, epochs, teacher, temperature)
