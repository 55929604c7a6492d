"""The tables of the README and the documentation, and their places in them."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.tables import HOME, RESULTS, facts_of, grid, markdown
from kd.report import cost_cells, cost_headings, gain_in_points, measured_with, read_summary, share

FRONT = "imagenette-today.fresh-seeds"
"""The experiment whose networks the first page shows: by seeds that did not choose its objectives."""


def front() -> str:
    """Write what a person gains, as the README's first page shows it: accuracy, size and speed of three networks."""
    summary = read_summary(RESULTS / FRONT)
    teacher, alone, compared = summary["phases"]["teacher"], summary["phases"]["baseline"], summary["compared"]
    named = [("teacher", teacher, teacher["cost"]), ("student alone", alone, alone["cost"])]
    # Distilled it is the same network.
    named += [(f"student distilled, `{row['objective']}`", row, alone["cost"]) for row in compared]
    heads = ["", "accuracy", "over the student alone", "parameters", "MB (float32)", "multiply-adds", "one image"]
    rows = [
        [
            name,
            share(facts["val_acc_mean"], facts["val_acc_std"]),
            gain_in_points(facts.get("gain")),
            f"{cost['parameters']:,}",
            f"{cost['megabytes']['float32']:.1f}",
            f"{cost['multiply_adds'] / 1e6:,.0f} M",
            f"{cost['speed']['cpu']['latency_ms']:.1f} ms",
        ]
        for name, facts, cost in named
    ]
    seeds = len(alone["runs"])
    words = f"Mean ± standard deviation over {seeds} seeds; gains in points, paired by seed, with their 95 % interval"
    return "\n".join([*grid(heads, rows), "", f"{words}; {facts_of(FRONT)['machine']}."])


def networks() -> str:
    """Write the table of size and speed."""
    costs = _list(RESULTS / "networks" / "costs.json")
    lines = grid(cost_headings(costs[0]), [cost_cells(cost) for cost in costs])
    return "\n".join([*lines, "", measured_with(costs[0]), "", "```bash", "kd models --measure", "```"])


OTHERS = {"front": front, "networks": networks}
"""The tables that are not of experiments alone."""


def fill(page: str) -> str:
    """Return a page with the tables that are now kept, each between ``<!-- results: NAME, ... -->`` and its end."""

    def filled(place: re.Match[str]) -> str:
        name = place["name"]
        made = OTHERS.get(name, lambda: markdown(name))
        return f"{place['start']}{made()}\n{place['end']}"

    pattern = r"(?P<start><!-- results: (?P<name>[\w-]+), .*? -->\n).*?(?P<end><!-- end of (?P=name) -->)"
    return re.sub(pattern, filled, page, flags=re.DOTALL)


def pages() -> list[Path]:
    """List the pages that may show tables: the README and those of the documentation."""
    return [HOME / "README.md", *sorted((HOME / "docs").rglob("*.md"))]


def fill_readme() -> None:
    """Write the tables that are now kept into the README and the documentation."""
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            page.write_text(after, encoding="utf-8")


def _list(path: Path) -> list[dict[str, Any]]:
    known: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return known
