"""kd's own training loop and input pipeline."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.limit import MEAN, STD
from benchmarks.plain import Task, distillation_loss
from kd.data import ImageData, LabeledImages, Splits, cache_decoded, cache_dir, read_folder, short_side
from kd.losses import build_objective
from kd.models import build_classifier, keep_large_blocks
from kd.pipeline.caches import logit_store
from kd.teachers import FrozenTeacher
from kd.training import DistillationModule, Hardware, Throughput, build_trainer, quiet_lightning

# A hundred batches per epoch: in a shorter epoch, its start and end would dominate.
_TINY_IMAGES = 6400


class _AfterEachStep(Callback):
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Call the function."""
        self.call()


def train(task: Task, after_step: Callable[[], None], *, stored: bool, store: Path | None = None) -> None:
    """Train with kd until ``after_step`` raises an exception.

    Args:
        task: Images and networks.
        after_step: Called after each step.
        stored: Whether the training views repeat in every epoch, so that the teacher's logits can be stored.
        store: Folder of the stored logits.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    accelerator = "gpu" if task.device == "cuda" else task.device
    data = _cached_data(task, period=1 if stored else None, on_device=task.device != "cpu")
    networks = [
        build_classifier(name, classes=data.splits.classes, image_size=task.image_size, mean=MEAN, std=STD)
        for name in (task.teacher_name, task.student_name)
    ]
    hardware = Hardware(accelerator=accelerator, devices="1")
    teacher_compute = hardware.compute_for(networks[0], trains=False)
    student_compute = hardware.compute_for(networks[1], trains=True)
    store_folder = "none" if store is None else str(store)
    module = DistillationModule(
        teacher=FrozenTeacher(networks[0], compute=teacher_compute),
        student=networks[1],
        objective=build_objective("ce=0.1 kl=0.9"),
        open_store=logit_store(networks[0], data, compute=teacher_compute, where=store_folder, devices=accelerator),
    )
    if student_compute.channels_last:
        module.to(memory_format=torch.channels_last)
    data.channels_last = student_compute.channels_last
    trainer = build_trainer(
        replace(hardware, precision=student_compute.precision, limit_val_batches=0),
        logger=False,
        enable_checkpointing=False,
        max_epochs=100_000,
        callbacks=[_AfterEachStep(after_step)],
    )
    with quiet_lightning():
        trainer.fit(module, datamodule=data)


def _cached_data(task: Task, **options: Any) -> ImageData:
    images = cache_decoded(read_folder(task.folder), short_side(task.image_size, "crop"), cache_dir() / "decoded")
    splits = Splits("benchmark", train=images, val=images)
    options |= {"image_size": task.image_size, "batch_size": task.batch_size, "num_workers": task.num_workers}
    return ImageData(splits, **options)


def batches(task: Task) -> Iterator[None]:
    """Load training batches from the cache of decoded images indefinitely, yielding after each."""
    keep_large_blocks()
    data = _cached_data(task)
    data.channels_last = True
    while True:
        for batch in data.train_dataloader():
            data.on_after_batch_transfer(batch, 0)
            yield


def tiny(after_step: Callable[[], None], *, by_hand: bool) -> None:
    """Train a network so small that the overhead of the loop dominates, until ``after_step`` raises an exception.

    Args:
        after_step: Called after each step.
        by_hand: Whether to use a minimal hand-written loop instead of kd's with logging and metrics.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (_TINY_IMAGES, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels, keys = [index % 10 for index in range(_TINY_IMAGES)], [str(index) for index in range(_TINY_IMAGES)]
    images = LabeledImages(tuple("abcdefghij"), labels, keys, lambda index: pixels[index])
    data = ImageData(Splits("tiny", images, images), image_size=8, batch_size=64, augment="none")
    teacher, student = (
        build_classifier("linear", classes=images.classes, image_size=8, mean=MEAN, std=STD) for _ in range(2)
    )
    module = DistillationModule(
        teacher=FrozenTeacher(teacher), student=student, objective=build_objective("ce=0.1 kl=0.9")
    )
    if not by_hand:
        logger = TensorBoardLogger(tempfile.mkdtemp())
        trainer = build_trainer(
            Hardware(accelerator="cpu", limit_val_batches=0),
            logger=logger,
            enable_checkpointing=False,
            max_epochs=100_000,
            callbacks=[_AfterEachStep(after_step), Throughput()],
        )
        with quiet_lightning():
            trainer.fit(module, datamodule=data)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    frozen = teacher.eval()
    while True:
        for batch in data.train_dataloader():
            views, targets = data.on_after_batch_transfer(batch, 0)
            with torch.no_grad():
                teacher_logits = frozen(views)
            loss = distillation_loss(student(views), teacher_logits, targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            after_step()
