"""Losses on features and gradients: formulas, properties, and numerical stability."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from scipy.spatial import distance
from torch import Tensor, nn

from kd.errors import UserError
from kd.losses import (
    LOSSES,
    AttentionTransfer,
    ContrastiveRepresentation,
    Embedding,
    FeatureLoss,
    Hint,
    JacobianMatching,
    Outputs,
    Pair,
    ProbabilisticTransfer,
    RelationalKD,
    ReusedClassifier,
    SimilarityPreserving,
    VariationalInformation,
    build_objective,
)
from kd.losses.features import Projection

Array = NDArray[np.float64]
Weights = dict[str, Array]

EXAMPLES: dict[str, FeatureLoss] = {
    "hint": Hint(),
    "at": AttentionTransfer(p=3),
    "vid": VariationalInformation(variance=2.0),
    "embedding": Embedding(),
    "sp": SimilarityPreserving(),
    "rkd": RelationalKD(distance=2.0, angle=3.0),
    "pkt": ProbabilisticTransfer(),
    "crd": ContrastiveRepresentation(tau=0.5, width=3),
}


def feature_maps() -> tuple[Tensor, Tensor]:
    """Return a student's feature maps of higher resolution and a teacher's with more channels."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 4, 6, 6, generator=generator, dtype=torch.float64)
    return student, torch.randn(5, 7, 3, 3, generator=generator, dtype=torch.float64)


def adapter_of(loss: FeatureLoss, student: Tensor, teacher: Tensor) -> nn.Module | None:
    torch.manual_seed(1)
    adapter = loss.build_adapter(tuple(student.shape[1:]), tuple(teacher.shape[1:]))  # type: ignore[arg-type]
    return None if adapter is None else adapter.double()


