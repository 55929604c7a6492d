"""Shipped configurations are valid."""

from pathlib import Path

import pytest
import yaml

from kd.losses import build_objective
from kd.settings import resolve
from kd.sweep.plan import read_plan
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
# Sweeps are parsed by read_plan, which validates their search space with the same parser.
SWEEPS = [path for path in CONFIGS if "sweep" in yaml.safe_load(path.read_text(encoding="utf-8"))]


def test_the_quickstart_and_one_sweep_are_shipped() -> None:
    assert [path.name for path in CONFIGS if path.name == "quickstart.yaml"]
    assert [path.relative_to(REPOSITORY).as_posix() for path in SWEEPS] == ["configs/sweep/digits.yaml"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_valid(path: Path) -> None:
    plan = read_plan(path)
    for parameters in plan.examples():
        build_objective(list(plan.settings(parameters).objective.loss))


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in SWEEPS], ids=lambda path: path.stem)
def test_a_configuration_is_valid(path: Path) -> None:
    settings, *_ = resolve(["--config", str(path)])
    build_objective(list(settings.objective.loss))


def test_the_shipped_flags_file_is_valid_and_selects_no_phase(repository: Path) -> None:
    settings, remarks, _ = resolve(["--args_file", str(repository / "commandline_args.txt")])
    assert remarks == []
    assert (settings.models.teacher_model, settings.data.image_size) == (("densenet121",), 224)
    build_objective(list(settings.objective.loss))
    # With --distill on the command line, no other phase runs.
    phases = settings.phases
    assert [phases.train_teacher, phases.baseline, phases.distill] == [False] * 3


def test_the_quickstart_is_independent_of_the_flags_file(repository: Path) -> None:
    quickstart = ["--config", str(repository / "configs" / "quickstart.yaml")]
    with_file, *_ = resolve([*quickstart, "--args_file", str(repository / "commandline_args.txt")])
    without, *_ = resolve(quickstart)
    assert with_file.flat() == without.flat()
    assert without.phases.seeds >= 3


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "reproduce").glob("*.yaml")), ids=lambda path: path.stem
)
def test_reproduced_experiments_are_independent_of_the_flags_file(path: Path) -> None:
    with_file, *_ = resolve(["--config", str(path), "--args_file", str(REPOSITORY / "commandline_args.txt")])
    without, *_ = resolve(["--config", str(path)])
    # --loss has no effect if objectives are compared.
    ignored = {"args_file"} | ({"loss"} if with_file.objective.compare_losses else set())
    first, second = with_file.flat(), without.flat()
    assert {name for name in first if first[name] != second[name]} <= ignored
    assert with_file.phases.seeds >= 3
    assert with_file.phases.name == path.stem


def test_the_compose_file_and_the_workflow_are_valid_yaml(repository: Path) -> None:
    compose = yaml.safe_load((repository / "compose.yaml").read_text())
    assert compose["services"]["tensorboard"]["ports"] == ["127.0.0.1:6006:6006"]
    assert yaml.safe_load((repository / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def test_the_lock_file_pins_dependencies_by_hash_and_contains_no_url(repository: Path) -> None:
    lock = (repository / "requirements.lock").read_text()
    assert "://" not in lock
    for package in (
        "torch",
        "torchvision",
        "pytorch-lightning",
        "tensorboard",
        "pyyaml",
        "tyro",
        "rich",
        "scikit-learn",
    ):
        assert f"\n{package}==" in lock
    assert lock.count("==") <= lock.count("--hash=sha256:")
