import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from kd.console import make_console
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


BASELINE = [one(0, 0.80), one(1, 0.82), one(2, 0.78)]
DISTILLED = [one(1, 0.84, agreement=0.9), one(0, 0.81, agreement=0.8), one(2, 0.84, agreement=0.7)]


def printed(summary: dict[str, Any]) -> str:
    output = io.StringIO()
    console = make_console(file=output)
    console.width = 80
    print_summary(summary, console)
    console.print(gain_sentence(summary))
    return output.getvalue()


def test_uneven_classes_are_said_with_balanced_accuracies() -> None:
    summary = summarize({"baseline": [one(0, 0.909)]}, data="photos")
    measured = {"classes": ["ant", "bee"], "constant": {"mean": 0.909, "std": None}}
    balanced = {"balanced_accuracy": {"mean": 0.5, "std": None}}
    summary["phases"]["baseline"]["measured"] = measured | balanced
    text = " ".join(printed(summary).split())
    assert "always predicting the most frequent one has an accuracy of 90.90%." in text
    assert "Balanced accuracy: student, labels only 50.00%." in text
    measured["constant"] = {"mean": 0.6, "std": None}
    summary["phases"]["baseline"]["measured"] = measured | balanced
    assert "Uneven" not in printed(summary)


def test_phases_are_aggregated_and_the_gain_is_paired_by_seed() -> None:
    summary = summarize({"distilled": DISTILLED, "teacher": [one(0, 0.97)], "baseline": BASELINE}, data="photos")
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


def test_only_common_seeds_are_paired() -> None:
    summary = summarize({"baseline": BASELINE[:1], "distilled": DISTILLED}, data="photos")
    assert [run["seed"] for run in summary["gain"]["runs"]] == [0]
    assert summary["gain"]["std"] is None


def test_the_summary_is_written_atomically(tmp_path: Path) -> None:
    summary = summarize({"baseline": BASELINE}, data="photos")
    folder = tmp_path / "experiment"
    folder.mkdir()
    path = write_summary(summary, folder)
    assert json.loads(path.read_text()) == summary
    assert [child.name for child in folder.iterdir()] == ["summary.json"]


def test_the_table_fits_80_columns() -> None:
    text = printed(summarize({"teacher": [one(0, 0.97)], "baseline": BASELINE, "distilled": DISTILLED}, data="photos"))
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    row = next(line for line in lines if line.startswith(" student, labels only"))
    assert re.split(r"\s{2,}", row.strip()) == ["student, labels only", "1,234,567", "80.00% ± 2.00", "81.00%", "3 s"]
    assert "80.00%" in next(line for line in lines if line.startswith(" student, distilled"))
    assert "convnet(widths=[8])" in text
    assert sum(line.strip() == "3 seeds" for line in lines) == 2
    assert lines[-1] == ("No significant difference: +3.0 points (95 % confidence interval -3.6 to +9.6, 3 seeds).")


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (
            {"baseline": BASELINE[:1], "distilled": DISTILLED[1:2]},
            "Distillation changed accuracy by +1.0 points; one seed can't separate a gain from noise, use --seeds 3.",
        ),
        ({"baseline": DISTILLED[1:2], "distilled": BASELINE[:1]}, "Distillation changed accuracy by -1.0 points"),
        ({"baseline": BASELINE}, "Add --distill to measure the gain from distillation."),
        ({"distilled": DISTILLED}, "Add --baseline to measure the gain from distillation."),
        ({"teacher": BASELINE}, ""),
        ({"baseline": BASELINE[:1], "distilled": DISTILLED[:1]}, ""),
    ],
)
def test_the_sentence_states_the_gain_or_how_to_measure_it(runs: dict[str, list[dict[str, Any]]], words: str) -> None:
    assert words in gain_sentence(summarize(runs, data="photos"))


def test_each_teacher_and_assistant_has_a_row() -> None:
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
        *("teacher", "teacher", "teacher ensemble", "assistant 1", "assistant 2", "student, distilled")
    ]
    assert [row.count("1,234,567") for row in rows] == [1] * 6


def test_each_compared_objective_has_a_gain_over_the_baseline() -> None:
    compared = [run | {"objective": "kl"} for run in DISTILLED] + [run | {"objective": "mse"} for run in BASELINE]
    summary = summarize({"baseline": BASELINE, "compared": compared}, data="photos")
    gains = {row["objective"]: row["gain"] for row in summary["compared"]}
    assert gains["kl"]["mean"] == pytest.approx(0.03)
    assert gains["mse"]["mean"] == 0
    text = printed(summary)
    assert [line.split()[-1] for line in text.splitlines() if line.startswith((" kl", " mse"))] == ["+3.00", "+0.00"]
    # The margin is Student's t for 2 degrees of freedom at 98.75 %, 6.205, times the standard error.
    assert "Best of 2 objectives: kl, accuracy 83.00%. No significant difference: +3.0 points" in text
    assert "-6.5 to +12.5, corrected for 2 objectives" in text
    without = printed(summarize({"compared": compared}, data="photos"))
    assert "gain " not in without.partition("Accuracy after")[0]
