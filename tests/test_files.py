import json
import os
import stat
from pathlib import Path

import pytest

from kd.files import write_atomically, write_json, write_text


def test_a_file_is_replaced_and_no_temporary_file_remains(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text.txt"
    write_text(path, "first")
    write_text(path, "ä second")
    assert path.read_text(encoding="utf-8") == "ä second"
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), write_atomically(path) as file:
        file.write(bytes([1 // 0]))
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_exists_until_the_new_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    write_text(path, "old")
    with write_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "text.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "text.txt").stat().st_mode) == 0o640


def test_json_round_trip(tmp_path: Path) -> None:
    values = {"list": [1, 2.5, None], "text": "ä"}
    write_json(tmp_path / "values.json", values)
    assert json.loads((tmp_path / "values.json").read_text(encoding="utf-8")) == values
