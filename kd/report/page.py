"""``report.html``: verdict, tables and figures on one page without external resources; also as Markdown."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from kd.errors import UserError
from kd.files import write_text
from kd.provenance import SECTIONS, as_text
from kd.report import figures
from kd.report.examples import example_pictures
from kd.report.figures import Picture
from kd.report.summary import comparison_note, read_summary, title_of, validation_images
from kd.report.tables import (
    gain_in_points,
    leads,
    mean_of,
    measured_with,
    objective_cells,
    objective_headings,
    objectives_caption,
    score_cell,
    share,
    sizes,
)
from kd.report.verdict import gain_of, gain_sentence, significance

PICTURES = "figures"
"""Folder of the figures beside a page."""
_MAX_CURVES = 6
"""Largest number of objectives with distinguishable curves."""
_MAX_CLASSES = 50
"""Largest number of classes with a row each."""
_EVENTS = "report"
"""Name of the report among the runs in TensorBoard."""


class Table(NamedTuple):
    """A table of the page; a row's first cell is a pair of a name and a second line below it."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str


def write_report(folders: Sequence[Path], *, output: Path | None = None) -> Path:
    """Write the page, its Markdown version and the figures of one experiment, or of several to compare.

    The report of a single experiment is also written for TensorBoard.

    Args:
        folders: The experiments' folders, each with a ``summary.json``.
        output: Folder to write to; ``None``: the only experiment's.

    Returns:
        The page.

    Raises:
        UserError: If a summary is missing, or the folder can't be written to.
    """
    several = len(folders) > 1
    if output is None:
        if several:
            raise UserError("--output: missing; name a folder for the report on several experiments")
        output = folders[0]
    experiments = [_experiment(folder, several=several) for folder in folders]
    title = f"{len(folders)} experiments" if several else experiments[0]["name"]
    note = comparison_note([experiment["validation"] for experiment in experiments])
    try:
        for experiment in experiments:
            experiment["pictures"] = place(experiment["pictures"], output)
        page = render("report", output, title=title, note=note, experiments=experiments)
        if output == folders[0]:
            _write_events(output, experiments[0]["pictures"])
    except OSError as error:
        raise UserError(f"{output}: can't write the report: {error}") from None
    return page


def place(pictures: Sequence[Picture], output: Path) -> list[dict[str, Any]]:
    """Write figures as PNG beside the page, and return their values for the templates."""
    (output / PICTURES).mkdir(parents=True, exist_ok=True)
    placed = []
    for picture in pictures:
        png = f"{PICTURES}/{picture.name}.png"
        picture.figure.savefig(output / png, dpi=150, facecolor="white")
        # The layout, half of the work, is the same for both.
        picture.figure.set_layout_engine("none")
        svg = Markup(picture.svg())  # noqa: S704 (matplotlib escapes all text)
        placed.append(vars(picture) | {"svg": svg, "png": png})
    return placed


