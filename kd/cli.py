"""The commands. Heavy packages are imported only after the flags were checked."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from kd.console import make_console
from kd.errors import DamagedFile, Interrupted, LostContact, UserError, describe_environment_error
from kd.files import write_json
from kd.settings import CONFIG_FILE, Resolved, resolve, with_origin

_MEASURES = {
    "mAP": "map",
    "micro F1": "micro_f1",
    "accuracy": "accuracy",
    "balanced accuracy": "balanced_accuracy",
    "macro F1": "macro_f1",
    "AUROC": "auroc",
    "most frequent class": "constant",
    "top-5 accuracy": "top5",
}
"""Metrics of kd evaluate by their titles."""

_WORST = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``kd COMMAND``; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["experiment"]:
        return experiment(arguments[1:], prog="kd experiment")
    if arguments[:1] == ["check"]:
        return _exit_status_of(lambda: _run_check(arguments[1:]))
    if arguments[:1] == ["predict"]:
        # It has its own parser, as it runs without the packages for training.
        from kd.deploy.prediction import main as predict

        return predict(arguments[1:])
    return _exit_status_of(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {
                "experiment": _experiment,
                "check": _check,
                "evaluate": _evaluate,
                "export": _export,
                "predict": _predict,
                "sweep": _sweep,
                "report": _report,
                "diff": _diff,
                "cache": _cache,
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
    return _exit_status_of(lambda: _run_experiment(arguments, prog=prog))


def _run_experiment(arguments: Sequence[str], *, prog: str) -> None:
    resolved, console = resolve(arguments, prog=prog), make_console()

    from kd.api import run
    from kd.report import gain_sentence, print_summary

    with _origins_in_errors(resolved, console):
        done, summary = run(resolved.settings, console)
    if not done.is_global_zero:
        return
    print_summary(summary, make_console())
    if not done.kept:
        console.print("--fast_dev_run: one batch of everything; the figures mean nothing, and no files were written.")
        return
    files = [done.folder / name for name in ("report.html", "summary.json", CONFIG_FILE)]
    console.print(f"\nFiles in {done.folder}:")
    for file in [*files, *_best_checkpoint(done.runs)]:
        console.print(f"  {file.relative_to(done.folder) if file.is_relative_to(done.folder) else file}")
    console.print("All checkpoints: PHASE/version_N/checkpoints")
    command = "uv run tensorboard" if "UV" in os.environ else "tensorboard"
    console.print(f"TensorBoard: {command} --logdir {done.folder}")
    console.print(f"\n{gain_sentence(summary)}".rstrip())


def _best_checkpoint(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Return the checkpoint of the most accurate student, or else teacher; empty if none was saved."""
    from kd.report import best_score_of

    for kind in ("distilled", "compared", "baseline", "teacher"):
        saved = [run for phase in runs if phase.startswith(kind) for run in runs[phase] if run["checkpoint"]]
        if saved:
            return [Path(max(saved, key=best_score_of)["checkpoint"])]
    return []


@contextlib.contextmanager
def _origins_in_errors(resolved: Resolved, console: Console) -> Iterator[None]:
    """Print the remarks on the sources; add to an error where the flag that it names was given."""
    for remark in resolved.remarks:
        console.print(remark)
    try:
        yield
    except UserError as error:
        raise type(error)(with_origin(str(error), resolved.origins)) from error


def _experiment() -> None:
    """Train teacher, baseline and distilled student; the same as experiment.py, with its flags."""


def _run_check(arguments: Sequence[str]) -> None:
    resolved, console = resolve(arguments, prog="kd check"), make_console()

    from kd.pipeline import check_experiment

    with _origins_in_errors(resolved, console):
        findings = check_experiment(resolved.settings, console=console)
    warnings = sum(finding.level == "warning" for finding in findings)
    words = {0: "No problems found", 1: "1 warning"}.get(warnings, f"{warnings} warnings")
    console.print(f"{words}; experiment.py can run with these flags.")


