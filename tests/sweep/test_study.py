"""The study that workers share: its definition, its sampler and its storage."""

from pathlib import Path

import pytest

from kd.errors import UserError
from kd.sweep import _run_workers
from kd.sweep.plan import Plan, read_plan
from kd.sweep.study import open_study
from kd.sweep.trials import draw_parameters


def plan_of(more: str = "") -> Plan:
    Path("search.yaml").write_text(f"name: s\ndataset: digits\nsweep: {{temperature: {{low: 1, high: 9}}}}\n{more}")
    plan = read_plan(Path("search.yaml"))
    plan.folder.mkdir(parents=True, exist_ok=True)
    return plan


def draw(storage: str, seed: int, *, reopen: bool) -> list[float]:
    """Return what three trials draw; with ``reopen``, another worker runs each of them."""
    plan = plan_of(f"sampler_seed: {seed}\n")
    study = open_study(plan, storage)
    for _ in range(3):
        study = open_study(plan, storage) if reopen else study
        trial = study.ask()
        draw_parameters(trial, plan.spaces)
        study.tell(trial, 0.5)
    return [trial.params["temperature"] for trial in study.trials]


def test_a_draw_depends_on_the_trial_number_and_the_seed_only() -> None:
    first = draw("a.log", 0, reopen=False)
    assert draw("b.log", 0, reopen=True) == first
    assert draw("c.log", 1, reopen=False) != first
    assert len(set(first)) == 3


def test_a_sweep_with_another_definition_is_not_resumed() -> None:
    open_study(plan_of("trials: 2\n"))
    # More trials, or another machine, are no other definition.
    open_study(plan_of("trials: 9\naccelerator: cpu\nnum_workers: 3\n"))
    with pytest.raises(UserError, match=r"started with other settings: max_epochs was 20 and is now 3; restore them"):
        open_study(plan_of("max_epochs: 3\n"))


def test_a_journal_file_is_a_storage() -> None:
    study = open_study(plan_of(), "trials.log")
    study.tell(study.ask(), 0.5)
    assert len(open_study(plan_of(), "trials.log").trials) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense://", r"--storage nonsense://: can't open this database"),
        ("sqlite:////absent/folder/x.db", "unable to open database file"),
        ("postgresql+nodriver://me:secret@host/db", r"--storage postgresql\+nodriver://...@host/db: can't open this"),
        ("mysql://me:secret@host/db", r"mysql://...@host/db: .*; install the driver: pip install 'pymysql'"),
        (
            "oracle://host/db?user=me&password=secret",
            r"user=\.\.\.&password=\.\.\.: .*; there are: the path of a journal",
        ),
    ],
)
def test_a_database_that_cant_be_opened_is_a_user_error_without_its_password(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        open_study(plan_of(), url)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_a_user_error() -> None:
    plan = plan_of()
    (plan.folder / "sweep.db").write_text("this is not a database" * 50)
    with pytest.raises(UserError, match=r"logs/s/sweep\.db: can't open this database"):
        open_study(plan)


def test_the_password_of_a_database_is_no_argument_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[tuple[list[str], dict[str, str]]]()

    class Ended:
        returncode = 0

        def __init__(self, command: list[str], *, env: dict[str, str]) -> None:
            started.append((command, env))

        def wait(self) -> None:
            pass

        terminate = wait

    monkeypatch.setattr("kd.sweep.subprocess.Popen", Ended)
    _run_workers(2, "search.yaml", "postgresql://me:secret@host/db")
    assert len(started) == 2
    for command, environment in started:
        assert not any("secret" in argument for argument in command)
        assert environment["KD_SWEEP_STORAGE"] == "postgresql://me:secret@host/db"


def test_postgresql_uses_the_driver_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[tuple[str, dict[str, object]]]()

    def refuse(url: str, **options: object) -> None:
        opened.append((url, options))
        raise ValueError("enough")

    monkeypatch.setattr("kd.sweep.study.RDBStorage", refuse)
    with pytest.raises(UserError, match="enough"):
        open_study(plan_of(), "postgresql://host/db")
    assert opened[0][0] == "postgresql+psycopg://host/db"
    # A connection is tried before it is used: the server may have been restarted.
    assert opened[0][1]["engine_kwargs"] == {"pool_pre_ping": True}
