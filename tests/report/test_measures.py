"""The metrics of a report, each against an independent implementation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from kd.report.measures import Predictions, aggregate, compare, measure
from kd.training.predictions import write_predictions

CLASSES = tuple("abcdefg")


def predictions(seed: int, count: int = 300, classes: tuple[str, ...] = CLASSES) -> Predictions:
    generator = np.random.default_rng(seed)
    labels = np.random.default_rng(9).integers(0, len(classes), count)
    logits = 2 * generator.normal(size=(count, len(classes)))
    logits[np.arange(count), labels] += 1.5
    return Predictions(logits, labels, np.array([f"{index}.png" for index in range(count)]), classes)


def test_metrics_equal_those_of_other_libraries() -> None:
    one = predictions(0)
    metrics, probabilities = measure(one), one.probabilities()
    assert metrics["accuracy"] == pytest.approx(accuracy_score(one.labels, one.decisions))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(one.labels, one.decisions))
    assert metrics["macro_f1"] == pytest.approx(f1_score(one.labels, one.decisions, average="macro"))
    assert metrics["auroc"] == pytest.approx(roc_auc_score(one.labels, probabilities, multi_class="ovr"), abs=1e-6)
    assert metrics["constant"] == np.bincount(one.labels).max() / 300
    assert metrics["precision"] == pytest.approx(precision_score(one.labels, one.decisions, average=None))
    assert metrics["support"] == np.bincount(one.labels).tolist()
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(one.labels, probabilities, k=5))
    assert metrics["nll"] == pytest.approx(log_loss(one.labels, probabilities))
    assert metrics["per_class"] == pytest.approx(recall_score(one.labels, one.decisions, average=None))
    assert metrics["confusion"] == confusion_matrix(one.labels, one.decisions).tolist()
    confidence, correct = probabilities.max(axis=1), one.decisions == one.labels
    index = np.digitize(confidence, np.linspace(0, 1, 16))
    gaps = [abs((correct[index == number] - confidence[index == number]).sum()) for number in range(16)]
    assert metrics["ece"] == pytest.approx(sum(gaps) / 300, abs=1e-6)
    assert sum(one["count"] for one in metrics["bins"]) == 300


def test_divergence_from_the_teacher_equals_that_of_torch() -> None:
    student, teacher = predictions(0), predictions(1)
    metrics = compare(student, teacher)
    assert metrics is not None
    log_student, log_teacher = (F.log_softmax(torch.tensor(one.logits), dim=1) for one in (student, teacher))
    expected = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    assert metrics["kl_to_teacher"] == pytest.approx(float(expected))
    assert metrics["agreement"] == pytest.approx(accuracy_score(teacher.decisions, student.decisions))
    assert compare(teacher, teacher) == {"agreement": 1.0, "kl_to_teacher": 0.0}


def test_predictions_for_different_images_are_not_compared() -> None:
    assert compare(predictions(0), predictions(1, count=299)) is None
    assert compare(predictions(0), predictions(1, classes=tuple("abcdefh"))) is None


def test_few_classes_have_no_top5_and_classes_without_images_no_accuracy() -> None:
    few = predictions(0, classes=tuple("abc"))
    assert measure(few)["top5"] is None
    kept = few.labels != 1
    some = Predictions(few.logits[kept], few.labels[kept], few.keys[kept], few.classes)
    metrics = measure(some)
    assert [one is None for one in metrics["per_class"]] == [False, True, False]
    # Means are taken over the classes that have images.
    recalls = [recall for recall in metrics["per_class"] if recall is not None]
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    areas = [roc_auc_score(some.labels == label, some.probabilities()[:, label]) for label in (0, 2)]
    assert metrics["auroc"] == pytest.approx(np.mean(areas), abs=1e-6)


def test_metrics_are_aggregated_over_seeds() -> None:
    runs: list[Any] = [measure(predictions(seed)) for seed in range(3)]
    facts = aggregate(runs)
    accuracies = [run["accuracy"] for run in runs]
    assert facts["accuracy"] == pytest.approx({"mean": np.mean(accuracies), "std": np.std(accuracies, ddof=1)})
    assert facts["agreement"] is None
    assert np.sum(facts["confusion"]) == 900
    error = sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in facts["bins"] if one["count"]) / 900
    assert error <= facts["ece"]["mean"] + 1e-6
    assert aggregate(runs[:1])["nll"] == {"mean": runs[0]["nll"], "std": None}


def test_extreme_logits_stay_finite() -> None:
    one = predictions(0)
    extreme = Predictions(1e4 * np.sign(one.logits), one.labels, one.keys, one.classes)
    assert np.isfinite([measure(extreme)[name] for name in ("accuracy", "nll", "ece")]).all()


def test_predictions_are_read_without_pickles(tmp_path: Path) -> None:
    one = predictions(0)
    arrays = {"logits": one.logits, "labels": one.labels, "keys": one.keys, "classes": np.array(one.classes)}
    write_predictions(arrays, tmp_path / "some" / "predictions.npz")
    again = Predictions.read(tmp_path / "some" / "predictions.npz")
    assert again is not None
    np.testing.assert_array_equal(again.logits, one.logits)
    assert again.classes == CLASSES
    np.savez(tmp_path / "pickle.npz", logits=np.array([print], dtype=object), labels=one.labels)
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04")
    assert [Predictions.read(tmp_path / name) for name in ("pickle.npz", "half.npz", "none.npz")] == [None] * 3
    assert Predictions.read(None) is None
