import pytest

from kd.errors import UserError
from kd.settings import (
    Settings,
    field_type,
    resolve,
    searchable_settings,
    setting_fields,
    settings_affecting,
    unsupported_by_streams,
)

FACTS = {
    "help",
    "affects",
    "searchable",
    "per_machine",
    "not_for_streams",
    "streams_allow",
    "bare",
    "formerly",
    "known_as",
    "is_path",
}


def test_each_setting_has_one_name_and_declares_its_facts() -> None:
    names = [declared.name for _, declared in setting_fields()]
    assert len(names) == len(set(names))
    for _, declared in setting_fields():
        assert set(declared.metadata) == FACTS, f"{declared.name}: declare it with kd.settings.declaration.setting"
        assert declared.metadata["help"]
        assert declared.metadata["affects"] <= {"teacher", "baseline", "distilled"}


def test_flat_holds_plain_values_and_no_sources() -> None:
    flat = Settings().flat()
    assert flat["loss"] == ["ce=0.1", "kl=0.9"]
    assert "args_file" not in flat
    assert "config" not in flat
    assert all(isinstance(value, str | int | float | bool | list | None) for value in flat.values())


def test_settings_that_affect_a_phase_differ_by_phase() -> None:
    assert {"teacher_epochs", "batch_size"} <= set(settings_affecting("teacher"))
    assert {"train_fraction", "batch_size"} <= set(settings_affecting("baseline"))
    assert set(settings_affecting("distilled")) - set(settings_affecting("baseline")) >= {"loss", "temperature"}
    assert "name" not in {*settings_affecting("teacher"), *settings_affecting("distilled")}


def test_searchable_settings_and_their_types() -> None:
    assert {"loss", "learning_rate", "student_model"} <= set(searchable_settings())
    assert not {"seed", "data_dir", "teacher_model"} & set(searchable_settings())
    assert field_type("temperature") == float | None


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--image_cache none --teacher_cache none --augment_on cpu", []),
        ("--image_cache here", ["--image_cache here"]),
        ("--train_fraction 0.5 --unlabeled_rest", ["--train_fraction 0.5", "--unlabeled_rest"]),
        ("--augment_on device --teacher_top 3", ["--augment_on device", "--teacher_top 3"]),
    ],
)
def test_settings_that_streams_cannot_have_are_named_with_their_values(line: str, flags: list[str]) -> None:
    assert [flag for flag, _ in unsupported_by_streams(resolve(line.split()).settings)] == flags


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--momentum 1.0", "--momentum 1.0: must be below 1"),
        ("--learning_rate inf", "--learning_rate inf: must be finite"),
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--train_fraction 0", "--train_fraction 0: must be above 0"),
        ("--train_fraction 1.5", "--train_fraction 1.5: must be at most 1"),
        ("--train_fraction nan", "--train_fraction nan: must be finite"),
        ("--ensemble_weights 1.0 -0.5", "--ensemble_weights -0.5: must be at least 0"),
        ("--teacher_image_size 32 0", "--teacher_image_size 0: must be at least 1"),
        ("--mixup -1", "--mixup -1: must be at least 0"),
        ("--ema 1.0", "--ema 1.0: must be below 1"),
        ("--num_classes 1", "--num_classes 1: must be at least 2"),
        ("--limit_train_batches 0", "--limit_train_batches 0: must be above 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_flag(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(line.split())
    assert str(caught.value) == words
