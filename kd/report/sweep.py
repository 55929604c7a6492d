"""``sweep.html``: the trials of a sweep, best first, and what their accuracy hangs on; and its Markdown twin."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from kd.errors import UserError
from kd.report.figures import COLORS, Picture, drawn, panels, short
from kd.report.page import PICTURES, Table, environment, placed, write_text

PAGE = "sweep.html"
FINISHED, PRUNED = "finished", "pruned"
_COLORS = {FINISHED: COLORS["student distilled"], PRUNED: COLORS["student alone"]}
_COLUMNS = 3
_MOST_NAMED = 8


def print_sweep(sweep: Mapping[str, Any], console: Console) -> None:
    """Print the trials of a sweep as a table, best first.

    Args:
        sweep: As :func:`write_sweep` takes it.
        console: Where to.
    """
    console.print(f"\n{_ABOUT}\n", highlight=False, soft_wrap=True)
    table = TerminalTable(box=SIMPLE_HEAD, show_edge=False)
    for head in ("trial", "state", "accuracy"):
        table.add_column(head, no_wrap=True)
    for name in sweep["searched"]:
        table.add_column(escape(name), justify="right", overflow="fold")
    for one in sweep["trials"]:
        chosen = [escape(_value(one["parameters"].get(name))) for name in sweep["searched"]]
        table.add_row(str(one["number"]), one["state"], _share(one["val_acc"]), *chosen)
    console.print(table)
    console.print(f"\n{_verdict(sweep)}.", highlight=False, soft_wrap=True)


def write_sweep(sweep: Mapping[str, Any], output: Path) -> Path:
    """Write the page of a sweep, its Markdown twin and its pictures.

    Args:
        sweep: ``name``, ``data``, ``best`` (a trial's number, or ``None``), ``searched`` (the names of what is
            searched), ``config`` (the best trial's settings, as text) and ``trials``, best first, each with ``number``,
            ``state``, ``val_acc`` (after the last epoch that it came to), ``best_val_acc``, ``epochs`` (the accuracy
            after each), ``seconds`` and ``parameters``; accuracies are fractions of 1, or ``None``.
        output: Folder to write to.

    Returns:
        The page.

    Raises:
        UserError: If nothing can be written.
    """
    pictures = [one for one in (_over_trials(sweep), _by_parameter(sweep), _over_epochs(sweep)) if one is not None]
    try:
        (output / PICTURES).mkdir(parents=True, exist_ok=True)
        facts = {
            "name": sweep["name"],
            "verdict": _verdict(sweep),
            "about": f"{sweep['name']}: validation images of {sweep['data']}. {_ABOUT}",
            "table": _trials(sweep),
            "pictures": [placed(picture, output) for picture in pictures],
            "config": sweep["config"],
        }
        for name, template in ((PAGE, "sweep.html.j2"), ("sweep.md", "sweep.md.j2")):
            write_text(output / name, environment().get_template(template).render(sweep=facts))
    except OSError as error:
        raise UserError(f"the report can't be written to {output}: {error}") from None
    return output / PAGE


_ABOUT = "Accuracy of the distilled student on the validation images, after the last epoch."
_NOTE = (
    "A pruned trial was ended early, as it was below the median of the others at the same epoch, or left the numbers; "
    "its accuracy is the last that it came to. The best of many trials is better on these images than it is on others: "
    "the search has chosen it by them."
)


def _verdict(sweep: Mapping[str, Any]) -> str:
    counts = [sum(one["state"] == state for one in sweep["trials"]) for state in (FINISHED, PRUNED)]
    tried = f"{sum(counts)} trial{'' if sum(counts) == 1 else 's'}, {counts[1]} of them pruned"
    if sweep["best"] is None:
        return f"No trial was finished ({tried})"
    accuracy = next(one["val_acc"] for one in sweep["trials"] if one["number"] == sweep["best"])
    return f"Trial {sweep['best']} is the best of {tried}: {accuracy:.2%}"


def _trials(sweep: Mapping[str, Any]) -> Table:
    heads = ["trial", "state", "last epoch", "best", *sweep["searched"], "epochs", "time"]
    rows = [
        [
            (str(one["number"]), ""),
            one["state"],
            _share(one["val_acc"]),
            _share(one["best_val_acc"]),
            *(_value(one["parameters"].get(name)) for name in sweep["searched"]),
            str(len(one["epochs"])),
            "" if one["seconds"] is None else f"{one['seconds']:,.0f} s",
        ]
        for one in sweep["trials"]
    ]
    return Table(heads, rows, _NOTE)


def _over_trials(sweep: Mapping[str, Any]) -> Picture | None:
    known = sorted((one for one in sweep["trials"] if one["val_acc"] is not None), key=lambda one: int(one["number"]))
    finished = [one for one in known if one["state"] == FINISHED]
    if not finished:
        return None

    def draw(axes: Axes) -> None:
        for state, color in _COLORS.items():
            some = [one for one in known if one["state"] == state]
            places, values = [one["number"] for one in some], [100 * one["val_acc"] for one in some]
            axes.scatter(places, values, color=color, label=state, s=18, zorder=3)
        best = [max(100 * one["val_acc"] for one in finished[: count + 1]) for count in range(len(finished))]
        axes.step([one["number"] for one in finished], best, where="post", color=_COLORS[FINISHED], label="the best")
        axes.set(xlabel="trial", ylabel="accuracy on validation images, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)

    return drawn("trials", "Accuracy over the trials", "accuracy of each trial, and the best so far", draw)


def _by_parameter(sweep: Mapping[str, Any]) -> Picture | None:
    known = [one for one in sweep["trials"] if one["val_acc"] is not None]
    names = sweep["searched"]
    if not known or not names:
        return None
    rows = -(-len(names) // _COLUMNS)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, _COLUMNS, squeeze=False, sharey=True).ravel()
        for one, name in zip(axes, names, strict=False):
            _scatter(one, [trial for trial in known if name in trial["parameters"]], name)
        for one in axes[len(names) :]:
            one.axis("off")
        for one in axes[::_COLUMNS]:
            one.set_ylabel("accuracy, %")

    alt = "accuracy of each trial by each setting that was searched"
    return panels("settings", "Accuracy by what was searched", alt, draw, (7.2, 2.5 * rows))


def _scatter(axes: Axes, trials: Sequence[Mapping[str, Any]], name: str) -> None:
    values = [one["parameters"][name] for one in trials]
    is_number = all(isinstance(one, int | float) for one in values)
    options = [] if is_number else sorted(set(map(str, values)))
    places = values if is_number else [options.index(str(one)) for one in values]
    for state, color in _COLORS.items():
        some = [place for place, one in enumerate(trials) if one["state"] == state]
        axes.scatter(
            [places[one] for one in some], [100 * trials[one]["val_acc"] for one in some], color=color, s=14, zorder=3
        )
    if is_number and values and min(values) > 0 and max(values) / min(values) > 30:  # noqa: PLR2004 (on a plain scale most would lie on one spot)
        axes.set_xscale("log")
    if options:
        shown = [short(one, 14) for one in options] if len(options) <= _MOST_NAMED else [""] * len(options)
        axes.set_xticks(range(len(options)), shown, rotation=20, fontsize=7)
    axes.set_xlabel(short(name))
    axes.grid(visible=True)


def _over_epochs(sweep: Mapping[str, Any]) -> Picture | None:
    known = [one for one in sweep["trials"] if len(one["epochs"]) > 0]
    if max((len(one["epochs"]) for one in known), default=0) < 2:  # noqa: PLR2004 (one point is no curve)
        return None

    def draw(axes: Axes) -> None:
        for one in reversed(known):
            is_best = one["number"] == sweep["best"]
            color = _COLORS.get(one["state"], "#999999")
            accuracies = [100 * accuracy for accuracy in one["epochs"]]
            (line,) = axes.plot(range(1, len(accuracies) + 1), accuracies, ".-", color=color)
            line.set(alpha=1.0 if is_best else 0.45, linewidth=2.2 if is_best else 1)
        axes.set(xlabel="epoch", ylabel="accuracy on validation images, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return drawn("epochs", "Accuracy over the epochs", "accuracy of each trial by epoch, the best one thick", draw)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _value(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
