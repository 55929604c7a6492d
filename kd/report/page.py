"""``report.html``: the verdict, the table and the pictures on one page that needs no network; and its Markdown twin."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from kd.errors import UserError
from kd.report import figures
from kd.report.events import write_events
from kd.report.examples import soft_target_examples
from kd.report.figures import Picture
from kd.report.formatting import BEYOND_NOISE, mean_of, measured_with, share, sizes
from kd.report.summary import title_of
from kd.report.verdict import gain_in_points, gain_sentence

PAGE = "report.html"
PICTURES = "figures"
_PERCENT, _MILLION = 100, 1e6
_DRAWN = 6


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        heads: What the columns are.
        rows: The first cell of each is a name with what stands under it.
        note: What a reader must know.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str


def write_report(folders: Sequence[Path], *, output: Path | None = None) -> Path:
    """Write the page, its Markdown twin and the pictures of one experiment, or of several to compare.

    Those of one stand in TensorBoard, too.

    Args:
        folders: The experiments' folders, each with a ``summary.json``.
        output: Folder to write to; ``None``: the only experiment's.

    Returns:
        The page.

    Raises:
        UserError: If there is no summary, or nothing can be written.
    """
    if output is None:
        if len(folders) > 1:
            raise UserError("--output: several experiments are compared: say a folder for the page")
        output = folders[0]
    experiments = [_experiment(folder, several=len(folders) > 1) for folder in folders]
    try:
        (output / PICTURES).mkdir(parents=True, exist_ok=True)
        for one in experiments:
            one["pictures"] = [placed(picture, output) for picture in one["pictures"]]
        title = experiments[0]["name"] if len(folders) == 1 else f"{len(folders)} experiments"
        for name, template in ((PAGE, "report.html.j2"), ("report.md", "report.md.j2")):
            text = environment().get_template(template).render(title=title, experiments=experiments)
            write_text(output / name, text)
        if output == folders[0]:
            pictures = {one["name"]: output / one["png"] for one in experiments[0]["pictures"]}
            write_events(output, (output / "report.md").read_text(encoding="utf-8"), pictures)
    except OSError as error:
        raise UserError(f"the report can't be written to {output}: {error}") from None
    return output / PAGE


def read_summary(folder: Path) -> dict[str, Any]:
    """Read an experiment's ``summary.json``.

    Raises:
        UserError: If there is none, or none of this tool's.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: there is no summary.json here; is this the folder of an experiment?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: this is no JSON: {error}") from None
    if not _is_summary(summary):
        raise UserError(f"{path}: this is no summary of an experiment")
    known: dict[str, Any] = summary
    return known


def _is_summary(summary: Any) -> bool:  # noqa: ANN401 (whatever JSON holds)
    if not isinstance(summary, dict) or not {"data", "phases", "gain", "compared"} <= summary.keys():
        return False
    phases, compared = summary["phases"], summary["compared"]
    if not isinstance(phases, dict) or not isinstance(compared, list):
        return False
    facts = [*phases.values(), *compared]
    return isinstance(summary["gain"], dict | None) and all(
        isinstance(one, dict)
        and isinstance(one.get("runs"), list)
        and all(isinstance(run, dict) for run in one["runs"])
        for one in facts
    )


def write_text(path: Path, text: str) -> None:
    """Write a file: the old one or the new one, never half of one."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def environment() -> Environment:
    """Return what fills the templates in."""
    made = Environment(
        loader=PackageLoader("kd.report"),
        # Names of classes and files are data: in the page they are text, whatever stands in them.
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["plain"] = _in_markdown
    return made


def _in_markdown(value: Any) -> str:  # noqa: ANN401 (whatever a template shows)
    """Keep a text from ending a table's cell, and from being HTML."""
    return str(value).replace("|", "\\|").replace("<", "&lt;")


