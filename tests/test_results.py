"""The tables of the README and the documentation are those of ``results``, and each can be made again."""

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from benchmarks import readme, reproduce, tables
from kd.settings import resolve
from tests.conftest import REPOSITORY

PAGES = "\n".join(page.read_text(encoding="utf-8") for page in readme.pages())


def stated(name: str) -> str | None:
    found = re.search(rf"<!-- results: {name}, .*? -->\n(.*?)\n<!-- end of {name} -->", PAGES, flags=re.DOTALL)
    return found and found[1]


@pytest.mark.parametrize("table", tables.names())
def test_the_readme_shows_what_was_found(table: str) -> None:
    assert stated(table) == tables.markdown(table)


def test_size_and_speed_are_those_that_were_measured() -> None:
    assert stated("networks") == readme.networks()


def test_the_gain_on_the_front_page_is_what_was_found() -> None:
    assert stated("front") == readme.front()


def test_what_is_found_anew_takes_the_place_of_what_was_stated() -> None:
    old = re.sub(r"(<!-- results: [^>]*-->\n).*?(?=<!-- end of)", r"\1as it was\n", PAGES, flags=re.DOTALL)
    assert old.count("as it was\n<!-- end of") == len({*tables.names(), *readme.OTHERS})
    assert readme.fill(old) == PAGES


@pytest.mark.parametrize("part", tables.found())
def test_what_was_found_was_found_with_the_file_beside_it(part: str) -> None:
    used = yaml.safe_load((tables.RESULTS / part / "config.yaml").read_text(encoding="utf-8"))
    settings, *_ = resolve(["--config", str(tables.CONFIGS / f"{part}.yaml")])
    given = settings.flat()
    # One device, whether it was asked for or all that there was; what was cut off and went on came to the same end.
    elsewhere = {"args_file", "config", "data_dir", "default_root_dir", "devices", "resume"}
    differing = {name for name in given if name not in elsewhere and used.get(name, given[name]) != _plain(given[name])}
    assert differing <= ({"loss"} if given["compare_losses"] else set())


@pytest.mark.parametrize("part", tables.found())
def test_a_summary_is_that_of_its_report_and_names_no_place_of_its_machine(part: str) -> None:
    folder = tables.RESULTS / part
    rows = tables.rows_of(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    page = (folder / "report.html").read_text(encoding="utf-8")
    used = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    counts = {"teacher": len(used["teacher_model"]), "teachers": 1, "assistant": 1}
    for row in rows:
        assert f"{row.mean:.2%}" in page
        assert row.count == counts.get(row.name.split()[0], used["seeds"])
        assert row.name.startswith(tuple(counts)) or row.count >= 3
    for file in folder.iterdir():
        assert not re.search(r"(?<![\w.])/(root|home|tmp|work)/", file.read_text(encoding="utf-8")), file


def test_every_configuration_has_its_place_and_no_results_are_left_over() -> None:
    assert {path.stem for path in tables.CONFIGS.glob("*.yaml")} == set(tables.PARTS)
    kept = {path.name for path in tables.RESULTS.iterdir() if path.is_dir()}
    assert kept == {*tables.found(), "networks"}
    assert "mnist-linear" in kept


def test_an_experiment_that_names_a_teacher_names_that_of_the_one_which_is_run_before_it() -> None:
    named = {}
    for part in tables.PARTS:
        settings, *_ = resolve(["--config", str(tables.CONFIGS / f"{part}.yaml")])
        for checkpoint in settings.models.teacher_checkpoint:
            named[part] = checkpoint
    assert len(named) == 10
    assert named == {part: reproduce.teacher_of(part) for part in named}


def test_a_teacher_for_others_is_trained_without_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for part in set(tables.NEEDS.values()):
        settings, *_ = resolve([*tables.command(part)[2:], *tables.ONLY_TEACHER, "--resume"])
        phases = settings.phases
        assert (phases.train_teacher, phases.baseline, phases.distill, phases.resume) == (True, False, False, "auto")
        assert not settings.objective.compare_losses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnist"], "There is no table mnist; there are mnist-linear, mnist-conv, imagenette-today"),
        (["losses", "--only", "loss"], "losses has no loss; it has losses."),
        (["mnist-conv", "--only", "mnist-conv", "mnist-linear", "--show"], "mnist-conv has no mnist-linear; it has"),
    ],
)
def test_a_table_that_is_not_there_is_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    assert reproduce.main() == 2
    assert capsys.readouterr().out.startswith(words)


def test_results_are_not_stored_over_those_of_an_earlier_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reproduce", "losses", "--store"])
    monkeypatch.setattr(tables, "HOME", tmp_path)
    (tmp_path / tables.LOGS / "losses").mkdir(parents=True)
    (tmp_path / tables.LOGS / "losses" / "summary.json").touch()
    assert reproduce.main() == 2
    assert capsys.readouterr().out == "losses lies in logs from an earlier time: move it away.\n"


def test_a_table_is_as_stated_within_its_deviation_alone() -> None:
    def row(name: str, mean: float, std: float | None = 0.01) -> tables.Row:
        return tables.Row(name, mean, std, 1 if std is None else 3, "", 1.0)

    was = [row("teacher", 0.99, None), row("student alone", 0.90), row("kl", 0.92)]

    def holds(*now: tables.Row) -> tuple[bool, str]:
        output = io.StringIO()
        return reproduce.compare(was, list(now), Console(file=output, width=100)), output.getvalue()

    # Two rows of three seeds: t of four degrees of freedom at 98.75 % is 3.495, times 0.01, times the root of 2 / 3.
    near, far = 0.0285, 0.0286
    assert holds(row("teacher", 0.986, None), row("student alone", 0.90 + near), row("kl", 0.92 - near))[0]
    assert not holds(row("teacher", 0.984, None), row("student alone", 0.90), row("kl", 0.92))[0]
    is_so, text = holds(row("teacher", 0.99, None), row("student alone", 0.90 - far), row("kl", 0.92))
    assert not is_so
    assert [line.split()[-3] for line in text.splitlines() if "±" in line] == ["yes", "no", "yes"]
    assert "missing" in holds(row("teacher", 0.99, None), row("student alone", 0.90))[1]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
