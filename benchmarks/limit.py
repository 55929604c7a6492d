"""The plain loop with every trick that is known: what there is to be won on this machine."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from benchmarks.plain import network
from kd.data import cache_dir, decoded, read_folder
from kd.training import keep_large_blocks


def steps(
    folder: Path,
    teacher_name: str,
    student_name: str,
    *,
    image_size: int,
    batch_size: int,
    bfloat16: bool,
    stored: bool,
) -> Iterator[None]:
    """Train for ever; each step ends with a yield.

    Args:
        folder: Folder of class folders.
        teacher_name: The teacher's network.
        student_name: The student's.
        image_size: Side of the views, in pixels.
        batch_size: Images in a batch.
        bfloat16: Whether the student trains in bfloat16; the teacher answers in it.
        stored: Whether the teacher's logits lie in memory already.
    """
    keep_large_blocks()
    images = decoded(read_folder(folder), round(image_size * 8 / 7), cache_dir() / "decoded")
    views = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    classes = len(images.classes)
    teacher = network(teacher_name, classes, image_size).eval().to(memory_format=torch.channels_last)
    student = network(student_name, classes, image_size).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    known = torch.randn(len(images), classes)
    while True:
        for indices in torch.split(torch.randperm(len(images)), batch_size)[:-1]:
            pixels = torch.stack([views(images.load(index)) for index in indices.tolist()])
            batch = pixels.contiguous(memory_format=torch.channels_last).float().div_(255).sub_(mean).div_(std)
            labels = torch.tensor([images.labels[index] for index in indices.tolist()])
            if stored:
                answer = known[indices]
            else:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    answer = teacher(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = student(batch)
            logits, soft = logits.float(), F.log_softmax(answer.float() / 4, dim=1)
            distance = F.kl_div(F.log_softmax(logits / 4, dim=1), soft, reduction="batchmean", log_target=True) * 16
            loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * distance
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            yield
