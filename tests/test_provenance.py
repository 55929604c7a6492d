"""What identifies the user's code."""

from pathlib import Path

from kd.provenance import code_digests


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    for name, factor in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "losses.py").write_text(f"import helpers\n\nFACTOR = {factor}\n")
        (tmp_path / name / "helpers.py").write_text("")
    digests = code_digests([f"{tmp_path}/one/losses.py:f=1", f"{tmp_path}/two/losses.py:f=1"])
    assert list(digests) == ["one/helpers.py", "one/losses.py", "two/helpers.py", "two/losses.py"]
    assert digests["one/losses.py"] != digests["two/losses.py"]
    assert digests["one/helpers.py"] == digests["two/helpers.py"]


def test_moved_code_is_the_same_and_edited_code_is_not(tmp_path: Path) -> None:
    original = tmp_path / "losses.py"
    original.write_text("FACTOR = 1\n")
    first = code_digests([f"'{original}:f(beta=2)'=1"])
    (tmp_path / "elsewhere").mkdir()
    moved = original.rename(tmp_path / "elsewhere" / "losses.py")
    assert code_digests([f"{moved}:f"]) == first
    moved.write_text("FACTOR = 2\n")
    assert code_digests([f"{moved}:f"]) != first
