"""The declarations of all settings, as frozen dataclasses by section; :mod:`kd.settings.sources` reads the values.

One setting has one name, spelled alike as field, flag, key in a YAML file and word in ``commandline_args.txt``.
"""

import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kd.errors import UserError

Phase = Literal["teacher", "baseline", "distilled"]
"""What a training is for. An assistant counts as ``distilled``."""

NOTHING: frozenset[Phase] = frozenset()
TEACHER: frozenset[Phase] = frozenset({"teacher"})
DISTILLED: frozenset[Phase] = frozenset({"distilled"})
STUDENT: frozenset[Phase] = frozenset({"baseline", "distilled"})
ALL: frozenset[Phase] = TEACHER | STUDENT


def setting(
    default: Any,  # noqa: ANN401
    help_text: str,
    *,
    affects: frozenset[Phase],
    searchable: bool,
    per_machine: bool = False,
    not_for_streams: str | None = None,
    streams_allow: tuple[str, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:  # noqa: ANN401 (a field has the type of its annotation)
    """Declare a setting with everything that the program needs to know about it.

    Args:
        default: The value where no source gives one.
        help_text: One line for ``--help`` and the documentation.
        affects: The phases whose results depend on it; runs are compared and resumed only if these settings are equal.
        searchable: Whether a sweep may search it.
        per_machine: Whether it may differ between the workers of one sweep.
        not_for_streams: Why a data set that is streamed from shards can't have it; ``None``: it can.
        streams_allow: Values besides the default that such a data set can have nevertheless.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.
        below: Exclusive upper bound.
    """
    facts = {
        "help": help_text,
        "affects": affects,
        "searchable": searchable,
        "per_machine": per_machine,
        "not_for_streams": not_for_streams,
        "streams_allow": streams_allow,
        "bounds": {"above": above, "at least": at_least, "at most": at_most, "below": below},
    }
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class PhaseSettings:
    """What to do. With none of the three phases named, the student is trained on the labels."""

    train_teacher: bool = setting(
        False, "train (or fine-tune) the teacher on the labels", affects=NOTHING, searchable=False, per_machine=True
    )
    baseline: bool = setting(
        False, "train the student on the labels alone, for comparison", affects=NOTHING, searchable=False
    )
    distill: bool = setting(
        False, "train the student to match the teacher's outputs", affects=NOTHING, searchable=False, per_machine=True
    )
    name: str | None = setting(
        None,
        "name of the experiment's folder; None: from data set, teacher and student",
        affects=NOTHING,
        searchable=False,
        per_machine=True,
    )
    seed: int = setting(0, "what everything random hangs on", at_least=0, affects=NOTHING, searchable=False)
    seeds: int = setting(
        1,
        "repeat baseline and distilled with this many seeds, counted up from --seed",
        at_least=1,
        affects=NOTHING,
        searchable=False,
    )
    resume: str | None = setting(
        None,
        "go on with what was cut off, in the experiment of this name or, with its settings, in the one of a folder "
        "(--resume logs/NAME); what is finished is not trained again; with nothing to go on with it starts",
        affects=NOTHING,
        searchable=False,
    )
    strict: bool = setting(
        False,
        "stop at the warnings of the checks before the first step, too",
        affects=NOTHING,
        searchable=False,
        per_machine=True,
    )
    allow_weak_teacher: bool = setting(
        False, "distill even from a teacher that is no better than chance", affects=NOTHING, searchable=False
    )


@dataclass(frozen=True)
class DataSettings:
    """The images."""

    dataset: str = setting(
        "imagefolder",
        "imagefolder, webdataset (sharded archives; docs/scale.md), or by name: imagenette, imagenette_320px, "
        "imagenette_160px, mnist, fashion_mnist, cifar10, cifar100, digits",
        affects=ALL,
        searchable=False,
    )
    data_dir: str | None = setting(
        None,
        "folder that holds the images; None: a cache folder, for the data sets that go by name",
        affects=ALL,
        searchable=False,
        per_machine=True,
    )
    train_data: str = setting(
        "train",
        "folder of the training images, within --data_dir (imagefolder; webdataset: or a pattern of shards)",
        affects=ALL,
        searchable=False,
    )
    val_data: str = setting(
        "val",
        "folder of the validation images, within --data_dir (imagefolder; webdataset: or a pattern of shards)",
        affects=ALL,
        searchable=False,
    )
    image_size: int = setting(
        224, "side of the square that the networks see, in pixels", at_least=1, affects=ALL, searchable=False
    )
    num_classes: int | None = setting(
        None, "checked against the data if given; it is never needed", at_least=2, affects=NOTHING, searchable=False
    )
    batch_size: int | Literal["auto"] = setting(
        64,
        "images in a batch, on each device; auto: the largest power of two, at most 512, that fits",
        at_least=1,
        affects=ALL,
        searchable=True,
    )
    num_workers: int | None = setting(
        None,
        "processes that load images; 0: the training process itself; None: from the cores",
        at_least=0,
        affects=NOTHING,
        searchable=False,
        per_machine=True,
    )
    download: bool = setting(
        False,
        "download a data set that goes by name if it is not there",
        affects=NOTHING,
        searchable=False,
        per_machine=True,
    )
    augment: Literal["none", "crop", "rotate", "trivial", "rand"] = setting(
        "crop",
        "views of the training images: none, crop (resized crop, flip), rotate (rotation by up to 30 degrees, resized "
        "crop, flip), trivial (TrivialAugmentWide), rand (RandAugment)",
        affects=ALL,
        searchable=True,
    )
    resize: Literal["crop", "squash"] = setting(
        "crop",
        "how validation images (and training images under --augment none) become square: crop (short side to 8/7 of "
        "image_size, then the center), squash (regardless of proportions)",
        affects=ALL,
        searchable=False,
    )
    train_fraction: float = setting(
        1.0,
        "part of each class that the student's phases see, drawn by the seed",
        above=0,
        at_most=1,
        affects=STUDENT,
        searchable=True,
        not_for_streams="a stream is read as a whole; make shards of the part that is meant",
    )
    teacher_train_fraction: float = setting(
        1.0,
        "part of each class that the teacher sees",
        above=0,
        at_most=1,
        affects=TEACHER,
        searchable=False,
        not_for_streams="a stream is read as a whole; make shards of the part that is meant",
    )
    unlabeled_data: str | None = setting(
        None,
        "folder of images without classes, at any depth: the student is distilled on them too, by the teacher alone",
        affects=DISTILLED,
        searchable=True,
        not_for_streams="images of a folder can't be mixed into a stream",
    )
    unlabeled_rest: bool = setting(
        False,
        "distill on the images that --train_fraction leaves out too, without their labels",
        affects=DISTILLED,
        searchable=True,
        not_for_streams="a stream is read as a whole; make shards of the part that is meant",
    )
    views: int | None = setting(
        None,
        "views of each training image of a student: after so many epochs the same come again; None: new ones in each",
        at_least=1,
        affects=STUDENT,
        searchable=True,
    )
    augment_on: Literal["auto", "cpu", "device"] = setting(
        "auto",
        "where views are cut out, under --augment crop or rotate: cpu, device (in one sampling for the batch), or auto "
        "(on a GPU, device)",
        affects=ALL,
        searchable=False,
        per_machine=True,
        not_for_streams="views of streamed images are cut out by the workers",
        streams_allow=("cpu",),
    )
    image_cache: str = setting(
        "auto",
        "store of decoded images, which later runs read: none, a folder, or auto (the cache, where there is room)",
        affects=ALL,
        searchable=False,
        per_machine=True,
        not_for_streams="nothing of a stream is stored; leave it out",
        streams_allow=("none",),
    )
    teacher_cache: str = setting(
        "auto",
        "store of the teacher's logits, which later runs of the same views read: none, a folder, or auto",
        affects=NOTHING,
        searchable=False,
        per_machine=True,
        not_for_streams="nothing of a stream is stored; leave it out",
        streams_allow=("none",),
    )
    teacher_top: int | None = setting(
        None,
        "store so many of the teacher's logits, the largest, and spread what is left over evenly; None: all of them",
        at_least=1,
        affects=DISTILLED,
        searchable=False,
        not_for_streams="nothing of a stream is stored; leave it out",
    )
    on_bad_image: Literal["error", "skip"] = setting(
        "error",
        "what to do about an image that can't be decoded: error, naming it, or skip, and count it",
        affects=NOTHING,
        searchable=False,
    )
    mixup: float = setting(
        0.0,
        "mixup of the student's images: alpha of its Beta distribution; 0: none",
        at_least=0,
        affects=STUDENT,
        searchable=True,
    )
    cutmix: float = setting(
        0.0,
        "CutMix of the student's images: alpha of its Beta distribution; 0: none",
        at_least=0,
        affects=STUDENT,
        searchable=True,
    )


@dataclass(frozen=True)
class ModelSettings:
    """The networks. ``kd models`` lists the names."""

    teacher_model: tuple[str, ...] = setting(
        ("densenet121",),
        "torchvision's name, timm/NAME, simple, convnet(widths=[16,32]), ..., or path/to/file.py:factory; several "
        "answer as one",
        affects=TEACHER,
        searchable=False,
    )
    student_model: str = setting("simple", "as for --teacher_model", affects=STUDENT, searchable=True)
    teacher_pretrained: bool = setting(
        False, "start the teacher from published weights", affects=TEACHER, searchable=False
    )
    student_pretrained: bool = setting(
        False, "start the student from published weights", affects=STUDENT, searchable=True
    )
    assistant_pretrained: bool = setting(
        False, "start the assistants from published weights", affects=NOTHING, searchable=True
    )
    teacher_checkpoint: tuple[str, ...] = setting(
        (),
        "checkpoint of the teacher to distill, or of each; none: what --train_teacher left",
        affects=DISTILLED,
        searchable=False,
        per_machine=True,
    )
    teacher_weights: tuple[float, ...] = setting(
        (), "weights of several teachers, of any sum; none: all alike", at_least=0, affects=DISTILLED, searchable=False
    )
    teacher_average: Literal["probabilities", "logits"] = setting(
        "probabilities", "what of several teachers is averaged", affects=DISTILLED, searchable=False
    )
    teacher_image_size: tuple[int, ...] = setting(
        (),
        "side of the images that the teacher (or each) is made for, if not image_size: it sees the student's, resized",
        at_least=1,
        affects=ALL,
        searchable=False,
    )
    assistants: tuple[str, ...] = setting(
        (),
        "networks between teacher and student, from large to small: each is distilled from the one before it",
        affects=NOTHING,
        searchable=True,
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the student minimizes. Teacher and baseline minimize cross-entropy with the labels."""

    loss: tuple[str, ...] = setting(
        ("ce=0.1", "kl=0.9"),
        "terms with their weights; `kd losses` lists them; your own: path/to/file.py:function=0.9",
        affects=DISTILLED,
        searchable=True,
    )
    compare_losses: tuple[str, ...] = setting(
        (),
        'objectives to compare, each in quotes ("ce=0.1 kl=0.9" mse): the student is distilled with each of them',
        affects=NOTHING,
        searchable=False,
    )
    temperature: float | None = setting(
        None,
        "temperature of the terms that have one and do not say it; None: each loss's own",
        above=0,
        affects=DISTILLED,
        searchable=True,
    )
    label_smoothing: float = setting(
        0.0,
        "part of each label spread over all classes, for ce",
        at_least=0,
        at_most=1,
        affects=STUDENT,
        searchable=True,
    )
    teacher_label_smoothing: float = setting(
        0.0,
        "the same for the teacher's own training, where it makes a worse teacher",
        at_least=0,
        at_most=1,
        affects=TEACHER,
        searchable=False,
    )


@dataclass(frozen=True)
class OptimizationSettings:
    """How the networks are trained. A ``teacher_`` twin left at None is the student's value."""

    optimizer: Literal["sgd", "adamw"] = setting("adamw", "the optimizer", affects=ALL, searchable=True)
    learning_rate: float = setting(1e-3, "peak learning rate", above=0, affects=ALL, searchable=True)
    teacher_learning_rate: float | None = setting(
        None, "peak learning rate for the teacher", above=0, affects=TEACHER, searchable=False
    )
    momentum: float = setting(
        0.9, "sgd's momentum; adamw's first beta", at_least=0, below=1, affects=ALL, searchable=True
    )
    weight_decay: float = setting(
        0.01, "weight decay of all but biases and normalization layers", at_least=0, affects=ALL, searchable=True
    )
    schedule: Literal["cosine", "constant"] = setting(
        "cosine", "learning rate after the warm-up: to zero, or constant", affects=ALL, searchable=True
    )
    warmup_epochs: float = setting(
        0.0, "epochs over which the learning rate rises from zero", at_least=0, affects=ALL, searchable=True
    )
    max_epochs: int = setting(20, "epochs", at_least=1, affects=ALL, searchable=True)
    teacher_epochs: int | None = setting(None, "epochs for the teacher", at_least=1, affects=TEACHER, searchable=False)
    max_steps: int | None = setting(
        None, "end after this many optimizer steps, if that is sooner", at_least=1, affects=STUDENT, searchable=True
    )
    teacher_steps: int | None = setting(
        None, "the same for the teacher; None: no such end", at_least=1, affects=TEACHER, searchable=False
    )
    ema: float | None = setting(
        None,
        "decay of a moving average of the student's weights, such as 0.999: it is measured and saved",
        above=0,
        below=1,
        affects=STUDENT,
        searchable=True,
    )
    gradient_clip: float | None = setting(None, "largest norm of the gradient", above=0, affects=ALL, searchable=True)
    accumulate: int = setting(
        1, "batches whose gradients are summed before a step", at_least=1, affects=ALL, searchable=True
    )


@dataclass(frozen=True)
class MachineSettings:
    """Where it runs, through Lightning, and what it leaves."""

    accelerator: str = setting(
        "auto",
        "auto (a GPU if there is one), cpu, gpu, ...: as Lightning has it",
        affects=NOTHING,
        searchable=False,
        per_machine=True,
    )
    devices: str = setting(
        "auto",
        "how many devices (2), or which ('0,1', or '1,' for the second alone)",
        affects=ALL,
        searchable=False,
        per_machine=True,
    )
    num_nodes: int = setting(1, "machines", at_least=1, affects=ALL, searchable=False, per_machine=True)
    strategy: str = setting(
        "auto", "auto, ddp, fsdp, ...: as Lightning has it", affects=NOTHING, searchable=False, per_machine=True
    )
    precision: str = setting(
        "auto",
        "auto (for each network what is fastest here at the same accuracy), or as Lightning has it",
        affects=ALL,
        searchable=False,
    )
    channels_last: Literal["auto", "true", "false"] = setting(
        "auto",
        "whether the channels of a pixel lie beside each other in memory; auto: where it is faster",
        affects=ALL,
        searchable=False,
        per_machine=True,
    )
    compile: bool = setting(
        False,
        "compile the networks (torch.compile): a minute at the start of each phase; without a compiler, go on as is",
        affects=ALL,
        searchable=False,
        per_machine=True,
    )
    default_root_dir: str = setting(
        "logs", "folder of all experiments", affects=NOTHING, searchable=False, per_machine=True
    )
    checkpoint_every: int | None = setting(
        None,
        "steps after which a checkpoint to resume from is written; None: at the ends of epochs, at most twice a minute",
        at_least=1,
        affects=NOTHING,
        searchable=False,
        per_machine=True,
    )
    fast_dev_run: bool = setting(
        False,
        "one batch of everything, to see whether it runs; leaves no files",
        affects=NOTHING,
        searchable=False,
        per_machine=True,
    )
    limit_train_batches: int | float = setting(
        1.0, "batches of an epoch: a number, or a part such as 0.1", above=0, affects=ALL, searchable=False
    )
    limit_val_batches: int | float = setting(
        1.0, "batches of a validation: a number, or a part", above=0, affects=ALL, searchable=False
    )


@dataclass(frozen=True)
class SourceSettings:
    """Where flags come from besides the command line: defaults < args_file < config < command line."""

    args_file: str = setting(
        "commandline_args.txt", "text file of flags; the default one may be missing", affects=NOTHING, searchable=False
    )
    config: tuple[str, ...] = setting((), "YAML files of settings; a later one wins", affects=NOTHING, searchable=False)


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
        """Return every setting but the sources under its name: plain strings, numbers, booleans, lists and None."""
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
        for one in dataclasses.fields(getattr(defaults, section.name)):
            yield section.name, one


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


_LARGEST = 2**63 - 1
"""What a counter of torch's holds."""

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "at least": operator.ge,
    "at most": operator.le,
    "below": operator.lt,
}


def check_ranges(settings: Settings, names: frozenset[str], *, origin: str) -> None:
    """Refuse values out of their range.

    Args:
        settings: The settings.
        names: The settings to look at: those that one source gave.
        origin: That source, for the message.

    Raises:
        UserError: If a value is out of its range.
    """
    for section, one in setting_fields():
        given = getattr(getattr(settings, section), one.name)
        for value in given if isinstance(given, tuple) else (given,):
            if one.name not in names or isinstance(value, str | bool) or value is None:
                continue
            wrong = [
                f"{words} {bound}"
                for words, bound in one.metadata["bounds"].items()
                if bound is not None and not _HOLDS[words](value, bound)
            ]
            if isinstance(value, float) and not math.isfinite(value):
                wrong = ["finite"]
            elif isinstance(value, int) and abs(value) > _LARGEST:
                wrong = [f"at most {_LARGEST}"]
            if wrong:
                raise UserError(f"{origin}: --{one.name} must be {' and '.join(wrong)}, and is {value}")


def markdown_table() -> str:
    """Return all settings as a Markdown table, as it stands in the README."""
    lines = ["| flag | default | what it is |", "|---|---|---|"]
    section_before = None
    for section, one in setting_fields():
        if section != section_before:
            lines.append(f"| **{section}** | | |")
            section_before = section
        default = " ".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
        words = one.metadata["help"].replace("|", "\\|")
        lines.append(f"| `--{one.name}` | {'' if default in ('', None) else f'`{default}`'} | {words} |")
    return "\n".join(lines)
