"""Training on uneven classes: class weights and a balanced sampler."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from kd.cli import experiment
from kd.data import ImageData, read_splits
from kd.losses import CrossEntropy, Focal, balanced_weights
from tests.conftest import MakeFolder
from tests.pipeline.test_splits import FLAGS, write_folder


def test_balanced_weights_give_each_class_the_same_total() -> None:
    weights = np.array(balanced_weights([40, 4, 0, 16]))
    totals = weights * [40, 4, 0, 16]
    np.testing.assert_allclose(totals, [20, 20, 0, 20])
    assert totals.sum() == 60


@pytest.mark.parametrize("soft", [False, True])
def test_weighted_cross_entropy_weights_each_image_by_its_class(soft: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 3, generator=generator), torch.arange(12) % 3
    weights = (0.5, 2.0, 0.0)
    loss = CrossEntropy(class_weights=weights)(logits, logits, torch.eye(3)[labels] if soft else labels)
    sample = np.array(weights)[labels.numpy()]
    expected = log_loss(
        labels, logits.double().softmax(1).numpy(), sample_weight=sample, labels=[0, 1, 2], normalize=False
    )
    assert float(loss) == pytest.approx(expected / 12, abs=1e-5)
    if not soft:
        focal = Focal(gamma=0, class_weights=weights)(logits, logits, labels)
        assert float(focal) == pytest.approx(float(loss), abs=1e-4)


def test_invalid_class_weights_are_refused() -> None:
    for weights in ((-1.0, 1.0), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="class_weights must be numbers of at least 0, not all 0"):
            CrossEntropy(class_weights=weights)
    with pytest.raises(ValueError, match="2 class weights for 3 classes"):
        CrossEntropy(class_weights=(1.0, 2.0))(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]))


def epochs_of(data: ImageData, count: int) -> list[list[tuple[int, int]]]:
    loader: Any = data.train_dataloader()
    sampler = loader.batch_sampler.sampler
    drawn = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    return drawn


def test_the_balanced_sampler_draws_each_class_equally_often(tmp_path: Path) -> None:
    write_folder(tmp_path / "x" / "train", {"ant": 180, "bee": 20})
    write_folder(tmp_path / "x" / "val", {"ant": 5, "bee": 5})
    splits = read_splits(tmp_path / "x")
    data = ImageData(splits, image_size=8, augment="crop", balanced=True, seed=3)
    epochs = epochs_of(data, 20)
    counts = Counter(splits.train.labels[index] for drawn in epochs for _, index in drawn)
    assert sum(counts.values()) == 20 * 200
    # Four standard deviations of a fair coin.
    assert abs(counts[0] - 2_000) < 4 * np.sqrt(4_000) / 2
    # The views of an image that is drawn several times differ.
    ((rare, times),) = Counter(index for _, index in epochs[0] if splits.train.labels[index] == 1).most_common(1)
    assert times > 2
    views = [data.train_views[position][0] for position in epochs[0] if position[1] == rare]
    # Two crops of so few pixels may be equal by chance.
    assert len({view.numpy().tobytes() for view in views}) >= times - 1
    # The same for two processes together, and in another call.
    assert epochs_of(ImageData(splits, image_size=8, augment="crop", balanced=True, seed=3), 2) == epochs[:2]


def test_stored_logits_and_resumed_runs_agree_with_balanced_order(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--data_dir", str(make_folder(train=12, val=8)), "--train_teacher", "--distill"]
    flags += ["--sampler", "balanced", "--allow_weak_teacher"]
    flags[flags.index("--image_cache") + 1] = "auto"
    assert experiment(flags) == 0
    assert experiment([*flags, "--name", "again"]) == 0
    assert "batches read from the cache" in capsys.readouterr().out
    assert experiment([*flags, "--name", "live", "--teacher_cache", "none"]) == 0
    states = [
        torch.load(f"logs/{name}/distilled/version_0/checkpoints/last.ckpt")["state_dict"]
        for name in ("pets", "again", "live")
    ]
    for other in states[1:]:
        assert all(torch.equal(value, other[key]) for key, value in states[0].items())


def test_class_weights_come_from_the_counts_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "photos", {"01": 40, "02": 10})
    flags = [*FLAGS, "--data_dir", str(folder), "--val_fraction", "0.2", "--baseline", "--class_weights"]

    def trained(value: str, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
        assert experiment([*flags, value, "--name", name]) == 0
        run = Path(f"logs/{name}/baseline/version_0")
        settings = json.loads((run / "metrics.json").read_text())["provenance"]["settings"]
        return settings["class_weights"], torch.load(run / "checkpoints" / "last.ckpt")["state_dict"]

    weights, balanced = trained("balanced", "balanced")
    assert weights == pytest.approx([40 / (2 * 32), 40 / (2 * 8)])
    file = tmp_path / "weights.yaml"
    file.write_text(f"01: {weights[0]}\n02: {weights[1]}\n")
    assert trained(str(file), "file")[0] == pytest.approx(weights)
    _, plain = trained("none", "plain")
    assert not all(torch.equal(value, plain[key]) for key, value in balanced.items())
    capsys.readouterr()
    for content, message in (
        ("01: 1\n", "lacks 02; it must give a weight for each class"),
        ("01: 1\n02: 1\n03: 1\n", "has unknown 03"),
        ("01: -1\n02: 1\n", "class_weights must be numbers of at least 0"),
        ("01: a\n02: 1\n", "could not convert"),
    ):
        file.write_text(content)
        assert experiment([*flags, str(file)]) == 2
        error = capsys.readouterr().err
        assert f"--class_weights {file}: " in error
        assert message in error
    assert experiment([*flags, "absent.yaml"]) == 2
    assert "--class_weights absent.yaml: no such file" in capsys.readouterr().err
