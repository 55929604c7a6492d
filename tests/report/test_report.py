import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kd.report import gain_sentence, print_summary, summarize, write_summary


def one(seed: int | None, val_acc: float, **more: Any) -> dict[str, Any]:
    facts = {
        "seed": seed,
        "model": "convnet(widths=[8])",
        "parameters": 1234567,
        "epochs": 3,
        "steps": 30,
        "val_acc": val_acc,
        "best_val_acc": val_acc + 0.01,
        "val_loss": 0.5,
        "agreement": None,
        "seconds": 3.4,
        "images_per_second": 99.0,
        "checkpoint": "best.ckpt",
        "folder": "elsewhere",
    }
    return facts | more


ALONE = [one(0, 0.80), one(1, 0.82), one(2, 0.78)]
DISTILLED = [one(1, 0.84, agreement=0.9), one(0, 0.81, agreement=0.8), one(2, 0.84, agreement=0.7)]


def printed(summary: dict[str, Any]) -> str:
    output = io.StringIO()
    console = Console(file=output, width=80)
    print_summary(summary, console)
    console.print(gain_sentence(summary), highlight=False, soft_wrap=True)
    return output.getvalue()


def test_phases_are_put_together_and_the_gain_is_paired_by_seed() -> None:
    summary = summarize({"distilled": DISTILLED, "teacher": [one(0, 0.97)], "baseline": ALONE}, data="photos")
    assert list(summary["phases"]) == ["teacher", "baseline", "distilled"]
    baseline = summary["phases"]["baseline"]
    assert baseline["val_acc_mean"] == pytest.approx(0.80)
    assert baseline["val_acc_std"] == pytest.approx(statistics.stdev([0.80, 0.82, 0.78]))
    assert summary["phases"]["teacher"]["val_acc_std"] is None
    assert set(baseline["runs"][0]) >= {
        *("seed", "epochs", "val_acc", "best_val_acc", "val_loss", "agreement", "seconds", "images_per_second"),
        "checkpoint",
    }
    gains = {run["seed"]: run["val_acc"] for run in summary["gain"]["runs"]}
    assert gains == pytest.approx({0: 0.01, 1: 0.02, 2: 0.06})
    assert summary["gain"]["mean"] == pytest.approx(0.03)
    assert summary["gain"]["std"] == pytest.approx(statistics.stdev([0.01, 0.02, 0.06]))


def test_only_seeds_of_both_are_paired() -> None:
    summary = summarize({"baseline": ALONE[:1], "distilled": DISTILLED}, data="photos")
    assert [run["seed"] for run in summary["gain"]["runs"]] == [0]
    assert summary["gain"]["std"] is None


def test_the_summary_is_written_whole(tmp_path: Path) -> None:
    summary = summarize({"baseline": ALONE}, data="photos")
    folder = tmp_path / "experiment"
    folder.mkdir()
    path = write_summary(summary, folder)
    assert json.loads(path.read_text()) == summary
    assert [child.name for child in folder.iterdir()] == ["summary.json"]


def test_the_table_fits_a_terminal_and_says_what_was_measured() -> None:
    text = printed(summarize({"teacher": [one(0, 0.97)], "baseline": ALONE, "distilled": DISTILLED}, data="photos"))
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    row = next(line for line in lines if line.startswith(" student alone"))
    assert re.split(r"\s{2,}", row.strip()) == ["student alone", "1,234,567", "80.00% ± 2.00", "81.00%", "3 s"]
    assert "80.00%" in next(line for line in lines if line.startswith(" student distilled"))
    assert "convnet(widths=[8])" in text
    assert text.count(" 3 seeds") == 2
    assert lines[-1] == (
        "No gain beyond the noise between seeds: +3.0 points (-3.6 to +9.6; by seed +2.0, +1.0, +6.0)."
    )


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (
            {"baseline": ALONE[:1], "distilled": DISTILLED[1:2]},
            "Distillation: +1.0 points; one seed can't tell a gain from the noise (--seeds 3 repeats it).",
        ),
        ({"baseline": DISTILLED[1:2], "distilled": ALONE[:1]}, "Distillation: -1.0 points; one seed can't tell"),
        ({"baseline": ALONE}, "train the other student too: --distill"),
        ({"distilled": DISTILLED}, "train the other student too: --baseline"),
        ({"teacher": ALONE}, ""),
        ({"baseline": ALONE[:1], "distilled": DISTILLED[:1]}, ""),
    ],
)
def test_the_gain_is_said_as_it_is(runs: dict[str, list[dict[str, Any]]], words: str) -> None:
    assert words in gain_sentence(summarize(runs, data="photos"))


def test_several_teachers_and_assistants_have_a_row_each() -> None:
    runs = {
        "teacher/resnet50": [one(0, 0.95, model="resnet50")],
        "teacher/densenet121": [one(0, 0.96, model="densenet121")],
        "distilled": DISTILLED,
        "teacher": [one(None, 0.97, model="resnet50 + densenet121", checkpoint=None, seconds=None)],
        "assistant/2-resnet18": [one(0, 0.91, model="resnet18")],
        "assistant/1-resnet34": [one(0, 0.92, model="resnet34")],
    }
    summary = summarize(runs, data="photos")
    assert list(summary["phases"]) == [
        *("teacher/densenet121", "teacher/resnet50", "teacher"),
        *("assistant/1-resnet34", "assistant/2-resnet18", "distilled"),
    ]
    assert summary["phases"]["teacher"]["model"] == "resnet50 + densenet121"
    assert summary["phases"]["assistant/1-resnet34"]["val_acc_mean"] == 0.92
    rows = [line for line in printed(summary).splitlines() if "%" in line]
    assert [re.split(r"  +", row.strip())[0] for row in rows] == [
        *("teacher", "teacher", "teachers as one", "assistant 1", "assistant 2", "student distilled"),
    ]
    assert [row.count("1,234,567") for row in rows] == [1] * 6


def test_each_compared_objective_is_held_against_the_student_alone() -> None:
    compared = [run | {"objective": "kl"} for run in DISTILLED] + [run | {"objective": "mse"} for run in ALONE]
    summary = summarize({"baseline": ALONE, "compared": compared}, data="photos")
    gains = {row["objective"]: row["gain"] for row in summary["compared"]}
    assert gains["kl"]["mean"] == pytest.approx(0.03)
    assert gains["mse"]["mean"] == 0
    text = printed(summary)
    assert [line.split()[-1] for line in text.splitlines() if line.startswith((" kl", " mse"))] == ["+3.00", "+0.00"]
    assert (
        "at 83.00%: +3.00 points over the student alone, no gain beyond the noise between seeds (-6.48 to +12.48"
        in text
    )
    without = printed(summarize({"compared": compared}, data="photos"))
    assert "alone" not in without
