import io
from typing import Any

import pytest
from scipy import stats

from kd.console import make_console
from kd.report import compare_objectives, print_comparison
from kd.report.verdict import significance


def runs(**accuracies: list[float]) -> list[dict[str, Any]]:
    return [
        {"objective": objective, "seed": seed, "val_acc": accuracy}
        for objective, by_seed in accuracies.items()
        for seed, accuracy in enumerate(by_seed)
    ]


def printed(rows: list[dict[str, Any]]) -> list[str]:
    console = make_console(file=io.StringIO())
    console.width = 80
    print_comparison({"compared": rows, "metric": {"title": "accuracy"}}, console)
    output: Any = console.file
    lines: list[str] = output.getvalue().splitlines()
    return lines


GOOD, NEAR, FAR = [0.90, 0.92, 0.88, 0.91], [0.91, 0.90, 0.89, 0.90], [0.80, 0.83, 0.77, 0.81]


def test_objectives_are_sorted_and_compared_with_the_best_by_seed() -> None:
    rows = compare_objectives(runs(far=FAR, near=NEAR, good=GOOD))
    assert [row["objective"] for row in rows] == ["good", "near", "far"]
    assert rows[0]["difference"] is None
    assert rows[2]["val_acc_std"] == pytest.approx(0.025)
    assert rows[2]["difference"]["mean"] == pytest.approx(-0.1)
    # Bonferroni: two comparisons at 95 % together are two at 97.5 %.
    interval = stats.ttest_rel(FAR, GOOD).confidence_interval(0.975)
    assert rows[2]["difference"]["interval"] == pytest.approx([interval.low, interval.high])
    assert [significance(row["difference"]) for row in rows] == [None, 0, -1]


def test_a_difference_must_remain_significant_among_all_comparisons() -> None:
    close = [accuracy - gap for accuracy, gap in zip(GOOD, (0.001, 0.012, 0.008, 0.009), strict=True)]
    assert 0.05 / 4 < stats.ttest_rel(GOOD, close).pvalue < 0.05
    assert significance(compare_objectives(runs(good=GOOD, close=close))[1]["difference"]) == -1
    others = {f"near{index}": [accuracy + 0.0001 * index for accuracy in NEAR] for index in range(3)}
    rows = {row["objective"]: row for row in compare_objectives(runs(good=GOOD, close=close, **others))}
    assert significance(rows["close"]["difference"]) == 0


def test_the_significance_of_each_printed_row_agrees_with_its_interval() -> None:
    close = [accuracy - gap for accuracy, gap in zip(GOOD, (0.001, 0.012, 0.008, 0.009), strict=True)]
    lines = printed(compare_objectives(runs(good=GOOD, close=close, near=NEAR, far=FAR)))
    for name, is_significant in (("close", False), ("near", False), ("far", True)):
        cells = next(line for line in lines if line.startswith(f" {name} ")).split()
        low, high, significant = float(cells[5]), float(cells[7]), cells[8]
        assert (low > 0 or high < 0) == (significant == "yes") == is_significant


def test_one_seed_has_no_interval() -> None:
    rows = compare_objectives(runs(a=[0.9], b=[0.8]))
    assert rows[1]["difference"] == {
        "mean": pytest.approx(-0.1),
        "std": None,
        "interval": None,
        "runs": [{"seed": 0, "val_acc": pytest.approx(-0.1)}],
    }
    lines = printed(rows)
    assert lines[-1].startswith("One seed can't separate a difference from noise")
    assert lines[-2].rstrip().endswith("n/a")


def test_equal_objectives_do_not_differ_and_constant_differences_do() -> None:
    assert significance(compare_objectives(runs(a=GOOD, b=GOOD))[1]["difference"]) == 0
    assert significance(compare_objectives(runs(a=[0.5, 0.75], b=[0.25, 0.5]))[1]["difference"]) == -1


def test_no_runs_give_no_rows() -> None:
    assert compare_objectives([]) == []


def test_the_printed_table_describes_its_statistics() -> None:
    lines = printed(compare_objectives(runs(**{"kl[x]": GOOD}, far=FAR)))
    assert lines[0].startswith("Objectives, best first")
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[-3].split() == ["kl[x]", "90.25%", "±", "1.71", "best"]
    assert lines[-2].split()[:5] == ["far", "80.25%", "±", "2.50", "-10.00"]
    assert lines[-2].split()[-1] == "yes"
    assert "standard deviation over 4 seeds" in lines[-1]
    assert "simultaneous (Bonferroni: 1 differences, 2 gains)" in lines[-1]
