import inspect
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from kd.errors import UserError
from kd.losses import LOSSES, CrossEntropy, LogitMSE, NormalizedKD, Outputs, Pair, SoftenedKL, build_objective
from kd.losses.objective import standardized


def outputs(seed: int) -> Outputs:
    return Outputs(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)))


LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("terms", ["ce=0.1 kl=0.9", ["ce=0.1", "kl=0.9"], {"ce": 0.1, "kl": 0.9}, ["ce=0.1 kl=0.9"]])
def test_an_objective_is_the_weighted_sum_of_its_unweighted_terms(
    terms: str | Sequence[str] | Mapping[str, float],
) -> None:
    student, teacher = outputs(0), outputs(1)
    total, values = build_objective(terms, temperature=2.0)(student, teacher, LABELS)
    ce = CrossEntropy()(student.logits, teacher.logits, LABELS)
    kl = SoftenedKL(temperature=2.0)(student.logits, teacher.logits, LABELS)
    assert list(values) == ["ce", "kl"]
    torch.testing.assert_close(values["ce"], ce)
    torch.testing.assert_close(values["kl"], kl)
    torch.testing.assert_close(total, 0.1 * ce + 0.9 * kl)


def test_a_terms_own_hyperparameter_overrides_the_default() -> None:
    objective = build_objective("ce kl(temperature=7)=2 mse", temperature=3.0, label_smoothing=0.2)
    losses: list[object] = [term.loss for term in objective.terms]
    assert losses == [CrossEntropy(label_smoothing=0.2), SoftenedKL(temperature=7), LogitMSE()]
    assert [term.weight for term in objective.terms] == [1.0, 2.0, 1.0]


def test_without_a_default_a_loss_keeps_its_own_temperature() -> None:
    objective = build_objective("kl nkd", temperature=None)
    losses: list[object] = [term.loss for term in objective.terms]
    assert losses == [SoftenedKL(temperature=4), NormalizedKD(temperature=1)]


def test_weights_and_hyperparameters_follow_schedules() -> None:
    objective = build_objective("ce=stop(0.5, 2) dkd(alpha=1, temperature=cosine(8, 2))=linear(0, 0.9) kl=warmup(1, 2)")
    weights = [[term.weight for term in objective.at(epoch, 4).terms] for epoch in range(4)]
    expected = [[0.5, 0.0, 0.5], [0.5, 0.3, 1.0], [0.0, 0.6, 1.0], [0.0, 0.9, 1.0]]
    np.testing.assert_allclose(np.array(weights, dtype=float), expected)
    temperatures = [getattr(objective.at(epoch, 4).terms[1].loss, "temperature", 0) for epoch in range(4)]
    np.testing.assert_allclose(temperatures, 5 + 3 * np.cos(np.pi * np.arange(4) / 3))
    assert objective.needs_teacher
    with pytest.raises(ValueError, match=r"choose the epoch by \.at"):
        objective(outputs(0), outputs(1), LABELS)
    total, terms = objective.at(1, 4)(outputs(0), outputs(1), LABELS)
    torch.testing.assert_close(total, 0.5 * terms["ce"] + 0.3 * terms["dkd"] + 1.0 * terms["kl"])


def test_an_objective_without_schedules_is_constant_over_epochs() -> None:
    objective = build_objective("ce=0.1 kl=0.9")
    assert objective.at(3, 7) == objective


def test_two_terms_of_the_same_loss_are_named_with_their_hyperparameters() -> None:
    objective = build_objective("kl(temperature=1)=0.5 kl(temperature = 4)=0.5 ce")
    assert [term.name for term in objective.terms] == ["kl(temperature=1)", "kl(temperature = 4)", "ce"]


def test_only_the_student_receives_a_gradient() -> None:
    student, teacher = (outputs(seed).logits.requires_grad_() for seed in (0, 1))
    total, terms = build_objective("ce=1 kl=1 mse=1 hard=1")(Outputs(student), Outputs(teacher), LABELS)
    total.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_documented(name: str) -> None:
    kind = LOSSES[name]
    assert kind.formula
    assert kind.source
    text = inspect.getdoc(kind) or ""
    assert "$$" in text
    assert "Shape:" in text
    assert "Source:" in text


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.published])
def test_the_published_objective_is_valid(name: str) -> None:
    objective = build_objective(shlex.split(LOSSES[name].published))
    assert name in [term.name for term in objective.terms]
    assert objective.trains_head


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if callable(loss())])
def test_a_loss_is_computed_in_float32_under_autocast(name: str) -> None:
    student, teacher = (Outputs(outputs(seed).logits.bfloat16()) for seed in (0, 1))
    multilabel = not LOSSES[name].is_single_label
    objective = build_objective(name, multilabel=multilabel)
    labels = torch.eye(student.logits.shape[1])[LABELS] if multilabel else LABELS
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = objective(student, teacher, labels)
    exact, _ = objective(Outputs(student.logits.float()), Outputs(teacher.logits.float()), labels)
    assert all(value.dtype == torch.float32 for value in (total, *terms.values()))
    assert torch.isfinite(total)
    torch.testing.assert_close(total, exact, rtol=1e-6, atol=0)


