"""A sweep's file: what is understood, and what is refused before anything runs."""

import sys
from pathlib import Path

import pytest

from kd.cli import main
from kd.errors import UserError
from kd.sweep import Plan, read_plan
from kd.sweep.spaces import Choices, Range, Weights


def written(text: str) -> Path:
    path = Path("search.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def plan_of(text: str) -> Plan:
    return read_plan(written(text))


def test_ranges_choices_and_weights_are_read() -> None:
    plan = plan_of(
        "dataset: digits\ntrials: 7\nprune: false\nsampler_seed: 3\nlost_after: 9.5\nsweep:\n"
        "  learning_rate: {low: 1e-4, high: 1e-1, log: true}\n"
        "  batch_size: {low: 16, high: 64, step: 16}\n"
        "  student_model: [simple, resnet18]\n"
        "  ema: [null, 0.999]\n"
        "  assistants: [[resnet34, resnet18], []]\n"
        "  loss: {ce: {low: 0, high: 1}, kl: 0.9, mse: [0, 0.5]}\n"
    )
    assert (plan.trials, plan.prune, plan.sampler_seed, plan.lost_after) == (7, False, 3, 9.5)
    assert plan.folder == Path("logs/search")
    assert dict(plan.spaces) == {
        "learning_rate": Range(1e-4, 0.1, log=True),
        "batch_size": Range(16, 64, step=16, whole=True),
        "student_model": Choices({"simple": "simple", "resnet18": "resnet18"}),
        "ema": Choices({"None": None, "0.999": 0.999}),
        "assistants": Choices({"resnet34 resnet18": ["resnet34", "resnet18"], "": []}),
        "loss": Weights({"ce": Range(0, 1), "kl": 0.9, "mse": Choices({"0": 0, "0.5": 0.5})}),
    }


def test_what_a_trial_draws_goes_through_the_settings_parser() -> None:
    plan = plan_of("name: a\ndataset: digits\nsweep: {loss: {ce: {low: 0, high: 1}, kl: 0.9}, temperature: [1, 4]}\n")
    settings = plan.settings({"loss": {"ce": 0.25, "kl": 0.9}, "temperature": 4}, name="7")
    assert settings.objective.loss == ("ce=0.25", "kl=0.9")
    assert settings.objective.temperature == 4.0
    assert (settings.phases.distill, settings.phases.name, settings.machine.devices) == (True, "7", "1")
    with pytest.raises(UserError, match=r"search.yaml, key 'sweep', key 'temperature': --temperature must be above 0"):
        plan.settings({"temperature": -1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "search.yaml: a file of settings holds 'name: value' lines"),
        ("a: [", "search.yaml: this is no YAML"),
        ("dataset: digits", "search.yaml, key 'sweep': here stand the settings to search"),
        ("sweep: {}", "search.yaml, key 'sweep': here stand the settings to search"),
        ("sweep: {temprature: [1]}", "key 'temprature': there is no such setting; did you mean 'temperature'?"),
        ("sweep: {1: [1]}", "key 1: there is no such setting"),
        ("sweep: {temperature: 3}", "key 'temperature': a list of choices stands here, or a range such as"),
        ("sweep: {temperature: []}", "there is nothing to choose from"),
        ("sweep: {temperature: [1, 2, 1]}", "key 'temperature': 1 stands there twice"),
        ("sweep: {temperature: [1, hot]}", "key 'temperature': --temperature is"),
        ("sweep: {temperature: {low: 1}}", "key 'temperature': the range has no high"),
        ("sweep: {temperature: {low: 1, hgih: 2}}", "and no 'hgih'; did you mean 'high'?"),
        ("sweep: {temperature: {low: 5, high: 1}}", "low must be below high, and they are 5 and 1"),
        ("sweep: {temperature: {low: 0, high: 1}}", "key 'temperature': --temperature must be above 0, and is 0.0"),
        ("sweep: {temperature: {low: one, high: 2}}", "key 'low': this is a number, not 'one'"),
        ("sweep: {temperature: {low: true, high: 2}}", "key 'low': this is a number, not True"),
        ("sweep: {temperature: {low: 1, high: .inf}}", "key 'high': this is a number, not inf"),
        ("sweep: {label_smoothing: {low: 0, high: 1, log: true}}", "with log, low must be above 0"),
        ("sweep: {temperature: {low: 1, high: 2, log: 1}}", "key 'log': this is true or false, not 1"),
        ("sweep: {temperature: {low: 1, high: 2, step: 0.3}}", "so many steps of 0.3 do not lead from 1 to 2"),
        ("sweep: {temperature: {low: 1, high: 2, step: 1, log: true}}", "there is no step with log"),
        ("sweep: {batch_size: {low: 1.5, high: 3}}", "key 'low': this is a whole number, not 1.5"),
        ("sweep: {student_model: {low: 1, high: 3}}", "key 'student_model': this takes no number; list its choices"),
        ("sweep: {loss: {low: 1, high: 3}}", "key 'loss': this takes no number; list its choices"),
        ("sweep: {loss: {ce: 0.1, kl: 0.9}}", "key 'loss': no weight is searched"),
        ("sweep: {loss: {ce: {low: -1, high: 1}}}", "key 'ce': a weight must be 0 or more, and is -1"),
        ("sweep: {loss: {ce: much}}", "key 'ce': this is a number, not 'much'"),
        ("sweep: {teacher_model: [resnet18]}", "this can't be searched: all trials learn from one teacher"),
        ("sweep: {seed: [1, 2]}", "key 'seed': this can't be searched"),
        (
            "sweep: {temperature: [1]}\ntemperature: 2",
            "key 'temperature': this is searched, so that it has no one value",
        ),
        ("sweep: {temperature: [1]}\ntrails: 2", "key 'trails': there is no such setting; did you mean 'trials'?"),
        (
            "sweep: {temperature: [1]}\nbach_size: 2",
            "key 'bach_size': there is no such setting; did you mean 'batch_size'",
        ),
        ("sweep: {temperature: [1]}\nbatch_size: 0", "search.yaml, key 'batch_size': --batch_size must be at least 1"),
        ("sweep: {temperature: [1]}\ntrials: 0", "key 'trials': this must be at least 1, and is 0"),
        ("sweep: {temperature: [1]}\ntrials: many", "key 'trials': this is a whole number, not 'many'"),
        ("sweep: {temperature: [1]}\nlost_after: soon", "key 'lost_after': this is a number, not 'soon'"),
        ("sweep: {temperature: [1]}\nlost_after: .nan", "key 'lost_after': this must be at least 1, and is nan"),
        ("sweep: {temperature: [1]}\nprune: 3", "key 'prune': this is true or false, not 3"),
        ("sweep: {temperature: [1]}\nbaseline: true", "(--baseline was given in search.yaml, key 'baseline')"),
        ("sweep: {temperature: [1]}\ncompare_losses: [kl]", "a sweep searches objectives under 'loss'"),
        ("sweep: {temperature: [1]}\nfast_dev_run: true", "--fast_dev_run: its accuracies mean nothing"),
        ("sweep: {temperature: [1]}\nresume: auto", "a sweep goes on by itself"),
        ("sweep: {temperature: [1]}\nnum_nodes: 2", "each trial runs on one machine"),
        ("sweep: {temperature: [1]}\ndevices: 2", "--devices 2: each trial runs on one device"),
    ],
)
def test_a_mistake_ends_in_status_2_and_one_message_before_anything_runs(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(written(text))]) == 2
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
def test_a_choice_that_no_network_or_loss_is_called_is_refused_before_anything_runs(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (
        "dataset: digits\nimage_size: 8\naugment: none\naccelerator: cpu\nteacher_model: linear\ntrain_teacher: true\n"
    )
    key = text.partition(":")[0]
    assert main(["sweep", str(written(f"{base}sweep:\n  {text}\n"))]) == 2
    _, err = capsys.readouterr()
    assert words in err
    assert f"(--{key} was given in search.yaml, key 'sweep', key '{key}')" in err
    assert not Path("logs").exists()


def test_a_missing_file_and_wrong_flags_are_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "absent.yaml"]) == 2
    assert "absent.yaml: there is no such file" in capsys.readouterr().err
    assert main(["sweep", str(written("sweep: {temperature: [1]}")), "--workers", "0"]) == 2
    assert "--workers must be at least 1" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", str(written("sweep: {temperature: [1]}"))]) == 2
    assert "pip install '.[sweep]'" in capsys.readouterr().err
