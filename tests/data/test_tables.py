"""Tables of images: CSV, TSV, JSON Lines and Parquet."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.data import Layout, read_splits
from kd.data.tables import read_table
from kd.errors import UserError

ROWS = [
    ("a/0.png", "cat", "train"),
    ("a/1.png", "dog", "train"),
    ("b/2.png", "cat", "val"),
    ("b/3.png", "dog", "validation"),
    ("b/4.png", "cat", "test"),
    ("b/5.png", "dog", "test"),
]


def write_images(folder: Path) -> None:
    for number, (path, _, _) in enumerate(ROWS):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, dtype=np.uint8)).save(folder / path)


def write_csv(path: Path, header: str = "path,label,split", separator: str = ",") -> None:
    path.write_text("\n".join([header, *(separator.join(row) for row in ROWS)]) + "\n", encoding="utf-8-sig")


def write_json_lines(path: Path) -> None:
    path.write_text(
        "".join(json.dumps(dict(zip(("file_name", "class", "set"), row, strict=True))) + "\n" for row in ROWS)
    )


def write_parquet(path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = dict(zip(("image", "category", "partition"), zip(*ROWS, strict=True), strict=True))
    parquet.write_table(pyarrow.table(columns), path)


FORMS: dict[str, Callable[[Path], None]] = {
    "labels.csv": write_csv,
    "semicolons.csv": lambda path: write_csv(path, "Path;Label;Split", ";"),
    "labels.tsv": lambda path: write_csv(path, "filename\ttarget\tsubset", "\t"),
    "labels.jsonl": write_json_lines,
    "labels.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_table_gives_the_same_splits(tmp_path: Path, name: str) -> None:
    write_images(tmp_path)
    FORMS[name](tmp_path / name)
    splits = read_splits(None, Layout(train_data=str(tmp_path / name)))
    assert splits.classes == ("cat", "dog")
    assert splits.test is not None
    for images, numbers in ((splits.train, [0, 1]), (splits.val, [2, 3]), (splits.test, [4, 5])):
        assert images.keys == [ROWS[number][0] for number in numbers]
        assert images.labels == [0, 1]
        assert [int(images.load(index)[0, 0, 0]) for index in range(2)] == [40 * number for number in numbers]


def test_tables_of_one_split_each_and_a_table_elsewhere(tmp_path: Path) -> None:
    images, tables = tmp_path / "images", tmp_path / "tables"
    write_images(images)
    tables.mkdir()
    for split, rows in (("train", ROWS[:2]), ("val", ROWS[2:4])):
        text = "path,label\n" + "".join(f"{path},{label}\n" for path, label, _ in rows)
        (tables / f"{split}.csv").write_text(text)
    layout = Layout(train_data=str(tables / "train.csv"), val_data=str(tables / "val.csv"))
    splits = read_splits(images, layout)
    assert (splits.name, len(splits.train), len(splits.val), splits.test) == ("images", 2, 2, None)


def test_columns_may_be_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_csv(tmp_path / "x.csv", "where,what,when")
    with pytest.raises(UserError, match=r"no column path or file .*; its columns: where, what, when; .* --path_column"):
        read_table(tmp_path / "x.csv")
    names = {"path_column": ["where"], "label_column": ["what"], "split_column": ["when"]}
    assert set(read_table(tmp_path / "x.csv", names)) == {"train", "val", "test"}
    assert set(read_table(tmp_path / "x.csv", names | {"split_column": []})) == {None}
    with pytest.raises(UserError, match=r"--split_column who: .* has no such column"):
        read_table(tmp_path / "x.csv", names | {"split_column": ["who"]})


def test_every_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [*(",".join(row) for row in ROWS[:2]), "absent.png,cat,train", ",cat,train", "a/0.png,dog,val"]
    rows += ["b/2.png,,val", "b/3.png,dog,holdout", "a/1.png,dog,train"]
    (tmp_path / "x.csv").write_text("\n".join(["path,label,split", *rows, *["gone.png,cat,train"] * 30]))
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / "x.csv")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'x.csv'}: 36 bad rows"
    expected = [
        "line 4: there is no file absent.png",
        "line 5: no path",
        "line 6: a/0.png was listed in line 2, there as 'cat', here as 'dog'",
        "line 7: b/2.png has no label",
        "line 8: b/3.png has the split 'holdout'",
        "line 9: a/1.png was listed in line 3",
    ]
    for line, text in zip(lines[1:], expected, strict=False):
        assert line.strip().startswith(text)
    assert lines[-2].strip() == "also lines 24-39"
    assert lines[-1].strip() == "if an image may have several labels, or none, add --multilabel"


def test_a_table_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", b"path,label\n", "this table has no rows"),
        ("b.jsonl", b'{"path": "x"}\n{"path"', "b.jsonl: line 2: not valid JSON"),
        ("c.jsonl", b"[1]\n", "c.jsonl: line 1: not a JSON object"),
        ("d.csv", b"\xff\xfe\x00", "can't be read as a table"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / name)
    pytest.importorskip("pyarrow")
    (tmp_path / "e.parquet").write_bytes(b"none")
    with pytest.raises(UserError, match="can't be read as a Parquet file"):
        read_table(tmp_path / "e.parquet")


def test_numbers_as_labels_are_read_as_they_are_written(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [
        {"path": path, "label": float(number % 2) if number < 3 else number % 2}
        for number, (path, _, _) in enumerate(ROWS)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (listing,) = read_table(tmp_path / "x.jsonl").values()
    assert listing.classes == ("0", "1")
