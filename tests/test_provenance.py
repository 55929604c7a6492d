"""What identifies the user's code."""

from pathlib import Path

from kd.files import sha256_of
from kd.provenance import code_digests, without_folders


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


def test_the_configuration_of_a_network_in_a_folder_is_part_of_its_definition(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    before = code_digests([f"transformers/{tmp_path}/here(depth=2)"])
    assert set(before) == {"config.json"}
    assert code_digests([f"timm/local-dir:{tmp_path}/there"]) == before
    (tmp_path / "there" / "config.json").write_text('{"hidden_act": "relu"}')
    assert code_digests([f"timm/local-dir:{tmp_path}/there"]) != before


def test_a_network_is_described_without_its_folders() -> None:
    assert without_folders("a/b/mine.py:net(width=2)") == "mine.py:net(width=2)"
    assert without_folders("transformers//data/vit(depth=2)") == "transformers/vit(depth=2)"
    assert without_folders("timm/local-dir:nets/small") == "timm/local-dir:small"
    assert (
        without_folders("simkd(student='a/mine.py:net', teacher='timm/x')")
        == "simkd(student='mine.py:net', teacher='timm/x')"
    )


def test_the_hash_of_a_folder_covers_all_its_weights_and_its_configuration(tmp_path: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "optimizer.pt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint-500").mkdir()
    before = sha256_of(tmp_path)
    (tmp_path / "optimizer.pt").write_text("changed" * 100)
    assert sha256_of(tmp_path) == before
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("changed")
        assert sha256_of(tmp_path) != before
        before = sha256_of(tmp_path)
