import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd.errors import UserError
from kd.settings import Settings, resolve, write_config


def resolved(*arguments: str) -> dict[str, Any]:
    return resolve(list(arguments))[0].flat()


def test_no_source_gives_the_defaults() -> None:
    assert resolve([])[0] == Settings()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--distill", True),
        ("--no-distill", False),
        ("--distill true", True),
        ("--distill false", False),
        ("--distill True", True),
        ("--distill=false", False),
        ("--distill=TRUE", True),
    ],
)
def test_switches_mean_what_they_say(words: str, value: bool) -> None:
    Path("commandline_args.txt").write_text("" if value else "--distill\n")
    assert resolved(*words.split())["distill"] is value
    Path("commandline_args.txt").write_text(words)
    assert resolved()["distill"] is value


def test_a_switch_does_not_swallow_the_flag_after_it() -> None:
    flat = resolved("--distill", "--seeds", "2", "--baseline")
    assert (flat["distill"], flat["seeds"], flat["baseline"]) == (True, 2, True)


def test_later_sources_win() -> None:
    Path("commandline_args.txt").write_text("--seed 1 --seeds 1 --batch_size 1 --max_epochs 1  # a comment\n")
    Path("a.yaml").write_text("seeds: 2\nbatch_size: 2\nmax_epochs: 2\n")
    Path("b.yaml").write_text("batch_size: 3\nmax_epochs: 3\n")
    flat = resolved("--config", "a.yaml", "b.yaml", "--max_epochs", "4")
    assert (flat["seed"], flat["seeds"], flat["batch_size"], flat["max_epochs"]) == (1, 2, 3, 4)


def test_args_file_names_another_file() -> None:
    Path("commandline_args.txt").write_text("--seed 1\n")
    Path("mine.txt").write_text("--seed 2\n")
    assert resolved("--args_file", "mine.txt")["seed"] == 2


def test_the_file_of_flags_is_never_written() -> None:
    file = Path("commandline_args.txt")
    file.write_text("--seed 1\n")
    resolved("--seed", "5")
    assert file.read_text() == "--seed 1\n"


def test_flags_may_go_on_over_lines_and_be_quoted() -> None:
    Path("commandline_args.txt").write_text(
        "--loss ce=0.1\n    'kl(temperature=2)=0.9'\n\n# nothing\n--name 'my run'\n"
    )
    flat = resolved()
    assert (flat["loss"], flat["name"]) == (["ce=0.1", "kl(temperature=2)=0.9"], "my run")


def test_a_mark_at_the_beginning_of_a_file_is_passed_over() -> None:
    Path("commandline_args.txt").write_text("--seed 3\n", encoding="utf-8-sig")
    assert resolved()["seed"] == 3


def test_yaml_writes_terms_in_three_ways() -> None:
    for number, text in enumerate(("{ce: 0.1, kl: 0.9}", "[ce=0.1, kl=0.9]", "ce=0.1 kl=0.9")):
        Path(f"{number}.yaml").write_text(f"loss: {text}\n")
        assert " ".join(resolved("--config", f"{number}.yaml")["loss"]) == "ce=0.1 kl=0.9"


def test_numbers_of_batches_and_parts_are_told_apart() -> None:
    flat = resolved("--limit_train_batches", "2", "--limit_val_batches", "0.5")
    assert (flat["limit_train_batches"], flat["limit_val_batches"]) == (2, 0.5)
    assert isinstance(resolved("--limit_train_batches", "1.0")["limit_train_batches"], float)


def test_one_of_several_may_stand_alone_and_none_is_none() -> None:
    Path("several.yaml").write_text(
        "teacher_model: resnet50\nteacher_checkpoint: null\nassistants: [resnet34, resnet18]\nteacher_weights: []\n"
    )
    models = resolve(["--config", "several.yaml"]).settings.models
    assert models.teacher_model == ("resnet50",)
    assert (models.teacher_checkpoint, models.teacher_weights) == ((), ())
    assert models.assistants == ("resnet34", "resnet18")
    several = resolve(["--teacher_model", "resnet50", "densenet121", "--teacher_weights", "2", "1.5"]).settings.models
    assert (several.teacher_model, several.teacher_weights) == (("resnet50", "densenet121"), (2.0, 1.5))


def test_an_empty_yaml_changes_nothing() -> None:
    Path("empty.yaml").write_text("# nothing here\n")
    assert resolved("--config", "empty.yaml") == Settings().flat()


def test_resolved_settings_are_a_legal_config_again(tmp_path: Path) -> None:
    settings, *_ = resolve(
        ["--distill", "--loss", "ce=0.5", "kl(temperature=2)=2", "--limit_val_batches", "3", "--name", "x"]
    )
    write_config(settings, tmp_path / "folder" / "config.yaml")
    again, *_ = resolve(["--config", str(tmp_path / "folder" / "config.yaml")])
    assert again.flat() == settings.flat()
    assert yaml.safe_load((tmp_path / "folder" / "config.yaml").read_text()) == settings.flat()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["config.yaml"]


FIRST_GENERATION = {
    "data_dir": "~/datasets/imagenette2",
    "train_data": "train",
    "val_data": "val",
    "train_teacher": True,
    "distill": False,
    "student_model": "simple",
    "teacher_model": "densenet121",
    "image_size": 224,
    "num_classes": 10,
    "default_root_dir": "logs",
    "max_epochs": 25,
    "gpus": 1,
    "batch_size": 48,
    "num_workers": 4,
    "learning_rate": 0.001,
    "momentum": 0.9,
    "fast_dev_run": False,
}


