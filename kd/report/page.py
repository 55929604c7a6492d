"""``report.html``: verdict, tables and figures on one page without external resources, and the same in Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from kd.errors import UserError
from kd.files import write_text
from kd.report import figures
from kd.report.comparison import OBJECTIVE_HEADINGS, objective_cells, objectives_caption
from kd.report.events import write_events
from kd.report.examples import example_pictures
from kd.report.figures import Picture
from kd.report.formatting import gain_in_points, mean_of, measured_with, share, sizes
from kd.report.summary import read_summary, title_of
from kd.report.verdict import gain_of, gain_sentence, significance

PAGE = "report.html"
PICTURES = "figures"
_MAX_CURVES = 6
"""Largest number of objectives whose curves can be told apart."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        heads: Headings of the columns.
        rows: The cells of each row; the first is a name and a second line below it.
        note: The caption.
    """

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
        UserError: If a summary is missing, or nothing can be written.
    """
    if output is None:
        if len(folders) > 1:
            raise UserError("--output: missing; name a folder for the report on several experiments")
        output = folders[0]
    experiments = [_experiment(folder, several=len(folders) > 1) for folder in folders]
    try:
        (output / PICTURES).mkdir(parents=True, exist_ok=True)
        for one in experiments:
            one["pictures"] = [placed(picture, output) for picture in one["pictures"]]
        title = experiments[0]["name"] if len(folders) == 1 else f"{len(folders)} experiments"
        for name in (PAGE, "report.md"):
            text = environment().get_template(f"{name}.j2").render(title=title, experiments=experiments)
            write_text(output / name, text)
        if output == folders[0]:
            pictures = {one["name"]: output / one["png"] for one in experiments[0]["pictures"]}
            write_events(output, (output / "report.md").read_text(encoding="utf-8"), pictures)
    except OSError as error:
        raise UserError(f"{output}: can't write the report: {error}") from None
    return output / PAGE


def environment() -> Environment:
    """Return the Jinja environment of the report's templates."""
    jinja = Environment(
        loader=PackageLoader("kd.report"),
        # Names of classes, files and experiments are untrusted text.
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A text must not end a cell of a Markdown table, nor be HTML.
    jinja.filters["plain"] = lambda value: str(value).replace("|", "\\|").replace("<", "&lt;")
    return jinja


def placed(picture: Picture, output: Path) -> dict[str, Any]:
    """Write a figure as PNG beside the page, and return what the templates need of it."""
    svg = Markup(picture.svg())  # noqa: S704 (matplotlib escapes all text)
    png = picture.write_png(output / PICTURES).relative_to(output).as_posix()
    return {name: getattr(picture, name) for name in ("name", "title", "alt", "note")} | {"svg": svg, "png": png}


def _experiment(folder: Path, *, several: bool) -> dict[str, Any]:
    summary, name = read_summary(folder), folder.absolute().name
    config = folder / "config.yaml"
    prefix = f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-" if several else ""
    pictures = [picture for picture in _pictures(folder, summary) if picture is not None]
    for picture in pictures:
        picture.name = prefix + picture.name
    return {
        "name": name,
        "anchor": f"{prefix}experiment",
        "data": summary["data"],
        "verdict": gain_sentence(summary) or f"Results of {name}",
        "outcome": {1: "gained", -1: "lost"}.get(significance(gain_of(summary)) or 0, ""),
        "compression": _compression(summary["phases"].get("distilled", {})),
        "overview": _overview(summary),
        "tables": [table for table in (_accuracies(summary), _costs(summary), _objectives(summary)) if table],
        "pictures": pictures,
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
    }


def _pictures(folder: Path, summary: Mapping[str, Any]) -> list[Picture | None]:
    phases, compared = summary["phases"], summary["compared"]
    networks = {title_of(phase, phases): facts for phase, facts in phases.items()}
    curves = networks | {row["objective"]: row for row in compared[:_MAX_CURVES]}
    histories = {
        name: [run["history"] for run in facts["runs"]]
        for name, facts in curves.items()
        if all(run.get("history") for run in facts["runs"])
    }
    if compared and "student, distilled" not in networks:
        networks["student, distilled"] = compared[0]
    others = {row["objective"] for row in compared[1:]}
    terms = {name: runs for name, runs in histories.items() if name not in others}
    measured = {name: facts["measured"] for name, facts in networks.items() if facts.get("measured")}
    drawn = [figures.accuracy_curves(histories), figures.loss_terms(terms)]
    if measured:
        facts = next(iter(measured.values()))
        # Earlier versions didn't store the names of the classes.
        classes = facts.get("classes") or [str(number) for number in range(len(facts["per_class"]))]
        drawn.append(figures.per_class_accuracy(classes, {name: one["per_class"] for name, one in measured.items()}))
        drawn.append(figures.calibration({name: one["bins"] for name, one in measured.items()}))
        # Phases are in the order of training: the last is the student that is most worth looking at.
        last = list(measured)[-1]
        drawn.append(figures.confusion_matrix(classes, measured[last]["confusion"], last))
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
        "in nats; ECE: expected calibration error over 15 bins of confidence; agreement: share of images for which the "
        "student predicts its teacher's class; KL to teacher: Kullback-Leibler divergence, in nats. ± is the standard "
        "deviation over the seeds."
    )
    heads = ["network", "last epoch", "best epoch", "top-5", "NLL", "ECE", "agreement", "KL to teacher", "training"]
    return Table(heads, rows, note)


def _costs(summary: Mapping[str, Any]) -> Table | None:
    phases = dict(summary["phases"])
    if summary["compared"]:
        phases["distilled"] = summary["compared"][0]
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
                *(f"{one['latency_ms']:.1f} ms, {one['images_per_second']:,.0f}/s" for one in cost["speed"].values()),
                *("" if kept.get(key) is None else f"{kept[key]:.1%}" for key in ("val_acc_mean", "parameters")),
            ]
        )
    first = next(iter(measured.values()))["cost"]
    speeds = [f"{device.upper()}: latency, throughput" for device in first["speed"]]
    heads = ["network", "parameters", "multiply-adds", "MB in float32 / 16 / int8", *speeds]
    return Table([*heads, "of teacher's accuracy", "of its parameters"], rows, measured_with(first))


def _objectives(summary: Mapping[str, Any]) -> Table | None:
    compared = summary["compared"]
    if not compared:
        return None
    cells = [objective_cells(row, is_best=rank == 0) for rank, row in enumerate(compared)]
    return Table(OBJECTIVE_HEADINGS, [[(first, ""), *others] for first, *others in cells], objectives_caption(compared))


def _overview(summary: Mapping[str, Any]) -> list[str]:
    phases = summary["phases"] | ({"distilled": summary["compared"][0]} if summary["compared"] else {})
    shares = [
        share(phases[phase]["val_acc_mean"], phases[phase]["val_acc_std"]) if phase in phases else ""
        for phase in ("teacher", "baseline", "distilled")
    ]
    return [*shares, gain_in_points(gain_of(summary))]


def _compression(distilled: Mapping[str, Any]) -> str:
    kept = distilled.get("kept") or {}
    if kept.get("val_acc_mean") is None or kept.get("parameters") is None:
        return ""
    return (
        f"The distilled student has {kept['parameters']:.1%} of the teacher's parameters and "
        f"{kept['val_acc_mean']:.1%} of its accuracy."
    )


def _percent(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else share(value["mean"], value["std"])


def _nats(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")
