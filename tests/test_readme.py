"""The README keeps its word: its table is the settings', its commands are understood, its example runs."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kd.losses
import kd.settings
from kd.cli import experiment, main
from kd.losses import Outputs, build_objective
from kd.settings import resolve
from tests.conftest import MakeFolder
from tests.pipeline.test_experiment import run

PAGES = ("README.md", "docs/losses.md", "docs/scale.md")


def blocks(repository: Path, language: str) -> list[str]:
    text = "".join((repository / page).read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(repository: Path) -> list[list[str]]:
    """Return every command line of the README that runs an experiment, in Docker too, as its arguments."""
    found = []
    for line in "\n".join(blocks(repository, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if "experiment.py" in words:
            found.append(words[words.index("experiment.py") + 1 :])
        elif words[:2] == ["docker", "run"]:
            found.append(words[words.index("kd") + 1 :])
        elif words[:3] == ["docker", "compose", "run"]:
            found.append(words[words.index("experiment") + 1 :])
    return found


@pytest.mark.parametrize(
    ("file", "name", "table"),
    [
        ("README.md", "flags", kd.settings.markdown_table),
        ("docs/losses.md", "losses", kd.losses.markdown_table),
    ],
)
def test_a_table_is_that_of_the_code(repository: Path, file: str, name: str, table: Callable[[], str]) -> None:
    text = (repository / file).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: .*? -->\n(.*?)\n<!-- end of {name} -->", text, flags=re.DOTALL)
    assert found is not None
    assert found[1] == table()


def test_the_list_of_losses_is_whole(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| what is compared | losses |") : text.index("[docs/losses.md]")]
    assert list(re.findall(r"`(\w+)`", table)) == list(kd.losses.LOSSES)


def test_every_command_is_understood(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    found = commands(repository)
    assert len(found) >= 7
    for arguments in found:
        settings, *_ = resolve(arguments)
        build_objective([term for term in settings.objective.loss if ".py:" not in term])


def test_the_job_for_kubernetes_is_understood(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    (manifest,) = [block for block in blocks(repository, "yaml") if "kind: Job" in block]
    service, job = yaml.safe_load_all(manifest)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    settings, *_ = resolve(arguments[arguments.index("experiment.py") + 1 :])
    assert f"--nnodes={settings.machine.num_nodes}" in arguments
    assert f"--nproc_per_node={settings.machine.devices}" in arguments
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == settings.machine.num_nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(settings.machine.devices)
    # The first pod's name, in the domain of the service.
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert f"--rdzv_endpoint={name}-0.{pod['subdomain']}:29500" in arguments
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


@pytest.mark.slow
def test_the_worked_example_runs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = next(block for block in blocks(repository, "python") if "def cosine" in block)
    Path("my_code.py").write_text(example, encoding="utf-8")
    (arguments,) = [words for words in commands(repository) if any("my_code.py" in word for word in words)]
    assert experiment([*arguments, "--accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "my_code.py" in out
    assert "student distilled" in out


def test_the_notebooks_lines_run(repository: Path) -> None:
    code = next(block for block in blocks(repository, "python") if "build_objective" in block)
    names = {
        "student_logits": torch.zeros(2, 3),
        "teacher_logits": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "Outputs": Outputs,
    }
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (the README's own lines)
    torch.testing.assert_close(names["total"], 0.1 * torch.tensor(3.0).log())


def test_files_that_the_readme_names_are_there(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower() for line in re.findall("^#+ (.*)$", text, flags=re.MULTILINE)
    }
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
        if name.startswith("#"):
            assert name[1:] in {heading.replace(" ", "-") for heading in headings}
        else:
            assert (repository / name).exists(), name


def test_the_students_lines_run(repository: Path, make_folder: MakeFolder) -> None:
    code = next(block for block in blocks(repository, "python") if "load_student" in block)
    folder = make_folder(train=12)
    done, _ = run(folder, "--baseline")
    photo = next((folder / "val").rglob("*.png"))
    code = re.sub(r"logs/NAME/\S+?\.ckpt", str(done.runs["baseline"][0]["checkpoint"]), code)
    names: dict[str, Any] = {}
    exec(code.replace("photo.jpg", str(photo)), names)  # noqa: S102 (the README's own lines)
    assert float(names["probabilities"].detach().sum()) == pytest.approx(1.0)
    assert names["transform"].classes == ("ant", "bee", "cat")


def test_every_kd_command_has_its_flags(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [shlex.split(line, comments=True) for line in "\n".join(blocks(repository, "bash")).splitlines()]
    found = [words for words in lines if words[:1] == ["kd"]]
    assert {words[1] for words in found} >= {"report", "tensorboard", "export", "predict", "evaluate"}
    for words in found:
        with pytest.raises(SystemExit) as stop:
            main([words[1], "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert flag in text, f"{flag} of {' '.join(words)}"