def render(name: str, output: Path, **values: Any) -> Path:
    """Write a page and its Markdown version from their templates; return the page."""
    jinja = Environment(
        loader=PackageLoader("kd.report"),
        # Names of classes, files and experiments are untrusted text.
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Text must neither end a cell of a Markdown table nor be HTML.
    jinja.filters["plain"] = lambda value: str(value).replace("|", "\\|").replace("<", "&lt;")
    for suffix in ("md", "html"):
        write_text(output / f"{name}.{suffix}", jinja.get_template(f"{name}.{suffix}.j2").render(values))
    return output / f"{name}.html"


def _write_events(folder: Path, pictures: Sequence[Mapping[str, Any]]) -> None:
    """Write the report for TensorBoard: its text for the TEXT tab, its figures for IMAGES."""
    shutil.rmtree(folder / _EVENTS, ignore_errors=True)
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    with SummaryWriter(str(folder / _EVENTS)) as writer:
        # TensorBoard can't show the image files that the Markdown links to.
        writer.add_text(_EVENTS, "\n".join(line for line in lines if not line.startswith("![")))
        for picture in pictures:
            with Image.open(folder / picture["png"]) as image:
                pixels = np.asarray(image.convert("RGB"))
            writer.add_image(f"{_EVENTS}/{picture['name']}", pixels, dataformats="HWC")


def _experiment(folder: Path, *, several: bool) -> dict[str, Any]:
    """Return the values of an experiment for the templates."""
    summary, name = read_summary(folder), folder.absolute().name
    phases = dict(summary["phases"])
    if summary["compared"]:
        phases.setdefault("distilled", summary["compared"][0])
    config = folder / "config.yaml"
    tables = (
        _accuracies(summary),
        _uneven_metrics(summary),
        _multilabel_metrics(summary),
        _costs(phases, summary["metric"]["title"]),
        _objectives(summary),
        _classes(phases),
    )
    prefix = f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-" if several else ""
    pictures = [picture for picture in _pictures(folder, summary) if picture is not None]
    for picture in pictures:
        picture.name = prefix + picture.name
    accuracies = [
        score_cell(phases[phase]) if phase in phases else "" for phase in ("teacher", "baseline", "distilled")
    ]
    return {
        "name": name,
        "anchor": f"{prefix}experiment",
        "data": summary["data"],
        "verdict": gain_sentence(summary) or f"Results of {name}",
        "outcome": {1: "gained", -1: "lost"}.get(significance(gain_of(summary)) or 0, ""),
        "compression": _compression(phases.get("distilled", {}), summary["metric"]["title"]),
        "overview": [*accuracies, gain_in_points(gain_of(summary))],
        "tables": [table for table in tables if table],
        "pictures": pictures,
        "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        "provenance": _provenance(summary),
        "validation": validation_images(summary),
    }


def _pictures(folder: Path, summary: Mapping[str, Any]) -> list[Picture | None]:
    phases, compared = summary["phases"], summary["compared"]
    networks = {title_of(phase, phases): facts for phase, facts in phases.items()}
    histories = {
        name: [run["history"] for run in facts["runs"]]
        for name, facts in (networks | {row["objective"]: row for row in compared[:_MAX_CURVES]}).items()
        if all(run.get("history") for run in facts["runs"])
    }
    others = {row["objective"] for row in compared[1:]}
    terms = {name: runs for name, runs in histories.items() if name not in others}
    drawn = [figures.accuracy_curves(histories, summary["metric"]["name"]), figures.loss_terms(terms)]
    if compared:
        networks.setdefault("student, distilled", compared[0])
    measured = {name: facts["measured"] for name, facts in networks.items() if facts.get("measured")}
    if measured:
        # Phases are in the order of training: the last is the most relevant student.
        last, facts = list(measured.items())[-1]
        # Earlier versions didn't store the names of the classes.
        classes = facts.get("classes") or [str(number) for number in range(len(facts["per_class"]))]
        by_class = {name: each.get("average_precision") or each["per_class"] for name, each in measured.items()}
        what = "average precision" if facts.get("average_precision") else "validation accuracy"
        drawn += [
            figures.per_class_accuracy(classes, by_class, what=what),
            figures.calibration({name: each["bins"] for name, each in measured.items()}),
        ]
        if facts["confusion"] is not None:
            drawn.append(figures.confusion_matrix(classes, facts["confusion"], last))
    return [*drawn, *example_pictures(folder, summary)]


def _accuracies(summary: Mapping[str, Any]) -> Table:
    phases = summary["phases"]
    networks = [(title_of(phase, phases), facts["model"], facts) for phase, facts in phases.items()]
    networks += [("student, distilled", row["objective"], row) for row in summary["compared"]]
    rows = []
    for title, detail, facts in networks:
        measured, runs = facts.get("measured") or {}, facts["runs"]
        rows.append(
            [
                (title, detail + (f", {len(runs)} seeds" if len(runs) > 1 else "")),
                *([score_cell(facts)] if leads(summary) else []),
                share(facts["val_acc_mean"], facts["val_acc_std"]),
                mean_of(runs, "best_val_acc", "{:.2%}"),
                _percent(measured.get("top5")),
                _nats(measured.get("nll")),
                _percent(measured.get("ece")),
                _percent(measured.get("agreement")),
                _nats(measured.get("kl_to_teacher")),
                mean_of(runs, "seconds", "{:,.0f} s"),
            ]
        )
    note = (
        "Accuracy after the last and after the best epoch; top-5 accuracy; NLL: negative log-likelihood of the labels, "
        "in nats; ECE: expected calibration error over 15 bins of confidence; agreement: fraction of images for which "
        "the student predicts its teacher's class; KL to teacher: Kullback-Leibler divergence, in nats. ± is the "
        "standard deviation over the seeds."
    )
    lead = []
    if leads(summary):
        metric = summary["metric"]
        lead = [metric["title"]]
        where = (
            "of the best epoch's checkpoint on the test images" if metric["split"] == "test" else "after the last epoch"
        )
        note = f"{metric['title'][:1].upper()}{metric['title'][1:]}: {where}. {note}"
    heads = [
        "network",
        *lead,
        "last epoch",
        "best epoch",
        "top-5",
        "NLL",
        "ECE",
        "agreement",
        "KL to teacher",
        "training",
    ]
    return Table(heads, rows, note)


def _uneven_metrics(summary: Mapping[str, Any]) -> Table | None:
    phases = summary["phases"]
    networks = [(title_of(phase, phases), facts["model"], facts) for phase, facts in phases.items()]
    networks += [("student, distilled", row["objective"], row) for row in summary["compared"]]
    rows = [
        [
            (title, detail),
            *(_percent(measured.get(name)) for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc")),
        ]
        for title, detail, facts in networks
        if (measured := facts.get("measured") or {}).get("balanced_accuracy")
    ]
    if not rows:
        # Earlier versions didn't compute them.
        return None
    constant = next(
        facts["measured"]["constant"] for _, _, facts in networks if (facts.get("measured") or {}).get("constant")
    )
    note = (
        "After the last epoch. Balanced accuracy: the mean recall of the classes; macro F1: the mean of their F1 "
        "scores; AUROC: the mean area under the ROC curve of each class against the others. Always predicting the most "
        f"frequent class has an accuracy of {constant['mean']:.2%}."
    )
    return Table(["network", "accuracy", "balanced accuracy", "macro F1", "AUROC"], rows, note)


def _multilabel_metrics(summary: Mapping[str, Any]) -> Table | None:
    phases = summary["phases"]
    networks = [(title_of(phase, phases), facts["model"], facts) for phase, facts in phases.items()]
    networks += [("student, distilled", row["objective"], row) for row in summary["compared"]]
    names = ("map", "micro_f1", "macro_f1", "accuracy")
    rows = [
        [(title, detail), *(_percent(measured.get(name)) for name in names)]
        for title, detail, facts in networks
        if (measured := facts.get("measured") or {}).get("map")
    ]
    note = (
        "On the validation images, after the last epoch. mAP: mean over the classes of the average precision; F1 "
        "scores at a probability of 0.5, over all labels (micro) and as the mean of the classes (macro); exact match: "
        "the fraction of images with just the right labels, which is what accuracy means here."
    )
    return Table(["network", "mAP", "micro F1", "macro F1", "exact match"], rows, note) if rows else None


def _classes(phases: Mapping[str, Any]) -> Table | None:
    measured = [
        (phase, facts["measured"]) for phase, facts in phases.items() if (facts.get("measured") or {}).get("support")
    ]
    if not measured or len(measured[-1][1]["classes"]) > _MAX_CLASSES:
        return None
    phase, facts = measured[-1]
    heads = {"precision": "precision", "per_class": "recall", "average_precision": "average precision"}
    columns = [name for name in heads if facts.get(name)]
    rows = [
        [(name, ""), *("" if value is None else f"{value:.1%}" for value in values), f"{count:,}"]
        for name, count, *values in zip(
            facts["classes"], facts["support"], *(facts[column] for column in columns), strict=True
        )
    ]
    titles = ["class", *(heads[column] for column in columns), "images"]
    return Table(titles, rows, f"Of the {title_of(phase, phases)}, by class.")


def _costs(phases: Mapping[str, Any], metric: str) -> Table | None:
    measured = {phase: facts for phase, facts in phases.items() if facts.get("cost")}
    if not measured:
        return None
    rows = []
    for phase, facts in measured.items():
        cost, kept = facts["cost"], facts.get("kept") or {}
        rows.append(
            [
                (title_of(phase, phases), facts.get("model", "")),
                f"{cost['parameters']:,}",
                f"{cost['multiply_adds'] / 1e6:,.1f} M",
                sizes(cost),
                *(
                    f"{value['latency_ms']:.1f} ms, {value['images_per_second']:,.0f}/s"
                    for value in cost["speed"].values()
                ),
                *("" if kept.get(key) is None else f"{kept[key]:.1%}" for key in ("score_mean", "parameters")),
            ]
        )
    speeds = [f"{device.upper()}: latency, throughput" for device in cost["speed"]]
    heads = ["network", "parameters", "multiply-adds", "MB in float32 / 16 / int8", *speeds]
    return Table([*heads, f"of teacher's {metric}", "of its parameters"], rows, measured_with(cost))


def _objectives(summary: Mapping[str, Any]) -> Table | None:
    compared = summary["compared"]
    if not compared:
        return None
    cells = [objective_cells(row, is_best=rank == 0) for rank, row in enumerate(compared)]
    return Table(
        objective_headings(summary), [[(first, ""), *others] for first, *others in cells], objectives_caption(compared)
    )


def _provenance(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what the results depend on: section, name and value; a value that differs between phases for each."""
    phases = summary["phases"]
    recorded = {title_of(phase, phases): facts.get("provenance") for phase, facts in phases.items()}
    recorded |= {f"student, {row['objective']}": row.get("provenance") for row in summary["compared"]}
    values: dict[tuple[str, str], dict[str, list[str]]] = {}
    for title, provenance in recorded.items():
        for section, entries in (provenance or {}).items():
            for name, value in entries.items():
                values.setdefault((section, name), {}).setdefault(as_text(value), []).append(title)
    rows = []
    for (section, name), titles in sorted(values.items(), key=lambda item: SECTIONS.index(item[0][0])):
        texts = [text if len(titles) == 1 else f"{', '.join(of)}: {text}" for text, of in titles.items()]
        rows.append((section, name, "; ".join(texts)))
    return rows


def _compression(distilled: Mapping[str, Any], metric: str) -> str:
    kept = distilled.get("kept") or {}
    if kept.get("score_mean") is None or kept.get("parameters") is None:
        return ""
    return (
        f"The distilled student has {kept['parameters']:.1%} of the teacher's parameters and "
        f"{kept['score_mean']:.1%} of its {metric}."
    )


def _percent(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else share(value["mean"], value["std"])


def _nats(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")
