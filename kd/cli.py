"""The commands. Nothing heavy is imported before the flags are known to be right."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.errors import Interrupted, LostContact, UserError
from kd.settings import Resolved, resolve, with_origin

_WORST = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``kd COMMAND``; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["experiment"]:
        return experiment(arguments[1:], prog="kd experiment")
    if arguments[:1] == ["check"]:
        return _answering_for_mistakes(lambda: _run_check(arguments[1:]))
    if arguments[:1] == ["predict"]:
        # Its parser is its own, as it runs without the packages of training, too.
        from kd.deploy.prediction import main as predict

        return predict(arguments[1:])
    return _answering_for_mistakes(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {
                "experiment": _experiment,
                "check": _check,
                "evaluate": _evaluate,
                "export": _export,
                "predict": _predict,
                "sweep": _sweep,
                "report": _report,
                "tensorboard": _tensorboard,
                "shard": _shard,
                "models": _models,
                "losses": _losses,
            },
            prog="kd",
            description="Knowledge distillation of image classifiers.",
            args=arguments,
            use_underscores=True,
        )
    )


def experiment(arguments: Sequence[str] | None = None, *, prog: str = "experiment.py") -> int:
    """Run ``experiment.py``; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return _answering_for_mistakes(lambda: _run_experiment(arguments, prog=prog))


