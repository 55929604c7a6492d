"""A distillation loop as anybody would write it by hand: float32, Pillow's transforms, the teacher under no_grad."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from kd.models.small import simple


def network(name: str, classes: int, image_size: int) -> torch.nn.Module:
    """Build a network, as both sides of the comparison have it."""
    return simple(classes, image_size) if name == "simple" else torchvision.models.get_model(name, num_classes=classes)


def steps(folder: Path, teacher_name: str, student_name: str, *, image_size: int, batch_size: int) -> Iterator[None]:
    """Train for ever; each step ends with a yield."""
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    views = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]
    )
    images = ImageFolder(folder, views)
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True)
    classes = len(images.classes)
    teacher = network(teacher_name, classes, image_size).eval()
    student = network(student_name, classes, image_size).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    while True:
        for batch, labels in loader:
            with torch.no_grad():
                soft = F.log_softmax(teacher(batch) / 4, dim=1)
            logits = student(batch)
            distance = F.kl_div(F.log_softmax(logits / 4, dim=1), soft, reduction="batchmean", log_target=True) * 16
            loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * distance
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            yield


def batches(folder: Path, *, image_size: int, batch_size: int) -> Iterator[None]:
    """Load for ever; each batch ends with a yield."""
    views = transforms.Compose(
        [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    loader = DataLoader(ImageFolder(folder, views), batch_size, shuffle=True, drop_last=True)
    while True:
        for _ in loader:
            yield
