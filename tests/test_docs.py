"""Commands, links, install lines and snippets of the README and the documentation are valid."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kd.losses
import kd.settings
from docs import hooks
from kd.cli import experiment, main
from kd.losses import Outputs, build_objective
from kd.settings import resolve
from kd.sweep.plan import read_plan
from tests.conftest import REPOSITORY, MakeFolder
from tests.pipeline.test_experiment import run

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
TEXTS = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README_LINES = 250


def blocks(language: str) -> list[str]:
    """Return the code blocks of all pages, including those indented within lists and tabs."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", "\n".join(TEXTS.values()), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


LINES = [
    shlex.split(line, comments=True) for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()
]


def experiments() -> list[list[str]]:
    """Return the arguments of every command that runs an experiment, including those in Docker."""
    arguments = []
    for words in LINES:
        if "experiment.py" in words:
            arguments.append(words[words.index("experiment.py") + 1 :])
        elif words[:2] == ["docker", "run"]:
            arguments.append(words[words.index("kd") + 1 :])
        elif words[:3] == ["docker", "compose", "run"]:
            arguments.append(words[words.index("experiment") + 1 :])
    return [words for words in arguments if "--help" not in words]


def kd_commands() -> list[list[str]]:
    """Return the arguments of every ``kd`` command."""
    starts = [words[words.index("kd") + 1 :] for words in LINES if words[:1] in (["kd"], ["uv"]) and "kd" in words]
    return [words for words in starts if words[0] != "--help"]


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= README_LINES


def test_every_experiment_command_is_valid(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    commands = experiments()
    assert len(commands) >= 30
    for arguments in commands:
        settings, *_ = resolve(arguments)
        for loss in (settings.objective.loss, *(text.split() for text in settings.objective.compare_losses)):
            build_objective([term for term in loss if ".py:" not in term])


def test_every_kd_command_is_valid(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    commands = kd_commands()
    names = {"report", "tensorboard", "export", "predict", "evaluate", "check", "sweep", "shard", "models", "losses"}
    assert {words[0] for words in commands} >= names
    for words in commands:
        if words[0] == "check":
            resolve(words[1:])
            continue
        if words[0] == "sweep" and words[1:2] and words[1].startswith("configs/"):
            read_plan(Path(words[1]))
        with pytest.raises(SystemExit) as stop:
            main([words[0], "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert flag in text, f"{flag} of kd {' '.join(words)}"


def test_no_page_installs_an_unpublished_package_by_name() -> None:
    for name, text in TEXTS.items():
        for line in re.findall(r".*\binstall\b.*", text):
            assert not re.search(r"install [^`]*(?<![\w./-])['\"]?kd\b(?!/)", line), f"{name}: {line}"
            assert not re.search(r"['\"]?\bkd\[", line), f"{name}: {line}"


def test_every_local_link_has_an_existing_target() -> None:
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            path = (REPOSITORY / name).parent / file if file else REPOSITORY / name
            assert path.exists(), f"{name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"[\w/-]+\.md", text[text.index("nav:") : text.index("hooks:")]))
    assert pages == {name.removeprefix("docs/") for name in TEXTS if name.startswith("docs/")}


def test_the_site_loads_no_external_resources() -> None:
    settings = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert "http" not in settings


def test_generated_tables_include_every_flag_and_every_loss() -> None:
    names = {name for text in TEXTS.values() for name in re.findall(r"<!-- generated: ([\w-]+) -->", text)}
    assert names == set(hooks.GENERATED)
    for _, setting in kd.settings.setting_fields():
        assert f"`--{setting.name}`" in hooks.GENERATED["flags"]()
    for name in kd.losses.LOSSES:
        for table in ("losses", "loss-families", "loss-sections"):
            assert f"`{name}`" in hooks.GENERATED[table]()


def test_formulas_are_converted_to_mathml() -> None:
    page = hooks.on_page_content(r'<p>x <span class="arithmatex">\(T &gt; 0\)</span></p>')
    assert page.startswith("<p>x <math")
    assert "arithmatex" not in page


def test_the_kubernetes_job_is_valid(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    (manifest,) = [block for block in blocks("yaml") if "kind: Job" in block]
    service, job = yaml.safe_load_all(manifest)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    settings, *_ = resolve(arguments[arguments.index("experiment.py") + 1 :])
    assert f"--nnodes={settings.machine.num_nodes}" in arguments
    assert f"--nproc_per_node={settings.machine.devices}" in arguments
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == settings.machine.num_nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(settings.machine.devices)
    # The host name of the first pod in the service.
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert f"--rdzv_endpoint={name}-0.{pod['subdomain']}:29500" in arguments
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
def test_the_example_of_a_custom_loss_and_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(block for block in blocks("python") if "def cosine" in block)
    Path("my_code.py").write_text(example, encoding="utf-8")
    arguments = next(words for words in experiments() if any("my_code.py:tiny" in word for word in words))
    assert experiment([*arguments, "--accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "my_code.py" in out
    assert "distilled" in out


def test_the_example_of_an_objective_runs() -> None:
    code = next(block for block in blocks("python") if "build_objective" in block)
    names = {
        "student_logits": torch.zeros(2, 3),
        "teacher_logits": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "Outputs": Outputs,
    }
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (documented code)
    torch.testing.assert_close(names["total"], 0.1 * torch.tensor(3.0).log())


def test_the_example_of_prediction_runs(make_folder: MakeFolder) -> None:
    code = next(block for block in blocks("python") if "photo.jpg" in block)
    folder = make_folder(train=12)
    result, _ = run(folder, "--baseline")
    photo = next((folder / "val").rglob("*.png"))
    code = re.sub(r"logs/NAME/\S+?\.ckpt", str(result.runs["baseline"][0]["checkpoint"]), code)
    names: dict[str, Any] = {}
    exec(code.replace("photo.jpg", str(photo)), names)  # noqa: S102 (documented code)
    assert float(names["probabilities"].detach().sum()) == pytest.approx(1.0)
    assert names["transform"].classes == ("ant", "bee", "cat")