def _check() -> None:
    """Run the checks before training, with experiment.py's flags, and train nothing."""


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
    classes: str | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    image_size: int = 224,
    multilabel: bool = False,
    accelerator: str = "auto",
    devices: str = "1",
    precision: str = "auto",
) -> None:
    """Evaluate a checkpoint, an exported file or weights of another project. Classes are matched by name.

    Args:
        checkpoint: Checkpoint, such as logs/NAME/distilled/version_0/checkpoints/best.ckpt; .onnx, .safetensors, .pth,
            or a folder of the Hugging Face hub.
        dataset: imagefolder, webdataset, or a data set by name.
        data_dir: Folder of the images: one that contains val_data, or one of class folders.
        val_data: Folder of the validation images in data_dir.
        batch_size: Images per batch.
        num_workers: Data loading processes; None: from the number of cores.
        model: Network; required if the file doesn't name it, or names a Python file.
        download: Download a data set by name if it is missing.
        classes: Class names in the order of the outputs: a file, or imagenet; None: the file's, or the data's.
        mean: Mean of the pixels in [0, 1] by channel, for weights of another project; default: the architecture's.
        std: Standard deviation, likewise.
        image_size: Side of the images, in pixels, for weights of another project.
        multilabel: Several labels an image, from a table as val_data.
        accelerator: Lightning's accelerator: auto, cpu, gpu, ...
        devices: Number of devices, or their indices.
        precision: auto, or Lightning's: 32-true, bf16-mixed, ...
    """
    from kd.deploy.loading import find_checkpoint
    from kd.pipeline import evaluate_checkpoint
    from kd.report.measures import Predictions, measure
    from kd.teachers import Foreign
    from kd.training import Hardware

    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "predictions.npz"
        evaluate_checkpoint(
            str(find_checkpoint(Path(checkpoint).expanduser())),
            dataset=dataset,
            data_dir=data_dir,
            val_data=val_data,
            batch_size=batch_size,
            num_workers=num_workers,
            model=model,
            download=download,
            image_size=image_size,
            multilabel=multilabel,
            foreign=Foreign(classes, mean, std, prefix=""),
            hardware=Hardware(accelerator=accelerator, devices=devices, precision=precision),
            keep=keep,
            on_note=lambda note: make_console().print(f"note: {note}"),
        )
        predictions = Predictions.read(keep)
    if predictions is None:
        raise UserError(f"{checkpoint}: the predictions could not be written to {keep.parent}; free some disk space")
    measures = measure(predictions)
    table = Table(title=checkpoint, title_justify="left", show_header=False)
    table.add_row("images", f"{len(predictions):,}")
    for title, name in _MEASURES.items():
        if measures.get(name) is not None:
            table.add_row(title, f"{measures[name]:.2%}")
    table.add_row("cross-entropy", f"{measures['nll']:.4f} nats")
    table.add_row("expected calibration error", f"{measures['ece']:.2%}")
    per_class = zip(measures["per_class"], predictions.classes, strict=True)
    by_accuracy = sorted((accuracy, name) for accuracy, name in per_class if accuracy is not None)
    if len(by_accuracy) < len(predictions.classes):
        table.add_row("classes", f"{len(by_accuracy)} of the model's {len(predictions.classes)}")
    worst = ", ".join(f"{name} {accuracy:.1%}" for accuracy, name in by_accuracy[:_WORST])
    table.add_row("least accurate classes", worst)
    make_console().print(table)


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
    """Write the report of an experiment again, report.html, or one that compares several experiments.

    Args:
        folders: Folders of experiments, such as logs/NAME.
        output: Folder to write to; None: the experiment's own.
    """
    from kd.report import gain_sentence, read_summary, write_report

    paths = [Path(folder).expanduser() for folder in folders]
    if not paths:
        raise UserError("kd report: no folder given; name an experiment's, such as logs/NAME")
    page = write_report(paths, output=None if output is None else Path(output).expanduser())
    console = make_console()
    for path in paths:
        console.print(f"{path}: {gain_sentence(read_summary(path))}")
    console.print(f"Report: {page}")


def _diff(first: Annotated[str, tyro.conf.Positional], second: Annotated[str, tyro.conf.Positional], /) -> None:
    """Show what two runs depend on that differs: settings, images, teacher, code, versions and hardware.

    Args:
        first: Folder of a run, such as logs/NAME/distilled/version_0.
        second: Folder of another run.
    """
    from kd.pipeline import read_provenance
    from kd.provenance import DECISIVE, SECTIONS, UNKNOWN, as_text, differences

    (seed, earlier), (other_seed, later) = (read_provenance(Path(folder).expanduser()) for folder in (first, second))
    # Either run may have entries that the other lacks.
    both = {name: dict.fromkeys(earlier.get(name, ()), UNKNOWN) | later.get(name, {}) for name in SECTIONS}
    found = differences(earlier, both, SECTIONS)
    console = make_console()
    if seed != other_seed:
        console.print(f"seed {seed} in {first}, seed {other_seed} in {second}")
    if not found:
        console.print("No differences: both runs depend on the same settings, images, teacher, code and versions.")
        return
    table = Table(title="Differences", title_justify="left")
    for heading in ("", first, second):
        table.add_column(heading, overflow="fold")
    for difference in found:
        table.add_row(difference.name, as_text(difference.earlier), as_text(difference.now))
    console.print(table)
    if any(difference.section in DECISIVE for difference in found):
        console.print("Results of these runs are not averaged or resumed as one: they depend on different things.")
    else:
        console.print("Only versions or hardware differ: the runs are comparable.")


