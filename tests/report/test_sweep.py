"""The page and the table of a sweep."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from kd.console import make_console
from kd.errors import UserError
from kd.report import print_sweep, write_sweep


def trial(
    number: int, state: str, accuracies: list[float], *, reason: str = "", **parameters: object
) -> dict[str, Any]:
    last = accuracies[-1] if accuracies else None
    facts = {"number": number, "state": state, "reason": reason, "val_acc": last, "epochs": accuracies}
    return facts | {"seconds": None if state == "running" else 1.5, "parameters": parameters}


def sweep_of(*trials: dict[str, Any], best: int | None = 0) -> dict[str, Any]:
    searched = list(dict.fromkeys(name for trial in trials for name in trial["parameters"]))
    return {"name": "s", "data": "d", "best": best, "metric": "accuracy", "searched": searched, "trials": trials}


def printed(sweep: dict[str, Any]) -> str:
    output = io.StringIO()
    console = make_console(file=output)
    console.width = 100
    print_sweep(sweep, console)
    return output.getvalue()


def test_names_are_text_everywhere(tmp_path: Path) -> None:
    wild = "<script>a|b</script> $x_1$ [bold]c[/red]"
    sweep = sweep_of(
        trial(0, "finished", [0.5, 0.75], model=wild), trial(1, "pruned", [0.25], model="plain", reason=wild)
    )
    page = write_sweep(sweep | {"name": wild, "data": wild}, tmp_path, config=wild).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;a|b&lt;/script&gt; $x_1$ [bold]c[/red]" in page
    markdown = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "| 0 | finished | 75.00% | &lt;script>a\\|b&lt;/script> $x_1$ [bold]c[/red] | 2 | 2 s |" in markdown
    assert "- Trial 1: &lt;script" in markdown
    for text in (page, markdown, printed(sweep)):
        assert "Best: trial 0, validation accuracy 75.00% (1 finished, 1 pruned)" in text
    assert "[bold]c[/red]" in printed(sweep)
    for svg in page.split("<svg")[1:]:
        ET.fromstring(f"<svg{svg.partition('</svg>')[0]}</svg>".replace("currentColor", "black"))  # noqa: S314 (our own)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"parameters.png"}


def test_a_sweep_without_a_finished_trial_has_a_table(tmp_path: Path) -> None:
    sweep = sweep_of(trial(0, "pruned", []), trial(1, "interrupted", []), trial(2, "running", []), best=None)
    page = write_sweep(sweep, tmp_path).read_text(encoding="utf-8")
    assert "No finished trial (1 pruned, 1 interrupted, 1 running)" in page
    assert "<svg" not in page
    rows = [line.split()[:2] for line in printed(sweep).splitlines() if line[:3].strip().isdigit()]
    assert rows == [["0", "pruned"], ["1", "interrupted"], ["2", "running"]]


def test_a_folder_that_cant_be_written_to_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(UserError, match="can't write the report"):
        write_sweep(sweep_of(trial(0, "finished", [0.5])), tmp_path)
