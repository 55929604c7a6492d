"""The declarations of all settings, as frozen dataclasses by section; :mod:`kd.settings.sources` reads the values.

A setting has one name everywhere: field, flag, key in a YAML file and word in ``commandline_args.txt``.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from kd.settings.declaration import (
    ALL,
    BASELINE,
    DISTILLED,
    INT64_MAX,
    NOTHING,
    NUMBER,
    STUDENT,
    TEACHER,
    TEXT,
    Batches,
    Count,
    Finite,
    Fraction,
    Natural,
    NonNegative,
    Part,
    Phase,
    Positive,
    Share,
    Switch,
    Text,
    setting,
)

PUBLISHED = "published"
"""Value of ``teacher_pretrained`` for the published weights of the architecture."""

_READ_WHOLE = "a stream is read as a whole; write shards of the subset instead"
_NOT_DIVIDED = "a stream isn't divided; write shards of each split instead"
_NOT_STORED = "outputs for streamed images are not stored; leave it out"


@dataclass(frozen=True)
class PhaseSettings:
    """What to run. Without any of the three phases, the student is trained on the labels."""

    train_teacher: Switch = setting(False, "train (or fine-tune) the teacher on the labels", NOTHING, per_machine=True)
    baseline: Switch = setting(False, "train the student on the labels alone, for comparison", NOTHING)
    distill: Switch = setting(False, "train the student to match the teacher's outputs", NOTHING, per_machine=True)
    name: Text | None = setting(
        None,
        "name of the experiment's folder; None: derived from data set, teacher and student",
        NOTHING,
        per_machine=True,
    )
    seed: Natural = setting(0, "random seed", NOTHING)
    seeds: Count = setting(1, "repeat baseline and distilled with this many seeds: seed, seed + 1, ...", NOTHING)
    resume: Text | None = setting(
        None,
        "resume an interrupted run: that of the same --name, or the one in a folder, with its settings "
        "(--resume logs/NAME); finished phases are not repeated; without a run to resume, start a new one",
        NOTHING,
        bare="auto",
    )
    metric: Literal["auto", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "map", "micro_f1"] = setting(
        "auto",
        "what chooses the best checkpoint, and what the verdict is about; auto: accuracy, or balanced_accuracy where "
        "the most frequent class is 1.5 times as frequent as the mean, or map with several labels an image",
        ALL,
        known_as=("monitor", "eval_metric", "metric_for_best_model"),
    )
    strict: Switch = setting(False, "treat warnings of the checks before training as errors", NOTHING, per_machine=True)
    allow_weak_teacher: Switch = setting(False, "distill even from a teacher that is no better than chance", NOTHING)


@dataclass(frozen=True)
class DataSettings:
    """Images, their views and their caches."""

    dataset: Text = setting(
        "imagefolder",
        "imagefolder (folders and tables), webdataset (sharded archives), hf:NAME (Hugging Face, or a folder of "
        "save_to_disk or Parquet files), or a data set by name: imagenette, imagenette_320px, imagenette_160px, mnist, "
        "fashion_mnist, cifar10, cifar100, flowers102, oxford_pets, food101, stl10, svhn, eurosat, gtsrb, dtd, "
        "fgvc_aircraft, digits",
        NOTHING,
    )
    # Results depend on the contents of the images, which a run's provenance records, wherever they are.
    data_dir: Text | None = setting(
        None,
        "folder of the images; None: the cache folder, for data sets by name",
        NOTHING,
        per_machine=True,
        known_as=("data", "data_path", "dataset_dir", "root"),
        is_path=True,
    )
    train_data: Text = setting(
        "train",
        "training images: a folder in --data_dir, or a table (.csv, .tsv, .jsonl, .parquet) of paths, labels and "
        "perhaps splits (webdataset: a folder or a pattern of shards)",
        NOTHING,
        known_as=("train_dir", "train_split"),
    )
    val_data: Text = setting(
        "val", "validation images, likewise", NOTHING, known_as=("val_dir", "val_split", "validation_data")
    )
    test_data: Text | None = setting(
        None,
        "test images, likewise: never seen in training; the checkpoint chosen on the validation images is measured on "
        "them at the end",
        NOTHING,
        known_as=("test_dir",),
    )
    val_fraction: Part | None = setting(
        None,
        "fraction of the training images of each class to use for validation, where there are no others; drawn with "
        "--seed, and recorded in split.csv in the experiment's folder",
        NOTHING,
        not_for_streams=_NOT_DIVIDED,
        known_as=("validation_split", "val_ratio", "valid_pct"),
    )
    test_fraction: Part | None = setting(
        None, "fraction to use as test images, likewise", NOTHING, not_for_streams=_NOT_DIVIDED
    )
    path_column: Text | None = setting(
        None, "column of the paths in a table (or of the images of hf:NAME); None: path, file_name, image, ...", NOTHING
    )
    label_column: tuple[Text, ...] = setting(
        (),
        "column of the classes; empty: label, class, category, ...; several columns of 0 and 1 are each a class",
        NOTHING,
    )
    multilabel: Switch = setting(
        False,
        "several labels an image, from a table: lists, or texts separated by |, ; or comma; sigmoid instead of softmax",
        NOTHING,
        not_for_streams="shards hold one label an image",
        known_as=("multi_label",),
    )
    split_column: Text | None = setting(
        None, "column of the splits (train, val, test); None: split or subset, if there is one", NOTHING
    )
    allow_missing_classes: Switch = setting(
        False,
        "allow training, validation or test images to lack a class; metrics are over the classes present",
        NOTHING,
    )
    pixel_range: tuple[Finite, ...] = setting(
        (),
        "two gray values that become black and white in images of more than 8 bits, such as 0 4095; empty: each "
        "image's smallest and largest",
        ALL,
        not_for_streams="the shards hold images as they are; convert them to 8 bits",
    )
    image_size: Count = setting(
        224,
        "side of the square input images, in pixels",
        ALL,
        known_as=("imgsz", "img_size", "input_size", "resolution", "crop_size"),
    )
    num_classes: Annotated[int, Field(strict=True, ge=2, le=INT64_MAX), NUMBER] | None = setting(
        None, "expected number of classes, checked against the data; never required", NOTHING
    )
    batch_size: Count | Literal["auto"] = setting(
        64,
        "images per batch on each device; auto: the largest power of two up to 512 that fits into memory",
        ALL,
        searchable=True,
        known_as=("batch", "bs", "train_batch_size", "per_device_train_batch_size"),
    )
    num_workers: Natural | None = setting(
        None,
        "data loading processes; 0: load in the main process; None: from the number of cores",
        NOTHING,
        per_machine=True,
        known_as=("workers", "dataloader_num_workers"),
    )
    download: Switch = setting(False, "download a data set by name if it is missing", NOTHING, per_machine=True)
    augment: Text = setting(
        "crop",
        "augmentation of the training images: none, flip (horizontally, with probability 0.5), pad_crop (padded by an "
        "eighth, cropped and flipped, as for CIFAR), crop (random resized crop and flip), rotate (rotation by up to 30 "
        "degrees, then as crop), trivial (TrivialAugmentWide), rand (RandAugment), also with options: "
        "'rand(num_ops=2, magnitude=9)'; or your own path/to/file.py:function",
        ALL,
        searchable=True,
        known_as=("aa", "auto_augment", "augmentation"),
    )
    erasing: Share = setting(
        0.0,
        "probability of erasing a random rectangle of a training image",
        ALL,
        searchable=True,
        known_as=("reprob", "random_erase"),
    )
    resize: Literal["crop", "squash"] = setting(
        "crop",
        "how validation images (and training images with --augment none) become square: crop (short side to 8/7 of "
        "image_size, then center crop) or squash (ignoring the aspect ratio)",
        ALL,
    )
    train_fraction: Fraction = setting(
        1.0,
        "fraction of each class that the student is trained on, drawn with --seed",
        STUDENT,
        searchable=True,
        not_for_streams=_READ_WHOLE,
    )
    teacher_train_fraction: Fraction = setting(
        1.0, "fraction of each class that the teacher is trained on", TEACHER, not_for_streams=_READ_WHOLE
    )
    unlabeled_data: Text | None = setting(
        None,
        "folder of unlabeled images, searched recursively; the student is distilled on them, too",
        NOTHING,
        searchable=True,
        not_for_streams="images of a folder can't be mixed into a stream; leave it out",
        is_path=True,
    )
    unlabeled_rest: Switch = setting(
        False,
        "distill on the images that --train_fraction leaves out, too, without their labels",
        DISTILLED,
        searchable=True,
        not_for_streams=_READ_WHOLE,
    )
    sampler: Literal["shuffle", "balanced"] = setting(
        "shuffle",
        "order of the training images: shuffle (each once per epoch), or balanced (each class equally often, with "
        "replacement)",
        ALL,
        searchable=True,
        not_for_streams="streams are read in their order; use --class_weights balanced",
    )
    views: Count | None = setting(
        None,
        "number of distinct views per training image; the sequence then repeats; None: new views every epoch",
        STUDENT,
        searchable=True,
    )
    augment_on: Literal["auto", "cpu", "device"] = setting(
        "auto",
        "where --augment crop and rotate are computed: cpu, device, or auto (device on a GPU, else cpu)",
        ALL,
        per_machine=True,
        not_for_streams="streamed images are augmented by the data loading processes; use auto or cpu",
        streams_allow=("cpu",),
    )
    image_cache: Text = setting(
        "auto",
        "cache of decoded images, reused by later runs: none, a folder, or auto (if there is disk space)",
        ALL,
        per_machine=True,
        not_for_streams="streamed images are not cached; leave it out",
        streams_allow=("none",),
        known_as=("cache",),
    )
    teacher_cache: Text = setting(
        "auto",
        "cache of the teacher's logits, reused by later runs with the same views: none, a folder, or auto",
        NOTHING,
        per_machine=True,
        not_for_streams=_NOT_STORED,
        streams_allow=("none",),
    )
    cache_limit: Positive | None = setting(
        None,
        "maximum size of the cache folder in GB; least recently used entries are removed; None: a quarter of the disk",
        NOTHING,
        per_machine=True,
    )
    teacher_top: Count | None = setting(
        None,
        "store only this many of the teacher's largest logits per image and spread the remaining probability evenly; "
        "None: store all",
        DISTILLED,
        not_for_streams=_NOT_STORED,
    )
    verify: Literal["sample", "full"] = setting(
        "sample",
        "image files to read again and compare with their recorded content at each start: sample (a random sample of "
        "those whose size, times and inode are unchanged) or full (all)",
        NOTHING,
        per_machine=True,
    )
    on_bad_image: Literal["error", "skip"] = setting(
        "error", "images that can't be decoded: error (stop and name the file) or skip (leave out and count)", NOTHING
    )
    mixup: NonNegative = setting(
        0.0, "mixup of the student's images: alpha of the Beta distribution; 0: off", STUDENT, searchable=True
    )
    cutmix: NonNegative = setting(
        0.0, "CutMix of the student's images: alpha of the Beta distribution; 0: off", STUDENT, searchable=True
    )


@dataclass(frozen=True)
class ModelSettings:
    """The networks. ``kd models`` lists the names."""

    teacher_model: tuple[Text, ...] = setting(
        ("densenet121",),
        "teacher: a torchvision name, timm/NAME, simple, convnet(widths=[16,32]), ..., or path/to/file.py:function; "
        "several form an ensemble",
        TEACHER,
        known_as=("teacher", "teacher_arch"),
    )
    student_model: Text = setting(
        "simple",
        "student, named as for --teacher_model",
        STUDENT,
        searchable=True,
        known_as=("model", "arch", "student", "student_arch"),
    )
    teacher_pretrained: Text | None = setting(
        None,
        "start the teacher from published ImageNet weights, or from those in a file; the classifier layer is new "
        "unless the file has one with as many classes. Without --train_teacher: the teacher that was fine-tuned from "
        "them, or else these weights as they are",
        TEACHER,
        bare=PUBLISHED,
        is_path=True,
    )
    student_pretrained: Text | None = setting(
        None,
        "the same for the student",
        STUDENT,
        searchable=True,
        bare=PUBLISHED,
        known_as=("pretrained",),
        is_path=True,
    )
    student_checkpoint: Text | None = setting(
        None,
        "file of the student's initial weights with its classifier layer, whose classes are matched by name; of any "
        "kind that --teacher_checkpoint takes",
        STUDENT,
        searchable=True,
        is_path=True,
    )
    assistant_pretrained: Text | None = setting(
        None, "the same for the assistants", NOTHING, searchable=True, bare=PUBLISHED, is_path=True
    )
    teacher_checkpoint: tuple[Text, ...] = setting(
        (),
        "file of the teacher's weights (one for each of several): a checkpoint, a state dict of any origin, "
        "safetensors, ONNX, a folder of timm or transformers, stored logits (kd predict --logits), or none: the "
        "network's code loads its weights, or --teacher_pretrained; empty: the one that --train_teacher wrote",
        NOTHING,
        per_machine=True,
        known_as=("teacher_path", "teacher_weights_path"),
        is_path=True,
    )
    teacher_classes: Text | None = setting(
        None,
        "class names of a teacher that was trained elsewhere, in the order of its outputs: a file (one per line, or "
        "JSON), or imagenet; None: the file's, or else the data's",
        NOTHING,
        is_path=True,
    )
    teacher_features: Switch = setting(
        False, "distill the teacher's features alone, without a classifier layer, by losses such as embedding", NOTHING
    )
    teacher_mean: tuple[Share, ...] = setting(
        (),
        "mean of the pixels in [0, 1] by channel that a teacher trained elsewhere expects; empty: the file's, or that "
        "of the architecture's published weights",
        NOTHING,
    )
    teacher_std: tuple[Positive, ...] = setting((), "their standard deviation, likewise", NOTHING)
    ensemble_weights: tuple[NonNegative, ...] = setting(
        (),
        "weights of several teachers; they are normalized; empty: equal weights",
        DISTILLED,
        formerly="teacher_weights",
    )
    teacher_average: Literal["probabilities", "logits"] = setting(
        "probabilities", "outputs of several teachers that are averaged", DISTILLED
    )
    teacher_image_size: tuple[Count, ...] = setting(
        (),
        "input size of the teacher (or of each), to which the student's views are resized; empty: image_size",
        TEACHER | DISTILLED,
    )
    assistants: tuple[Text, ...] = setting(
        (),
        "networks between teacher and student, from large to small; each is distilled from the one before it",
        NOTHING,
        searchable=True,
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the student minimizes. The teacher minimizes cross-entropy with the labels."""

    loss: tuple[Text, ...] = setting(
        ("ce=0.1", "kl=0.9"),
        "terms with their weights; `kd losses` lists them; your own: path/to/file.py:function=0.9",
        DISTILLED,
        searchable=True,
        known_as=("criterion", "distill_loss", "alpha"),
    )
    baseline_loss: tuple[Text, ...] = setting(
        ("ce=1",),
        "terms of the student that is trained on the labels alone, such as focal=1, or your own: "
        "path/to/file.py:function",
        BASELINE,
    )
    compare_losses: tuple[Text, ...] = setting(
        (), 'objectives to compare, each in quotes ("ce=0.1 kl=0.9" mse): one student is distilled with each', NOTHING
    )
    temperature: Positive | None = setting(
        None,
        "temperature of the terms that have one and don't set it themselves; None: each term's default",
        DISTILLED,
        searchable=True,
        known_as=("T", "tau", "kd_T"),
    )
    class_weights: Text = setting(
        "none",
        "weights of the classes in the terms ce and focal, of teacher and student: none, balanced (inverse to their "
        "numbers of training images), or a YAML or JSON file of weights by class",
        ALL,
        searchable=True,
        is_path=True,
    )
    label_smoothing: Share = setting(
        0.0, "label smoothing of the term ce", STUDENT, searchable=True, known_as=("smoothing",)
    )
    teacher_label_smoothing: Share = setting(
        0.0, "label smoothing for --train_teacher; it makes a worse teacher", TEACHER
    )


