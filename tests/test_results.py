"""The documented tables are generated from ``results``, and their configurations are complete."""

import io
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from benchmarks import readme, reproduce, tables
from kd.report import read_summary, write_report
from kd.settings import resolve
from tests.conftest import REPOSITORY

DOCUMENTED = {
    match["name"]: match["table"]
    for page in readme.pages()
    for match in readme.MARKED.finditer(page.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("table", [*tables.names(), *readme.OTHERS])
def test_the_documentation_shows_the_stored_results(table: str) -> None:
    assert DOCUMENTED[table] == readme.table(table)


def test_outdated_tables_are_replaced() -> None:
    page = "\n\n".join(
        f"<!-- results: {name}, x -->\n{text}\n<!-- end of {name} -->" for name, text in DOCUMENTED.items()
    )
    outdated = readme.MARKED.sub(r"\g<start>outdated\g<end>", page)
    assert outdated.count("outdated\n<!-- end of") == len(DOCUMENTED)
    assert readme.fill(outdated) == page


@pytest.mark.parametrize("part", tables.found())
def test_results_were_obtained_with_the_configuration_in_configs(part: str) -> None:
    stored = tables.RESULTS / part / "config.yaml"
    used, configured = (
        resolve(["--config", str(file)]).settings.flat() for file in (stored, tables.CONFIGS / f"{part}.yaml")
    )
    recorded = yaml.safe_load(stored.read_text(encoding="utf-8"))
    # These don't affect the results: a resumed run equals an uninterrupted one.
    ignored = {"args_file", "config", "data_dir", "default_root_dir", "devices", "resume"}
    differing = {
        name for name in configured if name in recorded and name not in ignored and used[name] != configured[name]
    }
    assert differing <= ({"loss"} if configured["compare_losses"] else set())


@pytest.mark.parametrize("part", tables.found())
def test_a_report_is_written_from_the_stored_results(part: str, tmp_path: Path) -> None:
    folder = tables.RESULTS / part
    rows = tables.rows_of(read_summary(folder))
    page = write_report([folder], output=tmp_path).read_text(encoding="utf-8")
    assert page.count("<svg") >= 4
    used = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    counts = {"teacher": len(used["teacher_model"]), "teacher ensemble": 1, "assistant 1": 1}
    for row in rows:
        assert f"{row.mean:.2%}" in page
        assert row.count == counts.get(row.name, used["seeds"])
        assert row.name.startswith(tuple(counts)) or row.count >= 3
    # No absolute paths of the machine.
    for file in (folder / name for name in ("config.yaml", "run.json", "summary.json")):
        assert not re.search(r"(?<![\w.])/(root|home|tmp|work)/", file.read_text(encoding="utf-8")), file


def test_every_configuration_and_every_result_belongs_to_a_table() -> None:
    assert {path.stem for path in tables.CONFIGS.glob("*.yaml")} == set(tables.PARTS)
    stored = {path.name for path in tables.RESULTS.iterdir() if path.is_dir()}
    assert stored == {*tables.found(), "networks"}
    assert "mnist-linear" in stored


def test_an_experiment_uses_the_teacher_of_the_experiment_it_needs() -> None:
    checkpoints = {}
    for part in tables.PARTS:
        settings, *_ = resolve(["--config", str(tables.CONFIGS / f"{part}.yaml")])
        for checkpoint in settings.models.teacher_checkpoint:
            checkpoints[part] = checkpoint
    assert len(checkpoints) == 10
    assert checkpoints == {part: reproduce.teacher_of(part) for part in checkpoints}


def test_a_teacher_for_other_experiments_is_trained_without_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for part in set(tables.NEEDS.values()):
        settings, *_ = resolve([*tables.command(part)[2:], *tables.ONLY_TEACHER, "--resume"])
        phases = settings.phases
        assert (phases.train_teacher, phases.baseline, phases.distill, phases.resume) == (True, False, False, "auto")
        assert not settings.objective.compare_losses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist"], "mnist: there is no such table; choose from mnist-linear, mnist-conv, imagenette-today"),
        (["losses", "--only", "loss"], "--only loss: not in losses; choose from losses\n"),
        (
            ["mnist-conv", "--only", "mnist-conv", "mnist-linear", "--show"],
            "--only mnist-linear: not in mnist-conv; choose from mnist-conv, ",
        ),
    ],
)
def test_an_unknown_table_or_experiment_is_an_error(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    assert reproduce.main() == 2
    assert capsys.readouterr().out.startswith(message)


def test_store_requires_that_the_experiments_folder_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reproduce", "losses", "--store"])
    monkeypatch.setattr(tables, "HOME", tmp_path)
    (tmp_path / tables.LOGS / "losses").mkdir(parents=True)
    (tmp_path / tables.LOGS / "losses" / "summary.json").touch()
    assert reproduce.main() == 2
    assert capsys.readouterr().out == "--store: logs/losses already exists; move it away\n"


def test_a_table_is_reproduced_within_its_tolerance() -> None:
    def row(name: str, mean: float, std: float | None = 0.01) -> tables.Row:
        return tables.Row(name, mean, std, 1 if std is None else 3, "", 1.0)

    stored = [row("teacher", 0.99, None), row("student, labels only", 0.90), row("kl", 0.92)]

    def compare(*reproduced: tables.Row) -> tuple[bool, str]:
        output = io.StringIO()
        return reproduce.compare(stored, list(reproduced), Console(file=output, width=100)), output.getvalue()

    # Two rows of three seeds: the 98.75 % quantile of t with 4 degrees of freedom is 3.495; times 0.01 * sqrt(2 / 3).
    within, beyond = 0.0285, 0.0286
    assert compare(row("teacher", 0.986, None), row("student, labels only", 0.90 + within), row("kl", 0.92 - within))[0]
    assert not compare(row("teacher", 0.984, None), row("student, labels only", 0.90), row("kl", 0.92))[0]
    is_reproduced, text = compare(
        row("teacher", 0.99, None), row("student, labels only", 0.90 - beyond), row("kl", 0.92)
    )
    assert not is_reproduced
    assert [line.split()[-3] for line in text.splitlines() if "±" in line] == ["yes", "no", "yes"]
    assert "missing" in compare(row("teacher", 0.99, None), row("student, labels only", 0.90))[1]
