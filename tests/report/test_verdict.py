"""Whether distillation was worth it: planted cases, and the interval against scipy's own test."""

import numpy as np
import pytest
from scipy import stats

from kd.report import gain_sentence, summarize
from kd.report.verdict import paired

ALONE = (0.70, 0.72, 0.71)


def sentence(distilled: tuple[float, ...], alone: tuple[float, ...] = ALONE) -> str:
    def runs(accuracies: tuple[float, ...]) -> list[dict[str, object]]:
        return [
            {"seed": seed, "model": "simple", "parameters": 9, "val_acc": accuracy}
            for seed, accuracy in enumerate(accuracies)
        ]

    return gain_sentence(summarize({"baseline": runs(alone), "distilled": runs(distilled)}, data="photos"))


@pytest.mark.parametrize(
    ("distilled", "expected"),
    [
        ((0.73, 0.752, 0.741), "Distillation gained 3.1 points (2.9 to 3.3; by seed +3.0, +3.2, +3.1)."),
        (
            (0.71, 0.71, 0.712),
            "No gain beyond the noise between seeds: +0.1 points (-2.4 to +2.6; by seed +1.0, -1.0, +0.2).",
        ),
        ((0.68, 0.698, 0.689), "Distillation lost 2.1 points (1.9 to 2.3; by seed -2.0, -2.2, -2.1)."),
        ((0.80,), "Distillation: +10.0 points; one seed can't tell a gain from the noise (--seeds 3 repeats it)."),
    ],
)
def test_better_the_same_worse_and_one_seed_are_told_apart(distilled: tuple[float, ...], expected: str) -> None:
    assert sentence(distilled) == expected


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    alone, distilled = generator.normal(0.7, 0.01, 5), generator.normal(0.72, 0.01, 5)
    known = paired((distilled - alone).tolist())
    expected = stats.ttest_rel(distilled, alone)
    low, high = expected.confidence_interval(0.95)
    assert known.interval == pytest.approx((low, high))
    assert known.p == pytest.approx(expected.pvalue)
    assert known.std == pytest.approx(np.std(distilled - alone, ddof=1))


def test_19_in_20_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        interval = paired(generator.normal(0.03, 0.02, 3).tolist()).interval
        assert interval is not None
        hits += interval[0] <= 0.03 <= interval[1]
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_best_of_several_that_gain_nothing_is_no_gain() -> None:
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        # Four objectives as good as the labels alone; the best of them, over the same three students.
        accuracies = generator.normal(0.7, 0.01, (5, 3))
        best = max(accuracies[1:], key=np.mean)
        interval = paired((best - accuracies[0]).tolist(), looks=4).interval
        assert interval is not None
        found += interval[0] > 0
    assert found / 2000 <= 0.03


def test_of_several_objectives_the_best_is_named_and_its_gain_widened() -> None:
    def summary(*objectives: tuple[float, ...]) -> str:
        runs = [
            {"objective": f"kl={number}", "seed": seed, "model": "simple", "parameters": 9, "val_acc": accuracy}
            for number, accuracies in enumerate(objectives)
            for seed, accuracy in enumerate(accuracies)
        ]
        alone = [
            {"seed": seed, "model": "simple", "parameters": 9, "val_acc": accuracy}
            for seed, accuracy in enumerate(ALONE[: len(objectives[0])])
        ]
        return gain_sentence(summarize({"baseline": alone, "compared": runs}, data="photos"))

    # Gains of 2, 3 and 4 points: 1 over the root of 3, times Student's t for 2 degrees of freedom, 4.303 and 6.205.
    gains = (0.72, 0.75, 0.75)
    over = "at 74.00%: +3.00 points over the student alone"
    assert summary(gains) == f"kl=0 came out {over} (+0.52 to +5.48)."
    wide = "no gain beyond the noise between seeds (-0.58 to +6.58, widened for the best of 2)"
    assert summary(ALONE, gains) == f"Of 2 objectives kl=1 came out best, {over}, {wide}."
    one = "one seed can't tell a gain from the noise (--seeds 3 repeats it)"
    assert summary((0.72,), (0.71,)).endswith(f"at 72.00%: +2.00 points over the student alone; {one}.")