@dataclass(frozen=True)
class OptimizationSettings:
    """How the networks are trained. A ``teacher_`` setting that is None takes the student's value."""

    optimizer: Text = setting(
        "adamw",
        "sgd, adamw, another optimizer of torch in lower case, or timm/NAME; also with options: 'rmsprop(alpha=0.9)'",
        ALL,
        searchable=True,
        known_as=("opt", "optim"),
    )
    learning_rate: Positive = setting(
        1e-3, "peak learning rate", ALL, searchable=True, known_as=("lr", "lr0", "max_lr")
    )
    teacher_learning_rate: Positive | None = setting(None, "peak learning rate of the teacher", TEACHER)
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False), NUMBER] = setting(
        0.9, "momentum of sgd; first of the betas of adamw and others", ALL, searchable=True
    )
    weight_decay: NonNegative = setting(
        0.01, "weight decay; biases and normalization layers are exempt", ALL, searchable=True, known_as=("wd",)
    )
    nesterov: Switch = setting(False, "Nesterov momentum for sgd", ALL, searchable=True)
    schedule: Literal["cosine", "constant", "step", "multistep", "poly", "onecycle"] = setting(
        "cosine",
        "learning rate after the warm-up: cosine decay to zero, constant, step (times gamma every step_epochs), "
        "multistep (times gamma at the milestones), poly (to zero, with poly_power), or onecycle (up to the peak in "
        "30 percent of the training, then to zero)",
        ALL,
        searchable=True,
        known_as=("sched", "lr_scheduler", "lr_scheduler_type", "scheduler"),
    )
    milestones: tuple[Positive, ...] = setting(
        (), "epochs at which schedule multistep multiplies the learning rate by gamma", ALL
    )
    step_epochs: Positive = setting(
        30.0, "epochs between the steps of schedule step", ALL, searchable=True, known_as=("step_size", "decay_epochs")
    )
    gamma: Positive = setting(
        0.1, "factor of the learning rate at each step", ALL, searchable=True, known_as=("lr_gamma", "decay_rate")
    )
    poly_power: Positive = setting(1.0, "exponent of schedule poly; 1: linear", ALL, searchable=True)
    warmup_epochs: NonNegative = setting(
        0.0,
        "epochs of linear learning rate warm-up from zero",
        ALL,
        searchable=True,
        known_as=("warmup", "lr_warmup_epochs"),
    )
    max_epochs: Count = setting(
        20, "number of epochs", ALL, searchable=True, known_as=("epochs", "num_epochs", "num_train_epochs")
    )
    teacher_epochs: Count | None = setting(None, "number of epochs of the teacher", TEACHER)
    max_steps: Count | None = setting(
        None, "stop after this many optimizer steps, if that is earlier", STUDENT, searchable=True
    )
    teacher_steps: Count | None = setting(None, "the same for the teacher; None: no limit", TEACHER)
    ema: Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False), NUMBER] | None = setting(
        None,
        "decay of an exponential moving average of the student's weights, such as 0.999; the average is evaluated "
        "and saved",
        STUDENT,
        searchable=True,
        known_as=("model_ema", "model_ema_decay"),
    )
    swa: Count | None = setting(
        None,
        "stochastic weight averaging: first epoch, from 1, from which on the weights at the end of each epoch are "
        "averaged; the average is evaluated and saved",
        STUDENT,
        searchable=True,
    )
    freeze: Count | Literal["backbone"] | None = setting(
        None,
        "train the student's classifier layer alone: backbone (a linear probe), or a number of epochs, after which "
        "everything is trained",
        STUDENT,
        known_as=("freeze_backbone", "freeze_epochs", "frozen_stages"),
    )
    teacher_freeze: Count | Literal["backbone"] | None = setting(None, "the same for the teacher", TEACHER)
    layer_decay: Fraction | None = setting(
        None,
        "layer-wise decay: factor of the learning rate from each block to the one before it, such as 0.75",
        ALL,
        searchable=True,
        known_as=("llrd", "layer_wise_decay"),
    )
    update_bn: Switch = setting(
        False,
        "recompute the statistics of batch normalization on 2,048 training images before each validation, where they "
        "lag behind the weights, as in short trainings of MobileNetV3",
        ALL,
        known_as=("precise_bn",),
    )
    gradient_checkpointing: Switch = setting(
        False,
        "recompute activations in the backward pass, which saves memory and takes time; for networks that can",
        NOTHING,
        known_as=("grad_checkpointing",),
    )
    early_stopping: Count | None = setting(
        None,
        "stop a training after this many epochs without a better --metric; None: never",
        ALL,
        known_as=("patience", "early_stop_patience"),
    )
    gradient_clip: Positive | None = setting(
        None,
        "maximum norm of the gradient; None: no clipping",
        ALL,
        searchable=True,
        known_as=("clip_grad", "clip_grad_norm", "max_grad_norm", "gradient_clip_val"),
    )
    accumulate: Count = setting(
        1,
        "gradient accumulation: batches per optimizer step",
        ALL,
        searchable=True,
        known_as=("grad_accum_steps", "gradient_accumulation_steps", "accumulate_grad_batches"),
    )


