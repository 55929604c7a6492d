import math

import pytest

from kd.teachers import depends_on_class, is_no_better_than_chance, majority_share


@pytest.mark.parametrize(
    ("accuracy", "labels", "refused"),
    [
        (1.0, [0, 1] * 4, False),  # few images, but no errors
        (1.0, [0] * 10, False),
        (0.75, [0, 1] * 4, True),
        (0.5, [0, 1] * 5000, True),
        (0.51, [0, 1] * 5000, True),
        (0.52, [0, 1] * 5000, False),
        (0.9, [0] * 90 + [1] * 10, True),
        (0.0, [0, 1] * 4, True),
    ],
)
def test_chance_level_includes_the_sampling_error(accuracy: float, labels: list[int], refused: bool) -> None:
    assert is_no_better_than_chance(accuracy, labels, images=len(labels)) is refused


def test_a_teacher_that_tells_uneven_classes_apart_is_useful() -> None:
    labels = [0] * 950 + [1] * 50
    # 96.9 % correct, where a constant answer reaches 95 %: half of the rare class is found.
    decisions = [0] * 944 + [1] * 6 + [0] * 25 + [1] * 25
    assert sum(map(int.__eq__, labels, decisions)) == 969
    assert is_no_better_than_chance(0.969, labels, images=1000)
    assert depends_on_class(labels, decisions)
    # 94.5 % correct, less than a constant answer, but most of the rare class is found.
    decisions = [0] * 900 + [1] * 50 + [0] * 5 + [1] * 45
    assert is_no_better_than_chance(0.945, labels, images=1000)
    assert depends_on_class(labels, decisions)


@pytest.mark.parametrize(
    ("labels", "decisions"),
    [
        ([0] * 90 + [1] * 10, [0] * 100),  # constant
        ([0, 1] * 50, [0, 0, 1, 1] * 25),  # independent
        ([0, 1] * 50, [1, 0] * 50),  # exchanged
        ([0, 1, 1], [0, 1, 1]),  # too few images
        ([0] * 10, [0] * 10),
    ],
)
def test_predictions_that_say_nothing_of_the_class_are_recognized(labels: list[int], decisions: list[int]) -> None:
    assert not depends_on_class(labels, decisions)


def test_one_in_a_thousand_classifiers_at_chance_passes() -> None:
    labels = [0, 1] * 50
    limit = next(correct for correct in range(101) if not is_no_better_than_chance(correct / 100, labels, images=100))
    tails = [sum(math.comb(100, k) for k in range(correct, 101)) / 2**100 for correct in (limit - 1, limit)]
    assert tails[0] > 1e-3 >= tails[1]
    assert majority_share([0, 0, 1]) == pytest.approx(2 / 3)