def _run_experiment(arguments: Sequence[str], *, prog: str) -> None:
    resolved, console = resolve(arguments, prog=prog), Console()

    from kd.pipeline import measure_costs, run_experiment
    from kd.report import gain_sentence, print_summary, summarize, write_report, write_summary

    with _naming_sources(resolved, console):
        done = run_experiment(resolved.settings, console=console)
    if not done.is_global_zero:
        return
    costs = measure_costs(done) if done.kept else {}
    summary = summarize(done.runs, data=done.data, folder=done.folder, costs=costs)
    path = write_summary(summary, done.folder) if done.kept else None
    page = write_report([done.folder]) if done.kept else None
    print_summary(summary, console)
    if path is None or page is None:
        remark = "--fast_dev_run: one batch of everything; these figures mean nothing, and no files were left."
        console.print(remark, highlight=False, soft_wrap=True, markup=False)
        return
    console.print(f"\nFiles in {done.folder}:", highlight=False, soft_wrap=True, markup=False)
    checkpoints = [Path(run["checkpoint"]) for runs in done.runs.values() for run in runs if run["checkpoint"]]
    for file in [page, path, done.folder / "config.yaml", *checkpoints]:
        shown = file.relative_to(done.folder) if file.is_relative_to(done.folder) else file
        console.print(f"  {shown}", highlight=False, soft_wrap=True, markup=False)
    with_uv = "uv run " if "UV" in os.environ else ""
    console.print(
        f"TensorBoard: {with_uv}tensorboard --logdir {done.folder}", highlight=False, soft_wrap=True, markup=False
    )
    console.print(f"\n{gain_sentence(summary)}".rstrip(), highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def _naming_sources(resolved: Resolved, console: Console) -> Iterator[None]:
    """Say what a person should know of the sources; an error inside the block names the one that it came from."""
    for remark in resolved.remarks:
        console.print(remark, highlight=False, soft_wrap=True, markup=False)
    try:
        yield
    except UserError as error:
        raise type(error)(with_origin(str(error), resolved.origins)) from error


def _experiment() -> None:
    """Train a teacher, a student alone and a distilled student: the same as experiment.py, with its flags."""


def _run_check(arguments: Sequence[str]) -> None:
    resolved, console = resolve(arguments, prog="kd check"), Console()

    from kd.pipeline import check_experiment

    with _naming_sources(resolved, console):
        found = check_experiment(resolved.settings, console=console)
    warnings = sum(one.level == "warning" for one in found)
    words = {0: "Nothing stands in the way", 1: "There is a warning"}.get(warnings, f"There are {warnings} warnings")
    console.print(f"{words}; experiment.py with the same flags runs.", highlight=False, soft_wrap=True)


def _check() -> None:
    """Look at everything that can be wrong before training, with experiment.py's flags, and train nothing."""


def _evaluate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    dataset: str = "imagefolder",
    data_dir: str | None = None,
    val_data: str = "val",
    batch_size: int = 64,
    num_workers: int | None = None,
    model: str | None = None,
    download: bool = False,
    accelerator: str = "auto",
    devices: str = "1",
    precision: str = "auto",
) -> None:
    """Measure a teacher or a student, in a checkpoint or an exported file. Classes are matched by name.

    Args:
        checkpoint: The checkpoint, such as logs/NAME/distilled/version_0/checkpoints/best.ckpt, or an exported file.
        dataset: imagefolder, webdataset, or a data set by name.
        data_dir: Folder of the images: one that holds val_data, or one of class folders.
        val_data: Folder of the validation images, within data_dir.
        batch_size: Images in a batch.
        num_workers: Processes that load images; None: from the cores.
        model: The network; needed where the checkpoint names a Python file.
        download: Download a data set that goes by name if it is not there.
        accelerator: auto, cpu, gpu, ...: as Lightning has it.
        devices: How many devices, or which.
        precision: auto, or as Lightning has it.
    """
    from kd.data import validation_images
    from kd.deploy import FORMATS
    from kd.deploy.export import answer_images
    from kd.pipeline import evaluate_checkpoint
    from kd.report.measures import Predictions, measure
    from kd.training import Hardware

    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "predictions.npz"
        if Path(checkpoint).suffix in FORMATS.values():
            images = validation_images(dataset, data_dir, val_data, download=download)
            answer_images(checkpoint, images, keep=keep, model=model)
        else:
            evaluate_checkpoint(
                checkpoint,
                dataset=dataset,
                data_dir=data_dir,
                val_data=val_data,
                batch_size=batch_size,
                num_workers=num_workers,
                model=model,
                download=download,
                hardware=Hardware(accelerator=accelerator, devices=devices, precision=precision),
                keep=keep,
            )
        predictions = Predictions.read(keep)
    if predictions is None:
        raise UserError(f"{checkpoint}: what it said of the images could not be kept")
    known = measure(predictions)
    table = Table(title=escape(checkpoint), title_justify="left", show_header=False)
    table.add_row("images", f"{len(predictions):,}")
    table.add_row("accuracy", f"{known['accuracy']:.2%}")
    if known["top5"] is not None:
        table.add_row("right within five", f"{known['top5']:.2%}")
    table.add_row("cross-entropy", f"{known['nll']:.4f} nats")
    table.add_row("expected calibration error", f"{known['ece']:.2%}")
    by_class = [
        (one, name) for one, name in zip(known["per_class"], predictions.classes, strict=True) if one is not None
    ]
    if len(by_class) < len(predictions.classes):
        table.add_row("classes", f"{len(by_class)} of the {len(predictions.classes)} that it knows")
    worst = ", ".join(f"{name} {one:.1%}" for one, name in sorted(by_class)[:_WORST])
    table.add_row("worst classes", escape(worst))
    Console().print(table)


def _sweep(config: Annotated[str, tyro.conf.Positional], *, storage: str | None = None, workers: int = 1) -> None:
    """Search hyperparameters with Optuna: many distillations from one teacher, and the best of them.

    Called again, it continues until enough trials are finished. Called several times at once, on one machine or, with
    --storage and a shared --default_root_dir, on many, each call is a worker of the same sweep.

    Args:
        config: YAML file of settings, as for --config, with a key sweep that lists what is searched.
        storage: URL of a database that the workers share, such as postgresql://user@host/name, or path of a journal
            file; None: an SQLite file in the sweep's folder. optuna-dashboard shows its trials.
        workers: Number of workers to start.
    """
    from kd.sweep import run_sweep

    run_sweep(Path(config).expanduser(), storage=storage, workers=workers)


