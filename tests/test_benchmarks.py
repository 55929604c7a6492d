"""What the benchmark computes from what it measured; the measuring itself is no test's affair."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.__main__ import as_markdown, write
from benchmarks.images import linked, photographs
from benchmarks.processes import Way, ratio, take_turns
from kd.data import read_folder


def test_a_ratio_is_the_median_of_the_ratios_by_round() -> None:
    # In the third round the machine was twice as slow, for both.
    assert ratio([8.0, 9.0, 16.0], [4.0, 3.0, 8.0]) == {"median": 2.0, "low": 2.0, "high": 2.5}


def test_images_are_linked_class_by_class_until_there_are_enough(tmp_path: Path) -> None:
    given = photographs(tmp_path / "given", classes=3, count=2)
    with Image.open(given / "class0" / "1.jpg") as image:
        assert image.size == (500, 375)
    images = read_folder(linked(given, tmp_path / "linked", 10))
    assert [images.labels.count(label) for label in range(3)] == [4, 3, 3]


def test_rows_that_were_not_measured_now_stay(tmp_path: Path) -> None:
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
    assert "GPU could be had: its rows are still missing" in page


def test_a_table_has_as_many_cells_in_each_line() -> None:
    rows: list[dict[str, Any]] = [
        {"row": "start", "pair": None, "seconds": {"help": 0.5}},
        {"row": "live", "pair": "a to b"},
    ]
    assert len({line.count("|") for line in as_markdown(rows).splitlines()}) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_ways_train_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    folder = photographs(tmp_path / "given", classes=2, count=4)
    networks = {"teacher_name": "simple", "student_name": "simple", "image_size": 32, "batch_size": 4}
    ways = {
        "plain": Way("plain", folder, **networks),  # type: ignore[arg-type]
        "limit": Way("limit", folder, **networks, bfloat16=False, stored=False),  # type: ignore[arg-type]
        "ours": Way("ours", folder, **networks, stored=True, store=tmp_path / "logits"),  # type: ignore[arg-type]
    }
    taken = take_turns(ways, 2, steps=dict.fromkeys(ways, 1), warm_up=dict.fromkeys(ways, 3))
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in taken.values())
    assert all(way.peak_mb > 100 for way in ways.values())
    assert multiprocessing.active_children() == []