def value_of(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    loss = EXAMPLES[name]
    return loss.compare(student, teacher, adapter_of(loss, student, teacher))


def test_every_feature_loss_has_an_example() -> None:
    # The student of simkd has features of the teacher's width.
    assert {*EXAMPLES, "simkd", "jacobian"} == {name for name, loss in LOSSES.items() if not callable(loss())}


def pool_to_3x3(features: Array) -> Array:
    """Average maps of 6x6 to 3x3."""
    means: Array = features.reshape(5, -1, 3, 2, 3, 2).mean(axis=(3, 5))
    return means


def convolve_1x1(features: Array, weights: Weights, prefix: str) -> Array:
    bias = weights.get(f"{prefix}bias", np.zeros(1))
    products = np.einsum("bchw,dc->bdhw", features, weights[f"{prefix}weight"][:, :, 0, 0])
    return np.asarray(products + bias.reshape(1, -1, 1, 1), dtype=np.float64)


def attention(features: Array) -> Array:
    powers: Array = (np.abs(features) ** 3).sum(axis=1).reshape(5, -1)
    norms = np.linalg.norm(powers, axis=1, keepdims=True)
    return np.asarray(powers / norms, dtype=np.float64)


def gaussian_nll(f: Array, g: Array, weights: Weights) -> float:
    hidden = convolve_1x1(pool_to_3x3(f), weights, "mean.0.")
    for layer in ("mean.2.", "mean.4."):
        hidden = convolve_1x1(np.maximum(hidden, 0), weights, layer)
    # Without the constant of the normal distribution.
    log_density = stats.norm.logpdf(g, loc=hidden, scale=np.sqrt(2.0))
    return float(-(log_density + 0.5 * np.log(2 * np.pi)).mean())


def gram(features: Array) -> Array:
    rows = features.reshape(5, -1)
    products = rows @ rows.T
    return np.asarray(products / np.linalg.norm(products, axis=1, keepdims=True), dtype=np.float64)


def huber(student: Array, teacher: Array) -> float:
    return float(special.huber(1.0, student - teacher).mean())


def distances(features: Array) -> Array:
    pairwise = distance.cdist(features, features)
    return np.asarray(pairwise / pairwise[~np.eye(5, dtype=bool)].mean())


def angles(features: Array) -> Array:
    cosines = np.zeros((5, 5, 5))
    for corner, i, k in itertools.product(range(5), repeat=3):
        if corner not in (i, k):
            cosines[corner, i, k] = 1 - distance.cosine(features[i] - features[corner], features[k] - features[corner])
    return cosines


def neighbor_probabilities(features: Array) -> Array:
    weights = 2 - distance.squareform(distance.pdist(features, "cosine"))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def info_nce(f: Array, g: Array, weights: Weights) -> float:
    s, t = (
        convolve_1x1(features[:, :, None, None], weights, f"{index}.")[:, :, 0, 0]
        for index, features in enumerate((f, g))
    )
    cosines = 1 - distance.cdist(s, t, "cosine")
    return float(-np.diag(special.log_softmax(cosines / 0.5, axis=1)).mean())


def pooled(features: Array) -> Array:
    return np.asarray(features.mean(axis=(2, 3)))


FORMULAS: dict[str, Callable[[Array, Array, Weights], float]] = {
    "hint": lambda f, g, w: ((convolve_1x1(pool_to_3x3(f), w, "") - g) ** 2).mean(),
    "at": lambda f, g, w: ((attention(pool_to_3x3(f)) - attention(g)) ** 2).mean(),
    "vid": gaussian_nll,
    "embedding": lambda f, g, w: np.diag(distance.cdist(pooled(convolve_1x1(f, w, "")), pooled(g), "cosine")).mean(),
    "sp": lambda f, g, w: float(np.linalg.norm(gram(f) - gram(g))) ** 2 / 25,
    "rkd": lambda f, g, w: (
        2 * huber(distances(pooled(f)), distances(pooled(g))) + 3 * huber(angles(pooled(f)), angles(pooled(g)))
    ),
    "pkt": lambda f, g, w: (
        special.rel_entr(neighbor_probabilities(pooled(g)), neighbor_probabilities(pooled(f))).sum(axis=1).mean()
    ),
    "crd": lambda f, g, w: info_nce(pooled(f), pooled(g), w),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_equals_its_formula(name: str) -> None:
    student, teacher = feature_maps()
    adapter = adapter_of(EXAMPLES[name], student, teacher)
    weights = {} if adapter is None else {key: value.numpy() for key, value in adapter.state_dict().items()}
    expected = float(FORMULAS[name](student.numpy(), teacher.numpy(), weights))
    assert EXAMPLES[name].compare(student, teacher, adapter).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["hint", "at", "sp", "rkd", "pkt"])
def test_a_distance_is_zero_at_equality_and_positive_elsewhere(name: str) -> None:
    student, _ = feature_maps()
    assert value_of(name, student, student).item() == pytest.approx(0, abs=1e-12)
    assert value_of(name, student, student.flip(0)).item() > 1e-4


@pytest.mark.parametrize("name", ["at", "sp", "rkd", "pkt"])
def test_a_loss_is_invariant_to_the_scale_of_the_features(name: str) -> None:
    student, teacher = feature_maps()
    torch.testing.assert_close(value_of(name, 3 * student, 0.1 * teacher), value_of(name, student, teacher))


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt"])
def test_a_loss_is_invariant_to_rotations_of_the_channel_space(name: str) -> None:
    student, teacher = feature_maps()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    rotated = torch.einsum("bchw,dc->bdhw", student, rotation)
    torch.testing.assert_close(value_of(name, rotated, teacher), value_of(name, student, teacher))


def test_relational_distillation_is_invariant_to_shifts_of_the_features() -> None:
    student, teacher = feature_maps()
    torch.testing.assert_close(value_of("rkd", student + 5, teacher - 3), value_of("rkd", student, teacher))


def test_an_embedding_is_compared_by_mean_squared_error_if_asked() -> None:
    student, teacher = feature_maps()
    loss = Embedding(distance="mse")
    adapter = adapter_of(loss, student, teacher)
    assert isinstance(adapter, Projection)
    weights = {key: value.numpy() for key, value in adapter.state_dict().items()}
    expected = ((pooled(convolve_1x1(student.numpy(), weights, "")) - pooled(teacher.numpy())) ** 2).mean()
    assert loss.compare(student, teacher, adapter).item() == pytest.approx(expected, rel=1e-6)
    # Pooling makes maps of any size comparable with a vector.
    vector = teacher.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(loss.compare(student, vector, adapter), loss.compare(student, teacher, adapter))


def test_simkd_is_the_squared_error_of_maps_of_the_smaller_size() -> None:
    student, teacher = (features[:, :4] for features in feature_maps())
    expected = ((pool_to_3x3(student.numpy()) - teacher.numpy()) ** 2).mean()
    loss = ReusedClassifier()
    assert loss.compare(student, teacher, None).item() == pytest.approx(expected)
    assert loss.compare(teacher, student, None).item() == pytest.approx(expected)
    assert (loss.nodes("student"), loss.nodes("teacher")) == (["projector"], [])


def test_a_hint_has_an_adapter_only_if_widths_differ() -> None:
    assert Hint().build_adapter((4, 6, 6), (4, 3, 3)) is None
    adapter = Hint().build_adapter((4, 6, 6), (7, 3, 3))
    assert adapter is not None
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 4 * 7 + 7


def test_variational_information_starts_at_the_given_variance() -> None:
    for variance in (1e-4, 0.5, 5.0, 1e3):
        adapter = VariationalInformation(variance=variance).build_adapter((4, 6, 6), (7, 3, 3))
        _, predicted = adapter(torch.zeros(1, 4, 3, 3))
        torch.testing.assert_close(predicted, torch.full((7, 1, 1), variance))


def test_variational_information_is_minimal_at_the_mean() -> None:
    student, teacher = feature_maps()
    loss = EXAMPLES["vid"]
    adapter = adapter_of(loss, student, teacher)
    assert adapter is not None
    mean, variance = adapter(torch.nn.functional.adaptive_avg_pool2d(student, 3))
    assert loss.compare(student, mean, adapter).item() == pytest.approx(0.5 * variance.log().mean().item())
    assert loss.compare(student, teacher, adapter) > loss.compare(student, mean, adapter)


def test_the_contrastive_loss_is_log_b_for_identical_images() -> None:
    student, teacher = feature_maps()
    value = value_of("crd", student[:1].expand(5, -1, -1, -1), teacher[:1].expand(5, -1, -1, -1))
    assert value.item() == pytest.approx(np.log(5))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_a_loss_and_its_gradient_are_finite_at_extreme_features(name: str, scale: float) -> None:
    student, teacher = (scale * features.float() for features in feature_maps())
    student.requires_grad_()
    adapter = EXAMPLES[name].build_adapter((4, 6, 6), (7, 3, 3))
    value = EXAMPLES[name].compare(student, -teacher, adapter)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradient_descent_decreases_a_loss(name: str) -> None:
    student, teacher = feature_maps()
    adapter = adapter_of(EXAMPLES[name], student, teacher)
    parameters = [student.requires_grad_(), *([] if adapter is None else adapter.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        value = EXAMPLES[name].compare(student, teacher, adapter)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_objective_sums_a_loss_over_its_pairs_in_float32_under_autocast(name: str) -> None:
    student, teacher = (features.bfloat16() for features in feature_maps())
    pairs = [Pair("a", "b", (4, 6, 6), (7, 3, 3)), Pair("a2", "b", (4, 6, 6), (7, 3, 3))]
    torch.manual_seed(0)
    objective = build_objective(f"{name}=2").bind({name: pairs})
    logits = torch.zeros(5, 3)
    outputs = (Outputs(logits, {"a": student, "a2": 2 * student}), Outputs(logits, {"b": teacher}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = objective(*outputs, torch.zeros(5, dtype=torch.long))
    assert (total.dtype, terms[name].dtype) == (torch.float32, torch.float32)
    (term,) = objective.terms
    loss = term.loss
    assert isinstance(loss, FeatureLoss)
    values = [
        loss.compare(features.float(), teacher.float(), adapter)
        for features, adapter in zip((student, 2 * student), term.adapters, strict=True)
    ]
    torch.testing.assert_close(total, 2 * (values[0] + values[1]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gradient_of_zero_features_is_bounded(name: str) -> None:
    student, teacher = (features.float() for features in feature_maps())
    student[:2] = 0
    student.requires_grad_()
    adapter = EXAMPLES[name].build_adapter((4, 6, 6), (7, 3, 3))
    EXAMPLES[name].compare(student, teacher, adapter).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 100


def test_feature_losses_need_feature_maps_and_jacobian_matching_needs_gradients() -> None:
    with pytest.raises(ValueError, match=r"hint compares features: choose them by \.bind\(pairs\)"):
        build_objective("hint")(Outputs(torch.zeros(2, 3)), Outputs(torch.zeros(2, 3)), torch.zeros(2).long())
    with pytest.raises(TypeError, match="kl does not compare features"):
        build_objective("kl").bind({"kl": []})
    with pytest.raises(ValueError, match="jacobian needs the gradients with respect to the images"):
        build_objective("jacobian")(Outputs(torch.zeros(2, 3)), Outputs(torch.zeros(2, 3)), torch.zeros(2).long())


def test_attention_transfer_rejects_maps_of_one_pixel() -> None:
    with pytest.raises(
        UserError, match="--loss at: the student's a and the teacher's b can't be compared: a map of one"
    ):
        build_objective("at").bind({"at": [Pair("a", "b", (4, 1, 1), (7, 3, 3))]})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("hint(student_node=3.5)=1", "not 3.5; put a name such as '1.2' in quotes"),
        ("vid(variance=linear(5, 1))=1", "variance can't follow a schedule"),
        ("hint(student_node=[])=1", r"student_node must be the name of a node or a list of names, not \[\]"),
        ("at(p=0.5)=1", "p must be a number of at least 1, not 0.5"),
        ("at(power=2)=1", "there is no hyperparameter 'power'"),
        ("vid(variance=0)=1", "variance must be a number above 1e-05, not 0"),
        ("crd(tau=0)=1", "tau must be a number above 0, not 0"),
        ("embedding(distance=l1)=1", "distance must be cosine or mse, not 'l1'"),
        ("crd(width=1.5)=1", "width must be a whole number above 0, not 1.5"),
        ("jacobian(normalize=2)=1", "normalize must be True or False, not 2"),
        ("hint(standardize=True)=1", "hint doesn't depend on the teacher's logits; remove standardize"),
    ],
)
def test_an_invalid_hyperparameter_is_a_clear_error(objective: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(objective)


def test_the_default_temperature_does_not_apply_to_the_contrastive_loss() -> None:
    assert build_objective("crd", temperature=4.0).terms[0].loss == ContrastiveRepresentation(tau=0.07)


def gradients() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def test_jacobian_matching_equals_its_formula() -> None:
    student, teacher = gradients()
    raw = [values.numpy().reshape(5, -1) for values in (student, teacher)]
    normalized = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in raw]
    expected = [((first - second) ** 2).sum(axis=1).mean() for first, second in (normalized, raw)]
    values = [JacobianMatching(normalize=normalize).compare(student, teacher).item() for normalize in (True, False)]
    assert values == pytest.approx(expected)


def test_normalized_jacobian_matching_is_two_minus_twice_the_cosine_similarity() -> None:
    student, teacher = gradients()
    cosines = torch.cosine_similarity(student.flatten(1), teacher.flatten(1))
    loss = JacobianMatching()
    torch.testing.assert_close(loss.compare(student, teacher), (2 - 2 * cosines).mean())
    torch.testing.assert_close(loss.compare(7 * student, teacher), loss.compare(student, teacher))
    assert loss.compare(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_jacobian_matching_is_finite_at_extreme_gradients_and_in_float32_under_autocast(scale: float) -> None:
    student, teacher = (scale * values.bfloat16() for values in gradients())
    student.requires_grad_()
    logits = torch.zeros(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = build_objective("jacobian")(
            Outputs(logits, gradients=student), Outputs(logits, gradients=teacher), torch.zeros(5).long()
        )
    total.backward()
    assert total.dtype == torch.float32
    assert student.grad is not None
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()