def _cache(action: Annotated[Literal["list", "verify", "clear"], tyro.conf.Positional] = "list") -> None:
    """List, verify or clear the caches in KD_CACHE: decoded images, teachers' logits, file examinations, shard indexes.

    Args:
        action: list; verify (compare with the checksums; a damaged part is computed again when it is next read); or
            clear (remove all; data sets that were downloaded are kept).
    """
    from kd.data import cache_dir
    from kd.pipeline import cache_entries

    console, entries = make_console(), cache_entries()
    total = f"{len(entries):,} entries, {sum(entry.size for entry in entries) / 1e9:.2f} GB in {cache_dir()}"
    if action == "clear":
        for entry in entries:
            entry.remove()
        console.print(f"removed {total}")
        return
    table = Table(title=total, title_justify="left")
    for heading in ("kind", "MB", "last used", *(["parts", "damaged"] if action == "verify" else []), "entry"):
        table.add_column(heading, justify="left" if heading in ("kind", "entry") else "right", overflow="fold")
    for entry in entries:
        verified = map(str, entry.verify() if action == "verify" else ())
        last_used = f"{datetime.fromtimestamp(entry.last_used):%Y-%m-%d %H:%M}"  # noqa: DTZ006 (the user's time zone)
        table.add_row(entry.kind, f"{entry.size / 1e6:,.1f}", last_used, *verified, entry.path.name)
    console.print(table)


def _tensorboard(
    folder: Annotated[str, tyro.conf.Positional] = "logs", *, host: str = "localhost", port: int = 6006
) -> None:
    """Start TensorBoard for one experiment, or for all of them.

    Args:
        folder: Folder of an experiment, such as logs/NAME, or of all.
        host: Address to listen on: localhost for this machine only, 0.0.0.0 for the whole network.
        port: Port to listen on.
    """
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"{folder}: no such folder")
    flags = ["--logdir", str(Path(folder).expanduser()), "--host", host, "--port", str(port)]
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run([sys.executable, "-m", "tensorboard.main", *flags], check=False)  # noqa: S603 (its own)


def _predict() -> None:
    """Classify images with a checkpoint or an exported file; kd predict --help lists its flags."""


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
    """Export a student with a model card, and verify the exported file against the checkpoint.

    Args:
        checkpoint: Checkpoint, such as logs/NAME/distilled/version_0/checkpoints/best.ckpt, or an experiment's folder.
        output: File to write, ending in .onnx, .pt2 (torch) or .safetensors.
        format: onnx, torch (torch.export), or safetensors (weights only).
        quantize: int8 also writes NAME.int8.onnx, calibrated on training images.
        dataset: Data set for verification and calibration; None: the one that the student was trained on.
        data_dir: Folder of its images; None: as in training.
        val_data: Folder of the validation images in data_dir; None: as in training.
        model: Network; required if the checkpoint names a Python file.
    """
    from kd.deploy.card import write_card
    from kd.deploy.export import export_student, load_checkpoint_splits
    from kd.deploy.loading import find_checkpoint

    path, console, splits = find_checkpoint(Path(checkpoint).expanduser()), make_console(), None
    try:
        splits = load_checkpoint_splits(path, dataset=dataset, data_dir=data_dir, val_data=val_data)
    except UserError as error:
        is_needed = any((dataset, data_dir, val_data)) or quantize == "int8"
        if is_needed or isinstance(error, DamagedFile) or not path.is_file():
            raise
        console.print(f"note: verified on random images, as the validation images can't be read: {error}")
    exported = export_student(path, output, file_format=format, splits=splits, quantize=quantize == "int8", model=model)
    card = write_card(exported, path)
    kind, recorded = "random" if splits is None else "validation", exported[0].metadata["val_acc"]
    table = Table(title=f"{path}, verified on {exported[0].images:,} {kind} images", title_justify="left")
    for heading in ("file", "MB", "accuracy", "agreement", "max logit difference"):
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    table.add_row("(checkpoint)", "", "" if recorded is None else f"{recorded:.2%}", "", "")
    for file in exported:
        table.add_row(
            file.path.name,
            f"{file.megabytes:.2f}",
            "not measured" if file.accuracy is None else f"{file.accuracy:.2%}",
            f"{file.agreement:.2%}",
            f"{file.difference:.1e}",
        )
    console.print(table)
    console.print(f"Model card: {card}")


