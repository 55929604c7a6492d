"""The page and the table of a sweep."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kd.errors import UserError
from kd.report import print_sweep, write_sweep


def trial(number: int, state: str, accuracies: list[float], **parameters: object) -> dict[str, Any]:
    last = accuracies[-1] if accuracies else None
    best = max(accuracies, default=None)
    facts = {"number": number, "state": state, "val_acc": last, "best_val_acc": best, "epochs": accuracies}
    return facts | {"seconds": None if state == "running" else 1.5, "parameters": parameters}


def sweep_of(*trials: dict[str, Any], best: int | None = 0) -> dict[str, Any]:
    searched = list(dict.fromkeys(name for one in trials for name in one["parameters"]))
    return {"name": "s", "data": "d", "best": best, "searched": searched, "config": "", "trials": trials}


def printed(sweep: dict[str, Any]) -> str:
    output = io.StringIO()
    print_sweep(sweep, Console(file=output, width=100))
    return output.getvalue()


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    wild = "<script>a|b</script> $x_1$ [bold]c[/red]"
    sweep = sweep_of(trial(0, "finished", [0.5, 0.75], model=wild), trial(1, "pruned", [0.25], model="plain"))
    page = write_sweep(sweep | {"name": wild, "data": wild, "config": wild}, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;a|b&lt;/script&gt; $x_1$ [bold]c[/red]" in page
    markdown = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "| 0 | finished | 75.00% | 75.00% | &lt;script>a\\|b&lt;/script> $x_1$ [bold]c[/red] | 2 | 2 s |" in markdown
    for table in (page, markdown):
        assert "Trial 0 is the best of 2 trials, 1 of them pruned: 75.00%" in table
    assert "[bold]c[/red]" in "".join(printed(sweep).split("\n")).replace(" ", "").replace("│", "")
    for svg in page.split("<svg")[1:]:
        ET.fromstring(f"<svg{svg.partition('</svg>')[0]}</svg>".replace("currentColor", "black"))  # noqa: S314 (our own)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"trials.png", "settings.png", "epochs.png"}


def test_a_sweep_without_a_finished_trial_has_its_table_too(tmp_path: Path) -> None:
    sweep = sweep_of(trial(0, "pruned", []), trial(1, "lost", []), trial(2, "running", [0.5], rate=0.1), best=None)
    page = write_sweep(sweep, tmp_path).read_text(encoding="utf-8")
    assert "No trial was finished (1 trial, 1 of them pruned)" in page
    out = printed(sweep)
    assert [line.split()[:2] for line in out.splitlines() if line[:3].strip().isdigit()] == [
        ["0", "pruned"],
        ["1", "lost"],
        ["2", "running"],
    ]


def test_a_folder_that_cant_be_written_to_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(UserError, match="the report can't be written"):
        write_sweep(sweep_of(trial(0, "finished", [0.5])), tmp_path)
