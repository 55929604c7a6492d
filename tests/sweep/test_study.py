"""How workers that share a database agree on which trial is whose."""

import threading
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from kd.errors import UserError
from kd.sweep import Plan, read_plan
from kd.sweep.study import Pulse, Study, Watch


def plan_of(*, trials: int = 3, lost_after: float = 60, more: str = "") -> Plan:
    Path("search.yaml").write_text(
        f"name: s\ndataset: digits\ntrials: {trials}\nlost_after: {lost_after}\n"
        f"sweep: {{temperature: {{low: 1, high: 9}}}}\n{more}"
    )
    plan = read_plan(Path("search.yaml"))
    plan.folder.mkdir(parents=True, exist_ok=True)
    return plan


def test_however_many_ask_at_once_as_many_trials_run_as_are_wanted() -> None:
    plan = plan_of(trials=5)
    Study(plan)
    ran: list[int] = []

    def work() -> None:
        study = Study(plan)
        while (trial := study.next_trial()) is not None:
            ran.append(trial.number)
            study.tell(trial, TrialState.COMPLETE, 0.5)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    study = Study(plan)
    assert len(ran) == len(set(ran)) == 5
    assert [one.state for one in study.trials()] == [TrialState.COMPLETE] * 5
    assert study.next_trial() is None


def test_a_trial_too_many_is_given_up_before_it_runs() -> None:
    plan = plan_of(trials=1)
    one, other = Study(plan), Study(plan)
    first = one._asked()
    # The other one has looked before the first asked, and asks now.
    assert other._asked() is None
    assert first is not None
    assert one.tell(first, TrialState.COMPLETE, 0.5)
    assert [trial.number for trial in one.trials()] == [0]


def test_a_trial_is_lost_when_its_pulse_stands_still_by_the_observers_clock() -> None:
    watch = Watch(10)
    assert watch.lost({0: None, 1: 5}, now=100) == set()
    assert watch.lost({0: None, 1: 6}, now=109) == set()
    assert watch.lost({0: None, 1: 6}, now=111) == {0}
    assert watch.lost({1: 6, 2: None}, now=118) == set()
    assert watch.lost({1: 6, 2: None}, now=120) == {1}


def test_a_lost_trial_is_replaced_and_does_not_count_even_if_its_worker_comes_back() -> None:
    said: list[str] = []
    plan = plan_of(trials=1, lost_after=1)
    asleep = Study(plan)
    lost = asleep.next_trial()
    assert lost is not None
    study = Study(plan, say=said.append)
    again = study.next_trial()
    assert again is not None
    assert again.number == 1
    assert said == [
        "Waiting for trials of other workers: 0",
        "Trial 0: lost, as its worker gave no sign of life for 1 s",
    ]
    assert study.tell(again, TrialState.COMPLETE, 0.5)
    assert not asleep.tell(lost, TrialState.COMPLETE, 0.9)
    assert study.next_trial() is None
    assert [one.state.name for one in study.trials()] == ["FAIL", "COMPLETE"]


def test_a_trial_with_a_pulse_is_not_lost() -> None:
    plan = plan_of(trials=1, lost_after=1)
    study, other = Study(plan), Study(plan)
    trial = study.next_trial()
    assert trial is not None
    got: list[optuna.Trial | None] = []
    waiting = threading.Thread(target=lambda: got.append(other.next_trial()))
    with Pulse(trial, lost_after=1):
        waiting.start()
        waiting.join(timeout=3)
        assert waiting.is_alive()
        study.tell(trial, TrialState.COMPLETE, 0.5)
    waiting.join(timeout=10)
    assert got == [None]


def test_what_a_trial_draws_hangs_on_its_number_and_the_seed() -> None:
    drawn: list[list[float]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plan = plan_of(trials=3, more=f"sampler_seed: {seed}\n")
        plan = read_plan(plan.file)
        study = Study(plan, storage=f"sqlite:///{name}.db")
        for _ in range(3):
            # Another process goes on.
            study = Study(plan, storage=f"sqlite:///{name}.db") if name == "b" else study
            trial = study.next_trial()
            assert trial is not None
            plan.spaces["temperature"].suggest(trial, "temperature")
            study.tell(trial, TrialState.COMPLETE, 0.5)
        drawn.append([one.params["temperature"] for one in study.trials()])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3


def test_a_sweep_is_not_gone_on_with_if_it_searches_something_else() -> None:
    Study(plan_of(trials=2))
    # More trials, another machine: still the same.
    Study(plan_of(trials=9, more="accelerator: cpu\nnum_workers: 3\n"))
    with pytest.raises(UserError, match=r"begun with other settings: max_epochs was 20 and is now 3; change it back"):
        Study(plan_of(more="max_epochs: 3\n"))


def test_the_teacher_is_named_by_its_place_in_the_folder() -> None:
    plan = plan_of()
    study = Study(plan)
    assert study.teachers == ()
    (plan.folder / "best.ckpt").touch()
    study.teachers = (str(plan.folder / "best.ckpt"),)
    assert study._study.user_attrs["teacher"] == ["best.ckpt"]
    assert Study(plan).teachers == (str(plan.folder / "best.ckpt"),)
    (plan.folder / "best.ckpt").unlink()
    with pytest.raises(UserError, match=r"the sweep.s teacher is not here: logs/s/best\.ckpt; machines that share"):
        _ = Study(plan).teachers


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "--storage nonsense: this database can't be opened"),
        ("sqlite:////absent/folder/x.db", "unable to open database file"),
        (
            "postgresql+nodriver://me:secret@host/db",
            r"--storage postgresql\+nodriver://...@host/db: this database can't",
        ),
    ],
)
def test_a_database_that_cant_be_opened_is_a_mistake_and_its_password_is_not_told(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Study(plan_of(), storage=url)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_a_mistake() -> None:
    plan = plan_of()
    (plan.folder / "sweep.db").write_text("these are no trials, and no tables to keep them in" * 10)
    with pytest.raises(UserError, match=r"logs/s/sweep\.db: this database can't be opened"):
        Study(plan)
