import math

import pytest

from kd.teachers import is_no_better_than_chance, majority_share


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


def test_one_in_a_thousand_classifiers_at_chance_passes() -> None:
    labels = [0, 1] * 50
    limit = next(correct for correct in range(101) if not is_no_better_than_chance(correct / 100, labels, images=100))
    tails = [sum(math.comb(100, k) for k in range(correct, 101)) / 2**100 for correct in (limit - 1, limit)]
    assert tails[0] > 1e-3 >= tails[1]
    assert majority_share([0, 0, 1]) == pytest.approx(2 / 3)
