"""The report's page: self-contained, consistent with the summary, and safe with any names."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.cli import main
from kd.pipeline import measure_costs
from kd.report import measured_with, read_summary, summarize, write_report, write_summary
from kd.report.figures import per_class_accuracy
from kd.training.predictions import write_predictions
from tests.conftest import MakeFolder
from tests.pipeline.test_experiment import run

CLASSES = ("ant", "<script>alert('bee')</script>", "c|a$t")


HEADINGS = (
    "Results",
    "Accuracy per epoch",
    "Loss terms and learning rate",
    "Per-class accuracy",
    "Calibration",
    "Confusion matrix",
    "Soft targets by temperature",
    "Largest teacher-student disagreements",
    "Provenance",
)


def planted(folder: Path, *, gain: float = 0.1, seeds: int = 3, classes: tuple[str, ...] = CLASSES) -> dict[str, Any]:
    """Write the files of an experiment whose distilled students gain about as much as given."""
    generator = np.random.default_rng(0)
    labels = np.arange(300) % len(classes)
    keys = np.array([f"{classes[label]}/{index}.png" for index, label in enumerate(labels)])

    def one(phase: str, seed: int, accuracy: float) -> dict[str, Any]:
        right = generator.random(300) < accuracy
        logits = generator.normal(size=(300, len(classes)))
        logits[np.arange(300), np.where(right, labels, (labels + 1) % len(classes))] += 4
        path = folder / phase / f"{seed}.npz"
        write_predictions({"logits": logits, "labels": labels, "keys": keys, "classes": np.array(classes)}, path)
        history = [
            {"epoch": epoch, "val/acc": accuracy - 0.1 / epoch, "train/ce": 1 / epoch, "lr": 0.1 / epoch}
            for epoch in (1, 2)
        ]
        return {
            "seed": seed,
            "model": "simple",
            "parameters": 1000,
            "val_acc": float((logits.argmax(axis=1) == labels).mean()),
            "best_val_acc": accuracy,
            "agreement": None,
            "seconds": 3.0,
            "history": history,
            "validation": str(path),
            "teacher_predictions": str(folder / "teacher" / "0.npz"),
        }

    runs = {
        "teacher": [one("teacher", 0, 0.9) | {"parameters": 20_000}],
        "baseline": [one("baseline", seed, 0.6) for seed in range(seeds)],
        "distilled": [one("distilled", seed, 0.6 + gain) for seed in range(seeds)],
    }
    cost = {
        "parameters": 1000,
        "multiply_adds": 5_000_000,
        "megabytes": {"float32": 0.004, "float16": 0.002, "int8": 0.001},
        "speed": {"cpu": {"latency_ms": 1.5, "images_per_second": 1234.0}},
        "threads": 2,
        "machine": "x86_64",
    }
    summary = summarize(runs, data="photos", folder=folder, costs=dict.fromkeys(runs, cost))
    write_summary(summary, folder)
    return summary


class Elements(HTMLParser):
    """The tags and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_a_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    folder = tmp_path / "<b>name"
    summary = planted(folder)
    text = write_report([folder]).read_text(encoding="utf-8")
    page = Elements(text)
    # Names of classes and folders are text.
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "&lt;b&gt;name" in text
    # Nothing is loaded from elsewhere.
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert page.tags.count("svg") == 5
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(identifiers)
    assert f"{summary['phases']['distilled']['val_acc_mean']:.2%}" in text
    assert "5.0% of the teacher" in text
    twin = (folder / "report.md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in twin.split("\n\n") if block.startswith("|")]
    # Accuracy, balanced metrics, size and speed, and three classes.
    assert [len(lines) for lines in tables] == [5, 5, 5, 5]
    # Without the escaped ones of names.
    assert all(len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 for lines in tables)
    for picture in re.findall(r"\]\((figures/[^)]+)\)", twin):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200


@pytest.mark.parametrize(
    ("gain", "seeds", "verdict", "outcome"),
    [
        (0.3, 3, "Distillation improved accuracy", "gained"),
        (0.0, 3, "No significant difference", ""),
        (-0.3, 3, "Distillation reduced accuracy", "lost"),
        (0.3, 1, "can&#39;t separate a gain from noise", ""),
    ],
)
def test_the_verdict_is_the_heading_of_the_page(
    tmp_path: Path, gain: float, seeds: int, verdict: str, outcome: str
) -> None:
    planted(tmp_path / "one", gain=gain, seeds=seeds)
    text = write_report([tmp_path / "one"]).read_text(encoding="utf-8")
    first = re.search(r'<h1 class="(\w*)">(.*?)</h1>', text)
    assert first is not None
    assert (first[1], verdict in first[2]) == (outcome, True)


def test_several_experiments_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, gain in (("first", 0.3), ("second", 0.0)):
        planted(tmp_path / name, gain=gain)
    line = ["report", str(tmp_path / "first"), str(tmp_path / "second"), "--output", str(tmp_path / "both")]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "Distillation improved accuracy" in out
    assert "No significant difference" in out
    text = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "2 experiments" in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert {"#first-experiment", "#second-experiment"} <= set(Elements(text).links)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no summary.json here"), ("{", "not a JSON file"), ("{}", "not the summary of an experiment")],
)
def test_a_folder_without_a_summary_is_refused(
    tmp_path: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_the_page_of_an_experiment_shows_its_images(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12, size=(40, 40))
    done, _ = run(folder, "--train_teacher", "--baseline", "--distill", "--name", "page")
    costs = measure_costs(done)
    assert set(costs) == {"teacher", "baseline", "distilled"}
    student = costs["distilled"]
    assert student["megabytes"]["float32"] == pytest.approx(4 * student["megabytes"]["int8"])
    assert min(student["speed"]["cpu"].values()) > 0
    write_summary(summarize(done.runs, data=done.data, folder=done.folder, costs=costs), done.folder)
    summary = read_summary(done.folder)
    distilled = summary["phases"]["distilled"]
    assert distilled["measured"]["accuracy"]["mean"] == pytest.approx(distilled["val_acc_mean"])
    assert distilled["measured"]["agreement"]["mean"] == pytest.approx(distilled["runs"][0]["agreement"])
    assert distilled["runs"][0]["validation"] == "distilled/version_0/validation.npz"
    # Paths are relative: the folder can be moved.
    moved = done.folder.rename(done.folder.with_name("moved"))
    text = write_report([moved]).read_text(encoding="utf-8")
    assert tuple(re.findall("<h2>(.*?)</h2>", text)) == HEADINGS
    assert "train_teacher: true" in text


def test_tensorboard_shows_the_latest_report(tmp_path: Path) -> None:
    planted(tmp_path / "one")
    for _ in range(2):
        write_report([tmp_path / "one"])
    events = EventAccumulator(str(tmp_path / "one" / "report"))
    events.Reload()
    assert events.Tags()["images"] == [
        f"report/{name}" for name in ("accuracy", "loss-terms", "per-class-accuracy", "calibration", "confusion-matrix")
    ]
    assert len(events.Images("report/confusion-matrix")) == 1
    assert len(list((tmp_path / "one" / "report").iterdir())) == 1


def test_a_legend_never_covers_the_axis_label() -> None:
    for count in (2, 10, 60):
        classes = [f"class {number}" for number in range(count)]
        accuracies = {title: [0.5] * count for title in ("student, labels only", "student, distilled")}
        picture = per_class_accuracy(classes, accuracies)
        assert picture is not None
        picture.figure.canvas.draw()
        label, legend = picture.figure.axes[0].xaxis.label, picture.figure.legends[0]
        assert not legend.get_window_extent().overlaps(label.get_window_extent())


def test_a_summary_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    summary = planted(tmp_path)
    text = json.dumps(summary).replace('"cost":', '"price":').replace('"teacher_predictions":', '"teacher_answers":')
    (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    assert read_summary(tmp_path) == summary


@pytest.mark.browser
def test_a_browser_shows_the_page_without_warnings(tmp_path: Path, chromium: str) -> None:
    planted(tmp_path / "one")
    page = write_report([tmp_path / "one"])
    line = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    line += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    line += ["--enable-logging=stderr", "--log-level=0", "--window-size=400,900", "--dump-dom", page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == 5


def test_a_summary_without_predictions_has_a_page(tmp_path: Path) -> None:
    runs = {"baseline": [{"seed": 0, "model": "simple", "parameters": 9, "val_acc": 0.5, "best_val_acc": 0.5}]}
    write_summary(summarize(runs, data="photos"), tmp_path)
    text = write_report([tmp_path]).read_text(encoding="utf-8")
    assert "50.00%" in text
    assert "<svg" not in text
    assert json.loads((tmp_path / "summary.json").read_text())["phases"]["baseline"]["measured"] is None


@pytest.mark.parametrize(("threads", "words"), [(1, "x86_64 with 1 thread;"), (2, "x86_64 with 2 threads;")])
def test_the_caption_names_the_hardware(threads: int, words: str) -> None:
    assert words in measured_with({"machine": "x86_64", "threads": threads})
