"""Keras's example of distillation, with its teacher frozen and with its teacher trained along with the student.

https://keras.io/examples/vision/knowledge_distillation/ makes the teacher a part of the model that is trained, and
Keras 3 steps every weight beneath a model, so that the student's optimizer moves the teacher, too. Here a teacher can't
be reached from a student's training; hence this plain loop, which takes the teacher that ``mnist-conv`` has trained:

    python experiment.py --config configs/reproduce/mnist-conv.yaml --no-baseline --compare_losses
    python -m benchmarks.thawed
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

from benchmarks.readme import fill_readme
from benchmarks.tables import HOME, LOGS, RESULTS
from kd.data import cache_dir
from kd.models import Classifier, build_classifier, load_classifier

Images = tuple[Tensor, Tensor]

NETWORK = "configs/reproduce/networks.py:keras_convnet"
LABEL_WEIGHT, TEMPERATURE, EPOCHS, BATCH = 0.1, 10.0, 3, 32
# Of MNIST's training images, as in configs/reproduce/networks.py.
_MEAN, _STD = 0.1307, 0.3081


@dataclass(frozen=True)
class Run:
    """What one training came to; losses and accuracies (fractions of 1) by epoch.

    Args:
        is_frozen: Whether the teacher stayed as it was.
        seed: Of initial weights and order.
        loss: While training, the mean over the epoch.
        train_acc: The student's while training, over the epoch.
        val_acc: The student's afterwards.
        teacher_acc: The teacher's afterwards.
    """

    is_frozen: bool
    seed: int
    loss: list[float]
    train_acc: list[float]
    val_acc: list[float]
    teacher_acc: list[float]


@dataclass(frozen=True)
class Settings:
    """Train the example's student with its teacher frozen and with its teacher trained along.

    Args:
        teacher: Checkpoint of the teacher.
        seeds: Number of seeds.
        store: Keep what came out in results/ and in the README, as what is stated from now on.
    """

    teacher: Path = HOME / LOGS / "mnist-conv" / "teacher" / "version_0" / "checkpoints" / "best.ckpt"
    seeds: int = 3
    store: bool = False


def train(teacher: Classifier, images: Images, validation: Images, *, is_frozen: bool, seed: int) -> Run:
    """Train a student as the example does: cross-entropy and softened KL, with T squared, Adam at 1e-3.

    Args:
        teacher: As it was trained; it is trained further unless it is frozen.
        images: To train on: ``(N, 1, 28, 28)``, uint8, and their labels ``(N,)``.
        validation: Others of the kind.
        is_frozen: Whether the teacher stays as it is.
        seed: Of initial weights and order.
    """
    pixels, labels = images
    torch.manual_seed(seed)
    classes, (mean, std) = teacher.description.classes, [(number,) * 3 for number in (_MEAN, _STD)]
    student = build_classifier(NETWORK, classes=classes, image_size=28, resize="squash", mean=mean, std=std)
    # Faster, and the same.
    teacher, student = teacher.to(memory_format=torch.channels_last), student.to(memory_format=torch.channels_last)
    parameters = [*student.parameters(), *([] if is_frozen else teacher.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-7, fused=True)
    run = Run(is_frozen, seed, [], [], [], [])
    for _ in range(EPOCHS):
        total = right = torch.zeros(())
        for batch in torch.split(torch.randperm(len(labels)), BATCH):
            seen, wanted = _colour(pixels[batch]), labels[batch]
            with torch.set_grad_enabled(not is_frozen):
                targets = F.log_softmax(teacher(seen) / TEMPERATURE, dim=1)
            logits = student(seen)
            softened = F.log_softmax(logits / TEMPERATURE, dim=1)
            soft = TEMPERATURE**2 * F.kl_div(softened, targets, reduction="batchmean", log_target=True)
            loss = LABEL_WEIGHT * F.cross_entropy(logits, wanted) + (1 - LABEL_WEIGHT) * soft
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total = total + len(batch) * loss.detach()
            right = right + (logits.argmax(dim=1) == wanted).sum()
        run.loss.append(total.item() / len(labels))
        run.train_acc.append(right.item() / len(labels))
        run.val_acc.append(_accuracy(student, validation))
        run.teacher_acc.append(_accuracy(teacher, validation))
    return run


def main() -> int:
    """Train both ways; print what came out."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.thawed", use_underscores=True)
    console = Console()
    if not settings.teacher.is_file():
        words = f"There is no teacher {settings.teacher}: mnist-conv trains it, or --teacher names another."
        console.print(words, highlight=False, soft_wrap=True, markup=False)
        return 2
    images, validation = _mnist(is_train=True), _mnist(is_train=False)
    runs = []
    for seed in range(settings.seeds):
        for is_frozen in (True, False):
            teacher = load_classifier(settings.teacher, architecture=f"{NETWORK}(widths=[256,512])")
            runs.append(asdict(train(teacher, images, validation, is_frozen=is_frozen, seed=seed)))
            console.print_json(data=runs[-1], indent=None)
    if settings.store:
        (RESULTS / "thawed").mkdir(parents=True, exist_ok=True)
        (RESULTS / "thawed" / "runs.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        fill_readme()
    return 0


def _mnist(*, is_train: bool) -> Images:
    data = MNIST(cache_dir() / "mnist", train=is_train, download=True)
    return data.data[:, None], data.targets


def _colour(images: Tensor) -> Tensor:
    return (images.float() / 255).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _accuracy(network: nn.Module, images: Images) -> float:
    pixels, labels = images
    decisions = [network(_colour(batch)).argmax(dim=1) for batch in torch.split(pixels, 500)]
    return torch.cat(decisions).eq(labels).double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
