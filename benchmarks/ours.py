"""The tool itself, step by step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback

from kd.data import ImageData, Splits, cache_dir, decoded, read_folder
from kd.losses import build_objective
from kd.models import build_classifier
from kd.pipeline.stores import logit_store
from kd.training import DistillationModule, FrozenTeacher, Hardware, build_trainer, keep_large_blocks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _AfterEachStep(Callback):
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Report, and wait for the word to go on."""
        self.call()


def train(
    folder: Path,
    teacher_name: str,
    student_name: str,
    after_step: Callable[[], None],
    *,
    image_size: int,
    batch_size: int,
    stored: bool,
    store: Path | None = None,
) -> None:
    """Train for ever.

    Args:
        folder: Folder of class folders.
        teacher_name: The teacher's network.
        student_name: The student's.
        after_step: Called after each step.
        image_size: Side of the views, in pixels.
        batch_size: Images in a batch.
        stored: Whether one epoch's logits are stored first, and read from then on.
        store: Folder of the store.
    """
    torch.manual_seed(0)
    images = decoded(read_folder(folder), round(image_size * 8 / 7), cache_dir() / "decoded")
    splits = Splits("benchmark", train=images, val=images)
    data = ImageData(splits, image_size=image_size, batch_size=batch_size, period=1 if stored else None)
    networks = [
        build_classifier(name, classes=splits.classes, image_size=image_size, mean=MEAN, std=STD)
        for name in (teacher_name, student_name)
    ]
    hardware = Hardware(accelerator="cpu")
    answers = hardware.compute_for(networks[0], trains=False)
    trains = hardware.compute_for(networks[1], trains=True)
    where = "none" if store is None else str(store)
    module = DistillationModule(
        teacher=FrozenTeacher(networks[0], compute=answers),
        student=networks[1],
        objective=build_objective("ce=0.1 kl=0.9"),
        open_store=logit_store(networks[0], data, compute=answers, where=where, devices="cpu"),
    )
    if trains.channels_last:
        module.to(memory_format=torch.channels_last)
    data.channels_last = trains.channels_last
    trainer = build_trainer(
        Hardware(accelerator="cpu", precision=trains.precision, limit_val_batches=0),
        logger=False,
        enable_checkpointing=False,
        max_epochs=100_000,
        callbacks=[_AfterEachStep(after_step)],
    )
    trainer.fit(module, datamodule=data)


def batches(folder: Path, *, image_size: int, batch_size: int) -> Iterator[None]:
    """Load for ever, from the store of decoded images; each batch ends with a yield."""
    keep_large_blocks()
    images = decoded(read_folder(folder), round(image_size * 8 / 7), cache_dir() / "decoded")
    data = ImageData(Splits("benchmark", train=images, val=images), image_size=image_size, batch_size=batch_size)
    data.channels_last = True
    while True:
        for batch in data.train_dataloader():
            data.on_after_batch_transfer(batch, 0)
            yield
