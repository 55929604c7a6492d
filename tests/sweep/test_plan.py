"""A sweep's file: how it is read, and what is refused before anything runs."""

import sys
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from kd.cli import main
from kd.errors import UserError
from kd.sweep.plan import Plan, read_plan


def write_plan(text: str) -> Path:
    path = Path("search.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def plan_of(text: str) -> Plan:
    return read_plan(write_plan(text))


def test_ranges_choices_and_weights_become_distributions() -> None:
    plan = plan_of(
        "dataset: digits\ntrials: 7\nprune: false\nsampler_seed: 3\nlost_after: 90\nsweep:\n"
        "  learning_rate: {low: 1e-4, high: 1e-1, log: true}\n"
        "  batch_size: {low: 16, high: 64, step: 16}\n"
        "  student_model: [simple, resnet18]\n"
        "  ema: [null, 0.999]\n"
        "  assistants: [[resnet34, resnet18], []]\n"
        "  loss: {ce: {low: 0, high: 1}, kl: 0.9, mse: [0, 0.5]}\n"
    )
    assert (plan.trials, plan.prune, plan.sampler_seed, plan.lost_after) == (7, False, 3, 90)
    assert plan.folder == Path("logs/search")
    assert plan.spaces == {
        "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
        "batch_size": IntDistribution(16, 64, step=16),
        "student_model": CategoricalDistribution(["simple", "resnet18"]),
        "ema": CategoricalDistribution([None, 0.999]),
        "assistants": CategoricalDistribution(['["resnet34", "resnet18"]', "[]"]),
        "loss.ce": FloatDistribution(0, 1),
        "loss.mse": CategoricalDistribution([0, 0.5]),
    }


def test_parameters_of_a_trial_become_settings() -> None:
    plan = plan_of(
        "name: a\ndataset: digits\n"
        "sweep: {loss: {ce: {low: 0, high: 1}, kl: 0.9}, temperature: [1, 4], assistants: [[a, b], []]}\n"
    )
    settings = plan.settings({"loss.ce": 0.25, "temperature": 4, "assistants": '["a", "b"]'}, name="7")
    assert settings.objective.loss == ("ce=0.25", "kl=0.9")
    assert settings.objective.temperature == 4.0
    assert settings.models.assistants == ("a", "b")
    assert (settings.phases.distill, settings.phases.name, settings.machine.devices) == (True, "7", "1")
    with pytest.raises(UserError, match=r"search.yaml, key 'sweep'.*temperature"):
        plan.settings({"temperature": -1})


def test_a_mapping_among_the_choices_is_a_whole_objective() -> None:
    plan = plan_of("dataset: digits\nsweep: {loss: [{ce: 0.5, kl: 2}, kl=1]}\n")
    losses = [plan.settings(parameters).objective.loss for parameters in plan.examples()]
    assert losses == [("ce=0.5", "kl=2"), ("kl=1",)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "search.yaml"),
        ("a: [", "search.yaml"),
        ("dataset: digits", "search.yaml, key 'sweep': expected the settings to search"),
        ("sweep: {}", "search.yaml, key 'sweep': expected the settings to search"),
        ("sweep: {temprature: [1]}", "key 'temprature': unknown setting; did you mean 'temperature'?"),
        ("sweep: {1: [1]}", "key 1: unknown setting"),
        ("sweep: {temperature: 3}", "key 'temperature': expected a list of choices, or a range such as"),
        ("sweep: {temperature: []}", "`choices` must contain one or more elements"),
        ("sweep: {temperature: [1, hot]}", "hot"),
        ("sweep: {temperature: {low: 1}}", "key 'temperature': key 'high': Missing required argument"),
        ("sweep: {temperature: {low: 1, hgih: 2}}", "key 'hgih': Unexpected keyword argument"),
        ("sweep: {temperature: {low: 5, high: 1}}", "`low <= high` must hold"),
        ("sweep: {temperature: {low: 0, high: 1}}", "temperature"),
        ("sweep: {temperature: {low: one, high: 2}}", "key 'low': Input should be a valid number"),
        ("sweep: {temperature: {low: 1, high: .inf}}", "key 'high': Input should be a finite number"),
        ("sweep: {label_smoothing: {low: 0, high: 1, log: true}}", "key 'label_smoothing': "),
        ("sweep: {temperature: {low: 1, high: 2, step: 0.3}}", "not divisible by `step`"),
        ("sweep: {temperature: {low: 1, high: 2, step: 1, log: true}}", "key 'temperature': "),
        ("sweep: {batch_size: {low: 1.5, high: 3}}", "key 'low': Input should be a valid integer"),
        ("sweep: {student_model: {low: 1, high: 3}}", "key 'student_model': not a number; list its choices"),
        ("sweep: {loss: {low: 1, high: 3}}", "key 'loss': not a number; list its choices"),
        ("sweep: {loss: {ce: 0.1, kl: 0.9}}", "key 'loss': no weight is searched"),
        ("sweep: {teacher_model: [resnet18]}", "can't be searched: all trials share one teacher"),
        ("sweep: {seed: [1, 2]}", "key 'seed': can't be searched"),
        ("sweep: {temperature: [1]}\ntemperature: 2", "key 'temperature': also under 'sweep'; remove one of them"),
        ("sweep: {temperature: [1]}\ntrails: 2", "key 'trails': unknown setting; did you mean 'trials'?"),
        ("sweep: {temperature: [1]}\nbach_size: 2", "key 'bach_size': unknown setting; did you mean 'batch_size'"),
        ("sweep: {temperature: [1]}\nbatch_size: 0", "--batch_size 0: must be at least 1"),
        ("sweep: {temperature: [1]}\ntrials: 0", "key 'trials': Input should be greater than or equal to 1"),
        ("sweep: {temperature: [1]}\ntrials: many", "key 'trials': Input should be a valid integer"),
        ("sweep: {temperature: [1]}\nlost_after: soon", "key 'lost_after': Input should be a valid integer"),
        ("sweep: {temperature: [1]}\nprune: 3", "key 'prune': Input should be a valid boolean"),
        ("sweep: {temperature: [1]}\nbaseline: true", "(--baseline was given in search.yaml, key 'baseline')"),
        ("sweep: {temperature: [1]}\ncompare_losses: [kl]", "--compare_losses: has no meaning in a sweep"),
        ("sweep: {temperature: [1]}\nfast_dev_run: true", "--fast_dev_run: has no meaning in a sweep"),
        ("sweep: {temperature: [1]}\nresume: auto", "--resume: has no meaning in a sweep"),
        ("sweep: {temperature: [1]}\nnum_nodes: 2", "a trial runs on one device"),
        ("sweep: {temperature: [1]}\ndevices: 2", "a trial runs on one device"),
    ],
)
def test_a_mistake_is_one_message_and_exit_status_2_before_anything_runs(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write_plan(text))]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""
    assert err.count("error:") == 1
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "student_model: [linear, lineer]",
            "--student_model lineer: there is no network 'lineer'; did you mean 'linear'?",
        ),
        ("loss: ['ce=1 kll=1']", "--loss: there is no loss 'kll'; did you mean 'kl'?"),
        ("loss: [ce]", "there is nothing to distill"),
    ],
)
def test_an_unknown_network_or_loss_among_the_choices_is_refused_before_anything_runs(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (
        "dataset: digits\nimage_size: 8\naugment: none\naccelerator: cpu\nteacher_model: linear\ntrain_teacher: true\n"
    )
    key = text.partition(":")[0]
    assert main(["sweep", str(write_plan(f"{base}sweep:\n  {text}\n"))]) == 2
    _, err = capsys.readouterr()
    assert words in err
    assert f"(--{key} was given in search.yaml, key 'sweep', key '{key}')" in err
    assert not Path("logs").exists()


def test_a_missing_file_and_wrong_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "absent.yaml"]) == 2
    assert "absent.yaml: no such file" in capsys.readouterr().err
    assert main(["sweep", str(write_plan("sweep: {temperature: [1]}")), "--workers", "0"]) == 2
    assert "--workers 0: must be at least 1" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", str(write_plan("sweep: {temperature: [1]}"))]) == 2
    assert "pip install '.[sweep]'" in capsys.readouterr().err