def _report(folders: Annotated[tuple[str, ...], tyro.conf.Positional], *, output: str | None = None) -> None:
    """Make the page of an experiment again, report.html, or one that compares several.

    Args:
        folders: Folders of experiments, such as logs/NAME.
        output: Folder to write to; None: the experiment's own.
    """
    from kd.report import gain_sentence, read_summary, write_report

    places = [Path(folder).expanduser() for folder in folders]
    if not places:
        raise UserError("kd report: name the folder of an experiment")
    page = write_report(places, output=None if output is None else Path(output).expanduser())
    console = Console()
    for place in places:
        console.print(f"{place}: {gain_sentence(read_summary(place))}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True, markup=False)


def _tensorboard(
    folder: Annotated[str, tyro.conf.Positional] = "logs", *, host: str = "localhost", port: int = 6006
) -> None:
    """Open TensorBoard on an experiment, or on all of them.

    Args:
        folder: An experiment's folder, such as logs/NAME, or that of all.
        host: Who may look: localhost, this machine alone; 0.0.0.0: the whole network.
        port: The port.
    """
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"{folder}: there is no such folder")
    place = ["--logdir", str(Path(folder).expanduser()), "--host", host, "--port", str(port)]
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run([sys.executable, "-m", "tensorboard.main", *place], check=False)  # noqa: S603 (its own)


def _predict() -> None:
    """Say what a student makes of images, with a checkpoint or an exported file: kd predict --help has its flags."""


def _export(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    output: str,
    format: Literal["onnx", "torch", "safetensors"] = "onnx",  # noqa: A002 (the flag's name)
    quantize: Literal["none", "int8"] = "none",
    dataset: str | None = None,
    data_dir: str | None = None,
    val_data: str | None = None,
    model: str | None = None,
) -> None:
    """Write a student into a file that runs elsewhere, with a model card, and compare it with its checkpoint.

    Args:
        checkpoint: The checkpoint, such as logs/NAME/distilled/version_0/checkpoints/best.ckpt.
        output: The file to write; it ends in .onnx, .pt2 (torch) or .safetensors.
        format: onnx, torch (torch.export), or safetensors (weights alone).
        quantize: int8 writes NAME.int8.onnx besides, calibrated on training images.
        dataset: The data set to compare and to calibrate on; None: the one that it was trained on.
        data_dir: Folder of its images; None: as it was trained on.
        val_data: Folder of the validation images, within data_dir; None: as it was trained on.
        model: The network; needed where the checkpoint names a Python file.
    """
    from kd.deploy.card import facts_of, write_card
    from kd.deploy.export import export_student, splits_of

    path = Path(checkpoint).expanduser()
    exported = export_student(
        path,
        output,
        file_format=format,
        splits=splits_of(path, dataset=dataset, data_dir=data_dir, val_data=val_data),
        quantize=None if quantize == "none" else quantize,
        model=model,
    )
    card = write_card(exported, facts_of(path))
    table = Table(title=escape(f"{checkpoint}, on {exported[0].images:,} validation images"), title_justify="left")
    for heading in ("file", "MB", "accuracy", "decides alike", "largest difference of a logit"):
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    table.add_row("(the checkpoint)", "", f"{exported[0].checkpoint_accuracy:.2%}", "", "")
    for one in exported:
        table.add_row(
            escape(one.path.name),
            f"{one.megabytes:.2f}",
            f"{one.accuracy:.2%}",
            f"{one.agreement:.2%}",
            f"{one.difference:.1e}",
        )
    console = Console()
    console.print(table)
    console.print(f"Model card: {card}", highlight=False, soft_wrap=True, markup=False)