def _experiment(folder: Path, *, several: bool) -> dict[str, Any]:
    summary = read_summary(folder)
    phases = summary["phases"]
    gain = summary["gain"] or {}
    low, high = (gain.get("interval") or (0.0, 0.0))[:2]
    config = folder / "config.yaml"
    prefix = f"{re.sub(r'[^A-Za-z0-9]+', '-', folder.absolute().name)}-" if several else ""
    pictures = [picture for picture in _pictures(folder, summary) if picture is not None]
    for picture in pictures:
        picture.name = prefix + picture.name
    distilled = phases.get("distilled", {})
    return {
        "name": folder.absolute().name,
        "anchor": f"{prefix}experiment",
        "data": summary["data"],
        "verdict": gain_sentence(summary) or "What was trained",
        "outcome": "gained" if low > 0 else "lost" if high < 0 else "",
        "objective": _size_kept(distilled),
        "brief": _brief(summary),
        "tables": [table for table in (_accuracies(summary), _costs(summary), _objectives(summary)) if table],
        "pictures": pictures,
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
    }


def placed(picture: Picture, output: Path) -> dict[str, Any]:
    """Write a picture as PNG beside a page, and return what the page shows of it."""
    # Drawn by matplotlib, which escapes what stands in it.
    svg = Markup(picture.svg())  # noqa: S704
    png = picture.write_png(output / PICTURES).relative_to(output).as_posix()
    return {
        "name": picture.name,
        "title": picture.title,
        "alt": picture.alt,
        "svg": svg,
        "png": png,
        "note": picture.note,
    }


def _pictures(folder: Path, summary: Mapping[str, Any]) -> list[Picture | None]:
    phases = summary["phases"]
    histories = {
        title_of(phase, phases): [run.get("history") or [] for run in facts["runs"]]
        for phase, facts in phases.items()
        if any(run.get("history") for run in facts["runs"])
    }
    # More lines than these could not be told apart.
    compared = {
        row["objective"]: [run["history"] for run in row["runs"]]
        for row in summary["compared"][:_DRAWN]
        if all(run.get("history") for run in row["runs"])
    }
    best = dict(list(compared.items())[:1])
    measured = {title_of(phase, phases): facts["measured"] for phase, facts in phases.items() if facts.get("measured")}
    examples = soft_target_examples(folder, summary)
    classes = examples.classes if examples is not None else ()
    drawn: list[Picture | None] = [figures.curves(histories | compared), figures.terms(histories | best)]
    if classes:
        drawn.append(figures.by_class(classes, {title: one["per_class"] for title, one in measured.items()}))
    drawn.append(figures.reliability({title: one["bins"] for title, one in measured.items()}))
    for title in ("student distilled", "student alone", "teacher"):
        if classes and title in measured:
            drawn.append(figures.confusion(classes, measured[title]["confusion"], title))
            break
    if examples is not None:
        drawn += [examples.draw(), examples.draw_disagreements()]
    return drawn


def _accuracies(summary: Mapping[str, Any]) -> Table:
    rows, phases = [], summary["phases"]
    named = [(title_of(phase, phases), facts["model"], facts) for phase, facts in phases.items()]
    named += [("student distilled", facts["objective"], facts) for facts in summary["compared"]]
    for title, under, facts in named:
        measured, runs = facts.get("measured") or {}, facts["runs"]
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        rows.append(
            [
                (title, f"{under}{seeds}"),
                share(facts["val_acc_mean"], facts["val_acc_std"]),
                mean_of(runs, "best_val_acc", "{:.2%}"),
                _of_seeds(measured.get("top5"), factor=_PERCENT, unit="%"),
                _of_seeds(measured.get("nll"), digits=3),
                _of_seeds(measured.get("ece"), factor=_PERCENT, unit="%"),
                _of_seeds(measured.get("agreement"), factor=_PERCENT, unit="%"),
                _of_seeds(measured.get("kl_to_teacher"), digits=3),
                mean_of(runs, "seconds", "{:,.0f} s"),
            ]
        )
    note = (
        "Accuracy after the last epoch and after the best; right within five; negative log-likelihood of the labels "
        "and divergence from the teacher in nats; expected calibration error over 15 bins of confidence; how often "
        "the student decides as its teacher. ± is the standard deviation over the seeds."
    )
    heads = ["network", "last epoch", "best epoch", "top 5", "NLL", "ECE", "agreement", "KL to teacher", "training"]
    return Table(heads, rows, note)


