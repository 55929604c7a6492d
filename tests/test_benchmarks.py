"""Helpers of the benchmarks; no test measures time."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.__main__ import as_markdown, write
from benchmarks.images import link_images, write_photos
from benchmarks.plain import Task
from benchmarks.processes import Method, measure_alternately, speedup
from kd.data import read_folder


def test_a_speedup_is_the_median_of_the_ratios_within_rounds() -> None:
    # In the third round, other load halves the speed of both.
    assert speedup([8.0, 9.0, 16.0], [4.0, 3.0, 8.0]) == {"median": 2.0, "low": 2.0, "high": 2.5}


def test_linked_images_are_balanced_over_the_classes(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", classes=3, count=2)
    with Image.open(source / "class0" / "1.jpg") as image:
        assert image.size == (500, 375)
    images = read_folder(link_images(source, tmp_path / "linked", 10))
    assert [images.labels.count(label) for label in range(3)] == [4, 3, 3]


def test_rows_that_are_not_measured_again_are_kept(tmp_path: Path) -> None:
    empty = dict.fromkeys(("against_plain", "against_limit", "against_torchdistill"))
    ratios = {"median": 5.357, "low": 5.0, "high": 5.5}
    first = [{"row": "live", "pair": "a to b", **empty}, {"row": "stored", "pair": "a to b", **empty}]
    write(first, {"rounds": 3}, tmp_path)
    path = write([first[0] | {"against_plain": ratios, "peak_mb": {"plain": 1200}}], {"rounds": 5}, tmp_path)
    rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [(row["row"], row["against_plain"]) for row in rows] == [("live", ratios), ("stored", None)]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| live | a to b |  | 5.36 (5.00 to 5.50) |" in page
    assert "plain 1,200" in page
    assert "Not yet measured on a GPU" in page


def test_all_lines_of_a_table_have_the_same_number_of_cells() -> None:
    rows: list[dict[str, Any]] = [
        {"row": "start", "pair": None, "seconds": {"help": 0.5}},
        {"row": "live", "pair": "a to b"},
    ]
    assert len({line.count("|") for line in as_markdown(rows).splitlines()}) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_methods_are_measured_alternately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    folder = write_photos(tmp_path / "source", classes=2, count=4)
    task = Task(folder, image_size=32, batch_size=4)
    methods = {
        "plain": Method("plain", task),
        "limit": Method("limit", task, bfloat16=False, stored=False),
        "kd": Method("kd", task, stored=True, store=tmp_path / "logits"),
    }
    order = []

    def seconds(method: Method, steps: int, *, warm_up: int) -> float:
        order.append(method.kind)
        return measure(method, steps, warm_up=warm_up)

    measure = Method.seconds
    monkeypatch.setattr(Method, "seconds", seconds)
    timings = measure_alternately(methods, 2, steps=dict.fromkeys(methods, 1), warm_up=dict.fromkeys(methods, 3))
    assert order == ["plain", "limit", "kd", "kd", "limit", "plain"]
    assert {name: len(values) for name, values in timings.items()} == dict.fromkeys(methods, 2)
    assert all(method.peak_mb > 100 for method in methods.values())
    assert multiprocessing.active_children() == []