def test_the_first_generations_file_means_what_it_meant() -> None:
    Path("commandline_args.txt").write_text(json.dumps(FIRST_GENERATION))
    settings, remarks, _ = resolve(["--distill"])
    flat = settings.flat()
    kept = {key: value for key, value in FIRST_GENERATION.items() if key not in ("gpus", "distill", "teacher_model")}
    assert {key: flat[key] for key in kept} == kept
    assert flat["teacher_model"] == [FIRST_GENERATION["teacher_model"]]
    assert flat["distill"] is True
    assert (flat["accelerator"], flat["devices"]) == ("auto", "1")
    recipe = {"optimizer": "sgd", "schedule": "constant", "augment": "rotate", "loss": ["mse=1"]}
    assert {key: flat[key] for key in recipe} == recipe
    assert flat["teacher_pretrained"] is True
    assert len(remarks) == 1
    assert "first generation" in remarks[0]


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices"),
    [
        (0, "cpu", "auto"),
        (None, "cpu", "auto"),
        ([], "cpu", "auto"),
        (2, "auto", "2"),
        (True, "auto", "1"),
        ("2", "auto", "2"),
        ([0, 3], "auto", "0,3,"),
        ([1], "auto", "1,"),
        (-1, "auto", "-1"),
    ],
)
def test_the_first_generations_gpus_become_devices(gpus: object, accelerator: str, devices: str) -> None:
    Path("commandline_args.txt").write_text(json.dumps({"gpus": gpus}))
    flat = resolved()
    assert (flat["accelerator"], flat["devices"]) == (accelerator, devices)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "args",
            "--seed 0\n--bach_size 3\n",
            r"commandline_args.txt, line 2: there is no flag --bach_size; did you mean ",
        ),
        ("args", "--seed 0\n\n--batch_size two\n", r"commandline_args.txt, line 3: .*--batch_size.*'two'"),
        ("args", "--batch_size 0", r"commandline_args.txt, line 1: --batch_size must be at least 1, and is 0"),
        ("args", "--name 'open", r"commandline_args.txt, line 1: No closing quotation"),
        ("args", "--seed 1\n--seeds 2\n--seed 3", r"line 3: --seed stands in line 1 already"),
        ("args", "--config x.yaml", r"line 1: --config can only stand on the command line"),
        ("args", '{"num_clases": 3}', r"key 'num_clases': there is no such setting; did you mean 'num_classes'\?"),
        ("args", '{"gpus": 1', r"it begins like a JSON object, and is none"),
        ("yaml", "bach_size: 3", r"c.yaml, key 'bach_size': there is no such setting; did you mean 'batch_size'\?"),
        ("yaml", "batch_size: two", r"c.yaml, key 'batch_size': .*'two'"),
        ("yaml", "seed: 1\nbatch_size: [1, 2]", r"c.yaml, key 'batch_size': one value stands here, not \[1, 2\]"),
        ("yaml", "seed: 1\naugment: [crop]", r"c.yaml, key 'augment': one value stands here"),
        ("yaml", "distill: maybe", r"c.yaml, key 'distill': this is true or false, not 'maybe'"),
        ("yaml", "- a\n- b", r"c.yaml: a file of settings holds 'name: value' lines, and this is a list"),
        ("yaml", "a: [", r"c.yaml: this is no YAML"),
        ("yaml", "a: !!python/object/apply:os.system [ls]", r"c.yaml: this is no YAML"),
        ("yaml", "config: [x]", r"c.yaml, key 'config': --config can only stand on the command line"),
        ("yaml", "3: 4", r"c.yaml, key 3: there is no such setting"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_place(file: str, text: str, words: str) -> None:
    Path({"args": "commandline_args.txt", "yaml": "c.yaml"}[file]).write_text(text)
    with pytest.raises(UserError, match=words):
        resolve(["--config", "c.yaml"] if file == "yaml" else [])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--bach_size 3", r"on the command line: there is no flag --bach_size; did you mean '--batch_size'\?"),
        ("--batch-size 3", r"there is no flag --batch-size; did you mean '--batch_size'\?"),
        ("-b 3", r"there is no flag -b; "),
        (
            "--batch_size two",
            r"on the command line: --batch_size is a whole number or auto, not 'two'",
        ),
        ("--max_steps few", r"on the command line: --max_steps is INT, not 'few'\n"),
        ("--limit_val_batches few", r"on the command line: --limit_val_batches is INT\|FLOAT, not 'few'\n"),
        ("--learning_rate fast", r"on the command line: --learning_rate is a number, not 'fast'"),
        ("--batch_size", r"on the command line: Missing value for argument '--batch_size'"),
        ("--temperature 0", r"--temperature must be above 0, and is 0.0"),
        ("--temperature -1", r"--temperature must be above 0, and is -1.0"),
        ("--augment foo", r"'foo' for argument '--augment'. Expected one of \('none', 'crop'"),
        ("--distill maybe", r"on the command line: .*maybe"),
        ("--distill=maybe", r"--distill is true or false, not 'maybe'"),
        ("--no-distill true", r"--no-distill takes no value; say --distill true or --distill false"),
        ("--no-seeds", r"there is no flag --no-seeds"),
        ("--seed 1 --seed 2", r"--seed is given twice"),
        ("stray", r"stray"),
        ("--config absent.yaml", r"absent.yaml: there is no such file"),
        ("--config .", r"this file can't be read"),
        ("--args_file commandline_args.txt", r"--args_file commandline_args.txt: there is no such file"),
        ("--args_file absent.txt", r"--args_file absent.txt: there is no such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_a_clean_error(line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(line.split())


def test_help_stands_above_every_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        resolve(["--nonsense", "--help"])
    assert end.value.code == 0
    assert "--teacher_model" in capsys.readouterr().out