@dataclass(frozen=True)
class MachineSettings:
    """Hardware, through Lightning, and files."""

    accelerator: Text = setting(
        "auto",
        "Lightning's accelerator: auto (a GPU if there is one), cpu, gpu, ...",
        NOTHING,
        per_machine=True,
        known_as=("device",),
    )
    devices: Text = setting(
        "auto",
        "number of devices (2), or their indices ('0,1'; '1,' for the second only)",
        NOTHING,
        per_machine=True,
        known_as=("gpus", "ngpu", "num_gpus", "nproc_per_node"),
    )
    num_nodes: Count = setting(1, "number of machines", NOTHING, per_machine=True, known_as=("nodes", "nnodes"))
    strategy: Text = setting("auto", "Lightning's strategy: auto, ddp, fsdp, ...", NOTHING, per_machine=True)
    precision: Text = setting(
        "auto",
        "auto (the fastest on this machine at the same accuracy), or Lightning's: 32-true, bf16-mixed, ...",
        ALL,
        known_as=("amp", "fp16", "bf16", "half", "mixed_precision"),
    )
    channels_last: Annotated[Literal["auto", "true", "false"], TEXT] = setting(
        "auto", "channels-last memory format; auto: where it is faster", ALL, per_machine=True
    )
    compile: Switch = setting(
        False,
        "compile the networks with torch.compile: about a minute more per phase; ignored without a compiler",
        ALL,
        per_machine=True,
    )
    default_root_dir: Text = setting(
        "logs",
        "folder of all experiments",
        NOTHING,
        per_machine=True,
        known_as=("output", "output_dir", "project", "log_dir", "save_dir"),
    )
    logger: tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...] = setting(
        ("tensorboard",),
        "loggers: tensorboard, csv (metrics.csv in the run's folder), wandb (Weights & Biases; WANDB_PROJECT and "
        "WANDB_MODE=offline count), mlflow (a database in default_root_dir, or MLFLOW_TRACKING_URI); several are "
        "possible",
        NOTHING,
        per_machine=True,
    )
    checkpoint_every: Count | None = setting(
        None,
        "steps between checkpoints to resume from; None: at the ends of epochs, at most twice a minute",
        NOTHING,
        per_machine=True,
    )
    fast_dev_run: Switch = setting(
        False, "smoke test: run one batch of everything and write no files", NOTHING, per_machine=True
    )
    limit_train_batches: Batches = setting(1.0, "training batches per epoch: a number, or a fraction such as 0.1", ALL)
    limit_val_batches: Batches = setting(1.0, "validation batches: a number, or a fraction such as 0.1", ALL)


