"""Whether distillation helped: constructed cases, and the interval against scipy's paired t-test."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from kd.report import gain_sentence, paired_difference, summarize
from kd.report.verdict import confidence_interval

BASELINE = (0.70, 0.72, 0.71)


def runs(accuracies: tuple[float, ...], **facts: Any) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "model": "simple", "parameters": 9, "val_acc": accuracy} | facts
        for seed, accuracy in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("distilled", "expected"),
    [
        (
            (0.73, 0.752, 0.741),
            "Distillation improved accuracy by 3.1 points (95 % confidence interval 2.9 to 3.3, 3 seeds).",
        ),
        (
            (0.71, 0.71, 0.712),
            "No significant difference: +0.1 points (95 % confidence interval -2.4 to +2.6, 3 seeds).",
        ),
        (
            (0.68, 0.698, 0.689),
            "Distillation reduced accuracy by 2.1 points (95 % confidence interval 1.9 to 2.3, 3 seeds).",
        ),
        (
            (0.80,),
            "Distillation changed accuracy by +10.0 points; one seed can't separate a gain from noise, use --seeds 3.",
        ),
    ],
)
def test_the_verdict_distinguishes_gain_loss_no_difference_and_one_seed(
    distilled: tuple[float, ...], expected: str
) -> None:
    assert gain_sentence(summarize({"baseline": runs(BASELINE), "distilled": runs(distilled)}, data="d")) == expected


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    baseline, distilled = generator.normal(0.7, 0.01, 5), generator.normal(0.72, 0.01, 5)
    difference = paired_difference(runs(tuple(distilled)), runs(tuple(baseline)))
    assert difference is not None
    assert difference["interval"] == pytest.approx(stats.ttest_rel(distilled, baseline).confidence_interval(0.95))
    assert difference["std"] == pytest.approx(np.std(distilled - baseline, ddof=1))


def test_95_percent_of_the_intervals_contain_the_true_difference() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = confidence_interval(generator.normal(0.03, 0.02, 3).tolist()) or (0.0, 0.0)
        hits += low <= 0.03 <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_best_of_several_ineffective_objectives_is_rarely_significant() -> None:
    generator = np.random.default_rng(0)
    false_gains = 0
    for _ in range(2000):
        # Four objectives as good as the labels alone; the best of them over the same three seeds.
        accuracies = generator.normal(0.7, 0.01, (5, 3))
        best = max(accuracies[1:], key=np.mean)
        low, _ = confidence_interval((best - accuracies[0]).tolist(), comparisons=4) or (0.0, 0.0)
        false_gains += low > 0
    assert false_gains / 2000 <= 0.03


def test_the_best_of_several_objectives_has_a_corrected_interval() -> None:
    def sentence(*objectives: tuple[float, ...]) -> str:
        compared = [
            run for number, accuracies in enumerate(objectives) for run in runs(accuracies, objective=f"kl={number}")
        ]
        baseline = runs(BASELINE[: len(objectives[0])])
        return gain_sentence(summarize({"baseline": baseline, "compared": compared}, data="d"))

    # Gains of 2, 3 and 4 points: the margin is Student's t with 2 degrees of freedom, 4.303 or 6.205, by the root of 3.
    gains = (0.72, 0.75, 0.75)
    assert sentence(gains) == (
        "Objective kl=0, accuracy 74.00%. Distillation improved accuracy by 3.0 points "
        "(95 % confidence interval 0.5 to 5.5, 3 seeds)."
    )
    assert sentence(BASELINE, gains) == (
        "Best of 2 objectives: kl=1, accuracy 74.00%. No significant difference: +3.0 points "
        "(95 % confidence interval -0.6 to +6.6, corrected for 2 objectives, 3 seeds)."
    )
    assert sentence((0.72,), (0.71,)).endswith("+2.0 points; one seed can't separate a gain from noise, use --seeds 3.")