def test_a_teacher_is_needed_only_for_terms_of_nonzero_weight() -> None:
    assert not build_objective("ce").needs_teacher
    assert not build_objective("ce=1 kl=0").needs_teacher
    assert build_objective("ce=0.5 kl=0.5").needs_teacher
    with pytest.raises(ValueError, match="needs a teacher's outputs"):
        build_objective("kl")(outputs(0), None, LABELS)
    total, _ = build_objective("ce")(outputs(0), None, LABELS)
    torch.testing.assert_close(total, CrossEntropy()(outputs(0).logits, outputs(0).logits, LABELS))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("", "an objective needs at least one term"),
        ("kll=1", r"--loss: there is no loss 'kll'; did you mean 'kl'\? \(there are: ce, focal, mse, kl, hard, "),
        ("kl=-1", "the weight of kl must be 0 or more, not -1"),
        ("kl=nan", "the weight of kl must be 0 or more, not nan"),
        ("kl=inf", "the weight of kl must be 0 or more"),
        ("kl=much", "the weight of kl must be a number, not 'much'"),
        ("kl=", "the weight of kl must be a number, not ''"),
        ("=1", "write a term as name=weight"),
        ("kl=1=2", "the weight of kl must be a number, not '1=2'"),
        ("kl(temp=3)=1", r"there is no hyperparameter 'temp'; did you mean 'temperature'\?"),
        ("kl(temperature=0)=1", r"--loss: kl\(temperature=0\): temperature must be a number above 0, not 0"),
        ("kl(temperature=hot)=1", r"--loss: kl\(temperature=hot\): temperature must be a number above 0, not 'hot'"),
        ("ce(label_smoothing=2)=1", "label_smoothing must be a number from 0 to 1, not 2"),
        ("kl=1 ce=1 kl=2", "--loss: kl occurs twice"),
        ("absent.py:f=1", "there is no file"),
        ("kl=rise(0.9, 3)", r"--loss kl=rise\(0.9, 3\): there is no schedule 'rise'"),
        ("kl=warmup(0.9)", r"warmup\(0.9\): write it with numbers, as warmup\(value, over\)"),
        ("kl=warmup(0.9, 0)", "the warm-up must take more than 0 epochs"),
        ("kl=linear(0.9, -0.1)", "the weight of kl must be 0 or more, not linear"),
        ("kl(temperature=linear(8, 0))=1", "temperature must be a number above 0, not 0"),
        ("kl(temperature=stop(4, 5))=1", "temperature must be a number above 0, not 0"),
        ("kl(temperature=cosine(8, much))=1", "key=value pairs|write it with numbers"),
        ("kl(temperature=4=1", "write a term as name=weight"),
        ("kl(standardize=2)=1", "standardize must be True or False, not 2"),
        ("ce(standardize=True)=1", "ce doesn't depend on the teacher's logits; remove standardize"),
    ],
)
def test_an_invalid_objective_is_a_clear_error(terms: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(terms)


LOGIT_LOSSES = [name for name, loss in LOSSES.items() if loss.needs_teacher and callable(loss())]


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_standardized_loss_is_invariant_to_scale_and_shift(name: str) -> None:
    student, teacher = (outputs(seed).logits.double() for seed in (0, 1))
    term = build_objective(f"{name}(standardize=True)").terms[0]
    value = term(Outputs(student), Outputs(teacher), LABELS)
    torch.testing.assert_close(term(Outputs(student), Outputs(7 * teacher - 3), LABELS), value)
    torch.testing.assert_close(term(Outputs(2 * student + 5), Outputs(teacher), LABELS), value)


def test_standardized_logits_equal_scipys_zscore() -> None:
    logits = outputs(0).logits.double()
    expected = stats.zscore(logits.numpy(), axis=1, ddof=1)
    torch.testing.assert_close(standardized(logits), torch.from_numpy(expected))


@pytest.mark.parametrize("terms", ["kl(standardize=True)=1", "ce=1 dist(gamma=0)=1"])
def test_losses_without_a_gradient_for_two_classes_are_refused(terms: str) -> None:
    with pytest.raises(UserError, match=r"--loss: (kl|dist)\(.*\): .* always"):
        build_objective(terms, num_classes=2)
    build_objective(terms, num_classes=3)


def test_a_weight_of_zero_removes_a_term() -> None:
    assert [term.name for term in build_objective("ce=1 kl=0 hint=0").terms] == ["ce"]
    with pytest.raises(UserError, match="--loss: all weights are 0"):
        build_objective("ce=0")


def test_a_term_whose_schedule_is_at_zero_is_logged_but_has_no_gradient() -> None:
    pair = Pair("f", "g", (2, 1, 1), (3, 1, 1))
    objective = build_objective("ce=1 hint=linear(0, 1) mse=stop(1, 1)").bind({"hint": [pair]})
    logits = torch.tensor([[1.0, torch.inf, 0.0]], requires_grad=True)
    first, last = objective.at(0, 2), objective.at(1, 2)
    features = {"f": torch.ones(1, 2, 1, 1)}, {"g": torch.ones(1, 3, 1, 1)}
    student, teacher = Outputs(torch.zeros(1, 3, requires_grad=True), features[0]), Outputs(logits, features[1])
    total, terms = last(student, teacher, LABELS[:1])
    assert terms["mse"] == torch.inf
    assert torch.isfinite(total)
    total, terms = first(replace(student), replace(teacher, logits=torch.zeros(1, 3)), LABELS[:1])
    assert set(terms) == {"ce", "hint", "mse"}
    total.backward()
    (adapter,) = first.feature_terms[0].adapters
    assert adapter is not None
    # Distributed training waits for a gradient of every parameter.
    assert all(weight.grad is not None for weight in adapter.parameters())


def write_loss(tmp_path: Path, body: str, *, arguments: str = "student_logits, teacher_logits, labels, power=2") -> str:
    file = tmp_path / "my_losses.py"
    file.write_text(f"import torch\ndef custom({arguments}):\n    {body}\n")
    return f"{file}:custom"


def test_a_custom_loss_is_a_plain_function(tmp_path: Path) -> None:
    name = write_loss(tmp_path, "return (student_logits - teacher_logits).abs().pow(power).mean()")
    total, terms = build_objective(f"ce=0 {name}=0.5 {name}(power=4)=1")(outputs(0), outputs(1), LABELS)
    difference = (outputs(0).logits - outputs(1).logits).abs()
    torch.testing.assert_close(terms[name], difference.pow(2).mean())
    torch.testing.assert_close(total, 0.5 * difference.pow(2).mean() + difference.pow(4).mean())
    assert [term.name for term in build_objective(f"{name}=1").terms] == ["custom"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return student_logits.mean(dim=1)", r"it returned a tensor of shape \(8,\); return a scalar tensor"),
        ("return 3.0", "it returned a float; return a scalar tensor"),
        ("return student_logits.mean() / 0", "it returned -?inf; a loss must be finite"),
        ("return student_logits.detach().mean()", "its gradient for the student is zero"),
        ("return teacher_logits.mean()", "its gradient for the student is zero"),
        ("return (student_logits - student_logits).abs().sqrt().sum()", "its gradient for the student is not finite"),
        ("return student_logits[99].mean()", "it raised IndexError"),
    ],
)
def test_the_error_for_an_invalid_custom_loss_says_why(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(f"{write_loss(tmp_path, body)}=1")


def test_a_custom_loss_named_loss_does_not_shadow_the_total(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(z, v, y):\n    return (z - v).abs().mean()\n")
    assert [term.name for term in build_objective(f"{tmp_path}/mine.py:loss").terms] == [f"{tmp_path}/mine.py:loss"]


def test_only_the_weight_of_a_custom_loss_can_follow_a_schedule(tmp_path: Path) -> None:
    name = write_loss(tmp_path, "return (student_logits - teacher_logits).abs().pow(power).mean()")
    assert build_objective(f"{name}=warmup(1, 4)").at(0, 4).terms[0].weight == 0.25
    with pytest.raises(UserError, match="only the weight of your own loss can follow a schedule"):
        build_objective(f"{name}(power=linear(1, 2))=1")


def test_a_custom_loss_with_a_wrong_signature_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it raised TypeError: custom\(\) takes 1 positional argument"):
        build_objective(f"{write_loss(tmp_path, 'return x.mean()', arguments='x')}=1")