def _shard(
    data_dir: Annotated[str, tyro.conf.Positional],
    output: Annotated[str, tyro.conf.Positional],
    *,
    per_shard: int = 1000,
    seed: int = 0,
    train_data: str = "train",
    val_data: str = "val",
) -> None:
    """Write an image folder as sharded archives, for --dataset webdataset.

    Args:
        data_dir: Folder of the images, which contains train_data and val_data.
        output: Folder to write: train/000000.tar, ..., val/000000.tar, ..., classes.txt and index.json.
        per_shard: Images per archive.
        seed: Random seed of the order of the images.
        train_data: Folder of the training images in data_dir.
        val_data: Folder of the validation images in data_dir.
    """
    from rich.progress import Progress

    from kd.data import Layout, read_splits, write_shards

    splits = read_splits(data_dir, Layout(train_data=train_data, val_data=val_data))
    console = make_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Writing shards", total=None)
        counts = write_shards(
            splits,
            Path(output).expanduser(),
            per_shard=per_shard,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    shards = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
    console.print(f"{len(splits.train) + len(splits.val):,} images written; number of shards: {shards}")
    console.print(f"Train with: experiment.py --dataset webdataset --data_dir {output}")


def _models(
    *,
    timm: bool = False,
    measure: tuple[str, ...] | None = None,
    num_classes: int = 1000,
    image_size: int | None = None,
    output: str | None = None,
) -> None:
    """List the networks by name with their parameters, or measure size and speed of some.

    Args:
        timm: List those of timm, too (timm/NAME), without their parameters.
        measure: Networks to measure on this machine: size, multiply-adds, speed; without a name, a classic selection.
        num_classes: Number of classes of the measured networks.
        image_size: Side of the input images, in pixels; None: each network's default.
        output: JSON file for the measurements.
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
    console = make_console()
    console.print(table)
    console.print("Also timm/NAME (kd models --timm), and your own: path/to/file.py:function")


def _measure(names: tuple[str, ...], *, num_classes: int, image_size: int | None, output: str | None) -> None:
    from rich.progress import Progress

    from kd.models import CLASSIC, measure_cost_by_name
    from kd.report import print_costs

    console = make_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        networks = progress.track(names or CLASSIC, description="Measuring")
        rows = [measure_cost_by_name(name, num_classes=num_classes, image_size=image_size) for name in networks]
    print_costs(rows, Console())
    if output is not None:
        write_json(Path(output).expanduser(), rows)
        console.print(f"Written: {output}")


def _losses(*, names: bool = False) -> None:
    """List the losses: name, formula, hyperparameters and source.

    Args:
        names: Print only the names, one per line.
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
        table.add_row(name, loss.formula, hyperparameters_of(loss), loss.source)
    console = make_console()
    console.print(table)
    console.print("Also your own: path/to/file.py:function")


def _exit_status_of(command: Callable[[], object]) -> int:
    """Run a command; a user's mistake is a message on standard error and status 2, anything else a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal can't show are replaced.
            stream.reconfigure(errors="replace")
    try:
        command()
    except Interrupted as stopped:
        _print_error(f"{stopped}\n{stopped.advice}")
        return 128 + stopped.received
    except UserError as error:
        # An error in a data loading worker is preceded by the worker's traceback.
        message = str(error).rpartition("kd.errors.UserError: ")[2].strip()
        _print_error(f"error: {message}", on_every_process=isinstance(error, LostContact))
        return 2
    except OSError as error:
        if (problem := describe_environment_error(error)) is None:
            raise
        _print_error(f"error: {problem}")
        return 2
    return 0


def _print_error(message: str, *, on_every_process: bool = False) -> None:
    """Print a message on standard error, by default once per machine."""
    console = make_console(stderr=True)
    # A variable that was left behind without a launcher's others doesn't count.
    is_launched = {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    console.quiet = not on_every_process and is_launched and os.environ["LOCAL_RANK"] != "0"
    console.print(message)