def _costs(summary: Mapping[str, Any]) -> Table | None:
    rows, phases = [], dict(summary["phases"])
    if summary["compared"] and summary["compared"][0].get("cost"):
        phases["distilled"] = summary["compared"][0]
    for phase, facts in phases.items():
        cost, kept = facts.get("cost"), facts.get("kept") or {}
        if cost is None:
            continue
        speeds = [
            f"{speed['latency_ms']:.1f} ms, {speed['images_per_second']:,.0f}/s" for speed in cost["speed"].values()
        ]
        rows.append(
            [
                (title_of(phase, phases), facts.get("model", "")),
                f"{cost['parameters']:,}",
                f"{cost['multiply_adds'] / _MILLION:,.1f} M",
                sizes(cost),
                *speeds,
                "" if kept.get("val_acc_mean") is None else f"{kept['val_acc_mean']:.1%}",
                "" if kept.get("parameters") is None else f"{kept['parameters']:.1%}",
            ]
        )
    if not rows:
        return None
    devices = next(list(facts["cost"]["speed"]) for facts in phases.values() if facts.get("cost"))
    first = next(facts["cost"] for facts in phases.values() if facts.get("cost"))
    heads = ["network", "parameters", "multiply-adds", "MB in float32 / 16 / int8"]
    heads += [f"{device.upper()}: one image, many" for device in devices]
    heads += ["of the teacher's accuracy", "of its parameters"]
    return Table(heads, rows, measured_with(first))


def _objectives(summary: Mapping[str, Any]) -> Table | None:
    rows = []
    for number, row in enumerate(summary["compared"]):
        interval = row["interval"]
        rows.append(
            [
                (row["objective"], ""),
                share(row["val_acc_mean"], row["val_acc_std"]),
                "best" if number == 0 else f"{_PERCENT * row['behind']:+.2f}",
                ""
                if number == 0 or interval is None
                else f"{_PERCENT * interval[0]:+.2f} to {_PERCENT * interval[1]:+.2f}",
                "" if number == 0 else BEYOND_NOISE[row["is_beyond_noise"]],
                gain_in_points(row.get("gain")),
            ]
        )
    heads = ["objective", "last epoch", "from the best", "95 % interval", "beyond the noise", "over the student alone"]
    note = "Differences from the best and from the student alone (with its 95 % interval), paired by seed, in points."
    return Table(heads, rows, note) if rows else None


def _brief(summary: Mapping[str, Any]) -> list[str]:
    phases, gain = summary["phases"], summary["gain"]
    cells = [
        share(phases[phase]["val_acc_mean"], phases[phase]["val_acc_std"]) if phase in phases else ""
        for phase in ("teacher", "baseline", "distilled")
    ]
    return [*cells, gain_in_points(gain)]


def _size_kept(distilled: Mapping[str, Any]) -> str:
    kept = distilled.get("kept") or {}
    if kept.get("val_acc_mean") is None or kept.get("parameters") is None:
        return ""
    return (
        f"The distilled student has {kept['parameters']:.1%} of the teacher's parameters and "
        f"{kept['val_acc_mean']:.1%} of its accuracy."
    )


def _of_seeds(value: Mapping[str, Any] | None, *, factor: float = 1, digits: int = 2, unit: str = "") -> str:
    if value is None:
        return ""
    spread = "" if value["std"] is None else f" ± {factor * value['std']:.{digits}f}"
    return f"{factor * value['mean']:.{digits}f}{unit}{spread}"