@dataclass(frozen=True)
class SourceSettings:
    """Where settings come from besides the command line: defaults < args_file < config < command line."""

    args_file: Text = setting("commandline_args.txt", "text file of flags; the default one may be missing", NOTHING)
    config: tuple[Text, ...] = setting((), "YAML files of settings; later ones win", NOTHING)


@dataclass(frozen=True)
class Settings:
    """All settings of an experiment."""

    phases: PhaseSettings = PhaseSettings()
    data: DataSettings = DataSettings()
    models: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    machine: MachineSettings = MachineSettings()
    sources: SourceSettings = SourceSettings()

    def flat(self) -> dict[str, Any]:
        """Return all settings but the sources by name: plain strings, numbers, truth values, lists and None."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for section in dataclasses.fields(self)
            if section.name != "sources"
            for name, value in dataclasses.asdict(getattr(self, section.name)).items()
        }


def setting_fields() -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Iterate over ``(section, field)``, in the order of ``--help``."""
    defaults = Settings()
    for section in dataclasses.fields(Settings):
        for declared in dataclasses.fields(getattr(defaults, section.name)):
            yield section.name, declared


def field_type(name: str) -> Any:  # noqa: ANN401 (a type, or a union of types)
    """Return the declared type of a setting, such as ``float | None``."""
    section = next(section for section, declared in setting_fields() if declared.name == name)
    return typing.get_type_hints(type(getattr(Settings(), section)))[name]


def settings_affecting(phase: Phase) -> tuple[str, ...]:
    """Return the names of the settings that the result of a phase depends on."""
    return tuple(declared.name for _, declared in setting_fields() if phase in declared.metadata["affects"])


def searchable_settings() -> tuple[str, ...]:
    """Return the names of the settings that a sweep may search."""
    return tuple(declared.name for _, declared in setting_fields() if declared.metadata["searchable"])


def per_machine_settings() -> tuple[str, ...]:
    """Return the names of the settings that may differ between the workers of one sweep."""
    return tuple(declared.name for _, declared in setting_fields() if declared.metadata["per_machine"])


def unsupported_by_streams(settings: Settings) -> list[tuple[str, str]]:
    """Return the settings that a data set streamed from shards can't have.

    Returns:
        Pairs of the flag with its value, such as ``--train_fraction 0.5``, and the reason with what to do.
    """
    found = []
    for section, declared in setting_fields():
        value, reason = getattr(getattr(settings, section), declared.name), declared.metadata["not_for_streams"]
        if reason is not None and value not in (declared.default, *declared.metadata["streams_allow"]):
            found.append((f"--{declared.name}" if value is True else f"--{declared.name} {value}", reason))
    return found
