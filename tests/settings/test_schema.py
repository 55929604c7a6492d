import pytest

from kd.errors import UserError
from kd.settings import (
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    PhaseSettings,
    Settings,
    check_ranges,
    setting_fields,
)


def test_each_setting_has_one_name_and_words_for_help() -> None:
    names = [one.name for _, one in setting_fields()]
    assert len(names) == len(set(names))
    assert all(one.metadata["help"] for _, one in setting_fields())


def test_flat_holds_plain_values_and_no_sources() -> None:
    flat = Settings().flat()
    assert flat["loss"] == ["ce=0.1", "kl=0.9"]
    assert "args_file" not in flat
    assert "config" not in flat
    assert all(isinstance(value, str | int | float | bool | list | None) for value in flat.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(optimization=OptimizationSettings(momentum=1.0)), "--momentum must be below 1, and is 1.0"),
        (
            Settings(optimization=OptimizationSettings(learning_rate=float("inf"))),
            "--learning_rate must be finite, and is inf",
        ),
        (Settings(phases=PhaseSettings(seeds=0)), "here: --seeds must be at least 1, and is 0"),
        (Settings(data=DataSettings(train_fraction=0.0)), "--train_fraction must be above 0, and is 0.0"),
        (Settings(data=DataSettings(train_fraction=1.5)), "--train_fraction must be at most 1, and is 1.5"),
        (
            Settings(models=ModelSettings(teacher_weights=(1.0, -0.5))),
            "--teacher_weights must be at least 0, and is -0.5",
        ),
        (
            Settings(models=ModelSettings(teacher_image_size=(32, 0))),
            "--teacher_image_size must be at least 1, and is 0",
        ),
        (Settings(data=DataSettings(mixup=-1.0)), "--mixup must be at least 0, and is -1.0"),
        (Settings(optimization=OptimizationSettings(ema=1.0)), "--ema must be below 1, and is 1.0"),
        (
            Settings(data=DataSettings(train_fraction=float("nan"))),
            "--train_fraction must be finite, and is nan",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_flag_and_source(settings: Settings, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_ranges(settings, frozenset(settings.flat()), origin="here")


def test_only_the_named_settings_are_looked_at() -> None:
    check_ranges(Settings(phases=PhaseSettings(seeds=0)), frozenset({"seed"}), origin="here")
