import io
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from kd.report import compare_objectives, print_comparison


def runs(**accuracies: list[float]) -> list[dict[str, Any]]:
    return [
        {"objective": objective, "seed": seed, "val_acc": accuracy}
        for objective, of_seeds in accuracies.items()
        for seed, accuracy in enumerate(of_seeds)
    ]


GOOD, NEAR, FAR = [0.90, 0.92, 0.88, 0.91], [0.91, 0.90, 0.89, 0.90], [0.80, 0.83, 0.77, 0.81]


def test_objectives_are_sorted_and_compared_with_the_best_by_seed() -> None:
    rows = compare_objectives(runs(far=FAR, near=NEAR, good=GOOD))
    assert [row["objective"] for row in rows] == ["good", "near", "far"]
    far = rows[2]
    expected = stats.ttest_rel(FAR, GOOD)
    interval = expected.confidence_interval(0.95)
    assert far["behind"] == pytest.approx(-0.1)
    assert far["interval"] == pytest.approx([interval.low, interval.high])
    assert far["val_acc_std"] == pytest.approx(0.025)
    assert [row["is_beyond_noise"] for row in rows[1:]] == [False, True]


def test_a_difference_must_hold_among_all_that_were_looked_at() -> None:
    # By itself p = 0.03: a difference. As the best of four looks it is none.
    close = [one - gap for one, gap in zip(GOOD, (0.001, 0.012, 0.008, 0.009), strict=True)]
    p = stats.ttest_rel(GOOD, close).pvalue
    assert 0.05 / 4 < p < 0.05
    assert compare_objectives(runs(good=GOOD, close=close))[1]["is_beyond_noise"] is True
    others = {f"near{index}": [one + 0.0001 * index for one in NEAR] for index in range(3)}
    rows = {row["objective"]: row for row in compare_objectives(runs(good=GOOD, close=close, **others))}
    assert rows["close"]["is_beyond_noise"] is False


def test_one_seed_can_not_tell() -> None:
    rows = compare_objectives(runs(a=[0.9], b=[0.8]))
    assert [row["is_beyond_noise"] for row in rows] == [None, None]
    assert rows[1]["interval"] is None
    assert rows[1]["behind"] == pytest.approx(-0.1)
    output = io.StringIO()
    print_comparison(rows, Console(file=output, width=80))
    assert "One seed can't tell" in output.getvalue()
    assert output.getvalue().splitlines()[-2].rstrip().endswith("can't tell")


def test_equal_objectives_do_not_differ_and_constant_gaps_do() -> None:
    rows = compare_objectives(runs(a=GOOD, b=GOOD))
    assert rows[1]["is_beyond_noise"] is False
    rows = compare_objectives(runs(a=[0.5, 0.75], b=[0.25, 0.5]))
    assert rows[1]["is_beyond_noise"] is True


def test_nothing_to_compare_is_nothing() -> None:
    assert compare_objectives([]) == []


def test_the_table_says_what_was_compared() -> None:
    output = io.StringIO()
    print_comparison(compare_objectives(runs(**{"kl[x]": GOOD}, far=FAR)), Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("Objectives, best first")
    assert lines[-3].split() == ["kl[x]", "90.25%", "±", "1.71", "best"]
    assert lines[-2].split()[:5] == ["far", "80.25%", "±", "2.50", "-10.00"]
    assert lines[-2].split()[-1] == "yes"
    assert lines[-1] == "Mean ± standard deviation over 4 seeds; differences are paired by seed, in points."