def _shard(
    data_dir: Annotated[str, tyro.conf.Positional],
    output: Annotated[str, tyro.conf.Positional],
    *,
    per_shard: int = 1000,
    seed: int = 0,
    train_data: str = "train",
    val_data: str = "val",
) -> None:
    """Write an image folder into sharded archives, which --dataset webdataset streams.

    Args:
        data_dir: Folder that holds the images, in train_data and val_data.
        output: The folder to write: train/000000.tar, ..., val/000000.tar, ..., classes.txt and index.json.
        per_shard: Images in an archive.
        seed: What the order of the images hangs on.
        train_data: Folder of the training images, within data_dir.
        val_data: Folder of the validation images, within data_dir.
    """
    from rich.progress import Progress

    from kd.data import read_splits, write_shards

    splits = read_splits(data_dir, train_data=train_data, val_data=val_data)
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Writing shards", total=None)
        made = write_shards(
            splits,
            Path(output).expanduser(),
            per_shard=per_shard,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    words = " and ".join(f"{count:,} of {name}" for name, count in made.items())
    text = f"{len(splits.train) + len(splits.val):,} images are in shards, {words}: experiment.py --dataset webdataset"
    console.print(f"{text} --data_dir {output}", highlight=False, soft_wrap=True, markup=False)


def _models(
    *,
    timm: bool = False,
    measure: tuple[str, ...] | None = None,
    num_classes: int = 1000,
    image_size: int | None = None,
    output: str | None = None,
) -> None:
    """List the networks that go by name, with their parameters, or measure what some cost to run.

    Args:
        timm: List timm's too (timm/NAME), without their parameters.
        measure: Measure these on this machine: size, multiply-adds, speed; without a name those of the classic table.
        num_classes: Classes of the networks that are measured.
        image_size: Side of the images that they are measured with, in pixels; None: that which each was made for.
        output: JSON file for what was measured.
    """
    if measure is not None:
        _measure(measure, num_classes=num_classes, image_size=image_size, output=output)
        return

    from kd.models import parameters_by_name

    table = Table(title="Networks (parameters with 1,000 classes)", title_justify="left")
    table.add_column("name")
    table.add_column("from")
    table.add_column("parameters", justify="right")
    for name, origin, parameters in parameters_by_name(with_timm=timm):
        table.add_row(name, origin, "" if parameters is None else f"{parameters:,}")
    console = Console()
    console.print(table)
    console.print("Also timm/NAME (kd models --timm), and your own: path/to/file.py:factory", highlight=False)


def _measure(names: tuple[str, ...], *, num_classes: int, image_size: int | None, output: str | None) -> None:
    from rich.progress import Progress

    from kd.models import CLASSIC, measure_cost_by_name
    from kd.report import print_costs

    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        networks = progress.track(names or CLASSIC, description="Measuring")
        rows = [measure_cost_by_name(name, num_classes=num_classes, image_size=image_size) for name in networks]
    print_costs(rows, console)
    if output is not None:
        Path(output).expanduser().write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written: {output}", highlight=False, soft_wrap=True, markup=False)


def _losses(*, names: bool = False) -> None:
    """List the losses: name, formula, hyperparameters and paper.

    Args:
        names: The names alone, one a line.
    """
    from kd.losses import LOSSES, hyperparameters_of

    if names:
        print("\n".join(LOSSES))  # noqa: T201 (for other programs to read)
        return
    table = Table(
        title="Losses (z: the student's logits, v: the teacher's, y: labels; F, f: features, G, g: the teacher's)",
        title_justify="left",
    )
    for heading in ("name", "formula", "hyperparameters", "source"):
        table.add_column(heading)
    for name, loss in LOSSES.items():
        table.add_row(name, *map(escape, (loss.formula, hyperparameters_of(loss), loss.source)))
    console = Console()
    console.print(table)
    console.print("And your own: path/to/file.py:function", highlight=False)


def _answering_for_mistakes(command: Callable[[], object]) -> int:
    """Run a command; a person's mistake is a message on standard error and status 2, anything else a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a sign shows another in its place.
            stream.reconfigure(errors="replace")
    try:
        command()
    except Interrupted as stopped:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            words = f"{stopped}\n{stopped.advice}"
            Console(stderr=True).print(words, highlight=False, soft_wrap=True, markup=False)
        return 128 + stopped.received
    except UserError as error:
        # What a data loading worker raised comes with the worker's traceback before it.
        message = str(error).rpartition("kd.errors.UserError: ")[2].strip()
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, LostContact):
            Console(stderr=True).print(f"error: {message}", highlight=False, soft_wrap=True, markup=False)
        return 2
    return 0
