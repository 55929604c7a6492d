"""A distillation loop with every optimization by hand: the upper bound on speed."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.plain import Task, distillation_loss
from kd.data import RandomResizedCrop, cache_decoded, cache_dir, crop_image, read_folder, short_side
from kd.models import keep_large_blocks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def steps(task: Task, *, bfloat16: bool, stored: bool) -> Iterator[None]:
    """Train indefinitely, yielding after each step.

    Args:
        task: Images and networks.
        bfloat16: Whether the student is trained in bfloat16; the teacher always runs in bfloat16.
        stored: Whether the teacher's logits are read from memory instead of computed.
    """
    keep_large_blocks()
    torch.set_float32_matmul_precision("high")
    images = cache_decoded(read_folder(task.folder), short_side(task.image_size, "crop"), cache_dir() / "decoded")
    view, device = RandomResizedCrop(task.image_size), task.device
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    classes = len(images.classes)
    teacher, student = (network.to(memory_format=torch.channels_last) for network in task.networks(classes))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    stored_logits = torch.randn(len(images), classes, device=device)
    while True:
        for indices in torch.split(torch.randperm(len(images)), task.batch_size)[:-1]:
            pixels = np.empty((len(indices), task.image_size, task.image_size, 3), dtype=np.uint8)
            for output, index in zip(pixels, indices.tolist(), strict=True):
                image = images.load(index)
                crop_image(image, view.draw(*image.shape[1:]), out=output)
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device).float().div_(255).sub_(mean).div_(std)
            labels = torch.tensor([images.labels[index] for index in indices.tolist()], device=device)
            if stored:
                teacher_logits = stored_logits[indices]
            else:
                with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                    teacher_logits = teacher(batch)
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits = student(batch)
            loss = distillation_loss(logits.float(), teacher_logits.float(), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            yield
