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


def test_of_a_flag_given_twice_on_the_command_line_the_last_one_counts() -> None:
    settings, remarks, _ = resolve(["--seed", "1", "--loss", "mse", "--seed", "2", "--loss", "kl=1"])
    assert (settings.phases.seed, settings.objective.loss) == (2, ("kl=1",))
    assert remarks == [
        "note: --seed is given twice: the last one counts",
        "note: --loss is given twice: the last one counts",
    ]


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (r"--data_dir C:\data\cats", r"C:\data\cats"),
        (r"--data_dir 'C:\my cats'  # a comment", r"C:\my cats"),
        ("--data_dir /data/cats#2 # a comment", "/data/cats#2"),
        ("--data_dir '/data/#1 cats'", "/data/#1 cats"),
        ("#--data_dir /data/dogs\n--data_dir /data/cats", "/data/cats"),
    ],
)
def test_backslashes_and_number_signs_in_values_are_kept(line: str, path: str) -> None:
    Path("commandline_args.txt").write_text(line)
    assert resolved()["data_dir"] == path


@pytest.mark.parametrize(
    ("flag", "setting"),
    [
        ("lr", "learning_rate"),
        ("epochs", "max_epochs"),
        ("imgsz", "image_size"),
        ("workers", "num_workers"),
        ("wd", "weight_decay"),
        ("amp", "precision"),
        ("arch", "student_model"),
        ("pretrained", "student_pretrained"),
    ],
)
def test_what_other_tools_call_a_setting_is_answered_with_its_name(flag: str, setting: str) -> None:
    with pytest.raises(UserError, match=f"^--{flag}: unknown flag; here it is --{setting}$"):
        resolve([f"--{flag}", "1"])
    Path("c.yaml").write_text(f"{flag}: 1")
    with pytest.raises(UserError, match=f"^'{flag}': unknown setting; here it is {setting}\n"):
        resolve(["--config", "c.yaml"])


@pytest.mark.parametrize("flag", ["--quux", "--zoom", "--verbose"])
def test_a_flag_that_is_near_to_none_gets_no_suggestion(flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag}: unknown flag; --help lists all flags$"):
        resolve([flag, "1"])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("image_cache: off", "image_cache", "off"),
        ("name: no", "name", "no"),
        ("name: 3.10", "name", "3.10"),
        ("name: 0123", "name", "0123"),
        ("name: 2026-11-27", "name", "2026-11-27"),
        ("channels_last: false", "channels_last", "false"),
        ("max_steps: 0123", "max_steps", 123),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("distill: true", "distill", True),
        ("name: null", "name", None),
        ("loss: {ce: 0.50, kl: 1}", "loss", ["ce=0.5", "kl=1"]),
    ],
)
def test_plain_words_in_a_yaml_file_are_text_where_text_is_expected(line: str, name: str, value: object) -> None:
    Path("c.yaml").write_text(line)
    assert resolved("--config", "c.yaml")[name] == value


def test_a_key_given_twice_in_a_yaml_file_is_an_error() -> None:
    Path("c.yaml").write_text("seed: 1\nmax_epochs: 2\nseed: 3\n")
    with pytest.raises(UserError, match=r"^c.yaml: key 'seed': given twice, in lines 1 and 3; keep one of them$"):
        resolve(["--config", "c.yaml"])


def test_a_resumed_folder_gives_its_settings_and_the_command_line_wins(tmp_path: Path) -> None:
    write_config(
        resolve(["--max_epochs", "7", "--seeds", "2", "--name", "old"]).settings, tmp_path / "x" / "config.yaml"
    )
    (tmp_path / "x" / "teacher").mkdir()
    flat = resolved("--resume", str(tmp_path / "x" / "teacher"), "--seeds", "3")
    assert (flat["max_epochs"], flat["seeds"]) == (7, 3)
    assert (flat["default_root_dir"], flat["name"]) == (str(tmp_path), "x")


@pytest.mark.parametrize(
    ("words", "value"),
    [("--resume", "auto"), ("--resume true", "auto"), ("--no-resume", None), ("--resume=false", None)],
)
def test_resume_without_a_value_is_auto(words: str, value: str | None) -> None:
    assert resolved(*words.split(), "--seeds", "2")["resume"] == value
    Path("c.yaml").write_text(f"resume: {str(value is not None).lower()}")
    assert resolved("--config", "c.yaml")["resume"] == value


def test_args_file_names_another_file() -> None:
    Path("commandline_args.txt").write_text("--seed 1\n")
    Path("mine.txt").write_text("--seed 2\n")
    assert resolved("--args_file", "mine.txt")["seed"] == 2


def test_the_file_of_flags_is_never_written() -> None:
    file = Path("commandline_args.txt")
    file.write_text("--seed 1\n")
    resolved("--seed", "5")
    assert file.read_text() == "--seed 1\n"


def test_flags_may_continue_over_lines_and_be_quoted() -> None:
    Path("commandline_args.txt").write_text(
        "--loss ce=0.1\n    'kl(temperature=2)=0.9'\n\n# nothing\n--name 'my run'\n"
    )
    flat = resolved()
    assert (flat["loss"], flat["name"]) == (["ce=0.1", "kl(temperature=2)=0.9"], "my run")


def test_a_byte_order_mark_is_ignored() -> None:
    Path("commandline_args.txt").write_text("--seed 3\n", encoding="utf-8-sig")
    assert resolved()["seed"] == 3


def test_yaml_accepts_terms_as_mapping_list_or_text() -> None:
    for number, text in enumerate(("{ce: 0.1, kl: 0.9}", "[ce=0.1, kl=0.9]", "ce=0.1 kl=0.9")):
        Path(f"{number}.yaml").write_text(f"loss: {text}\n")
        assert " ".join(resolved("--config", f"{number}.yaml")["loss"]) == "ce=0.1 kl=0.9"


def test_counts_and_fractions_of_batches_are_distinguished() -> None:
    flat = resolved("--limit_train_batches", "2", "--limit_val_batches", "0.5")
    assert (flat["limit_train_batches"], flat["limit_val_batches"]) == (2, 0.5)
    assert isinstance(resolved("--limit_train_batches", "1.0")["limit_train_batches"], float)


def test_a_list_setting_accepts_one_value_and_null() -> None:
    Path("several.yaml").write_text(
        "teacher_model: resnet50\nteacher_checkpoint: null\nassistants: [resnet34, resnet18]\nensemble_weights: []\n"
    )
    models = resolve(["--config", "several.yaml"]).settings.models
    assert models.teacher_model == ("resnet50",)
    assert (models.teacher_checkpoint, models.ensemble_weights) == ((), ())
    assert models.assistants == ("resnet34", "resnet18")
    several = resolve(["--teacher_model", "resnet50", "densenet121", "--ensemble_weights", "2", "1.5"]).settings.models
    assert (several.teacher_model, several.ensemble_weights) == (("resnet50", "densenet121"), (2.0, 1.5))


def test_a_former_name_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("teacher_weights: [2, 1]\n")
    assert resolve(["--config", str(tmp_path / "old.yaml")]).settings.models.ensemble_weights == (2.0, 1.0)
    assert resolve(["--teacher_weights", "2", "1"]).settings.models.ensemble_weights == (2.0, 1.0)


def test_an_empty_yaml_changes_nothing() -> None:
    Path("empty.yaml").write_text("# nothing here\n")
    assert resolved("--config", "empty.yaml") == Settings().flat()


def test_written_settings_are_a_legal_config(tmp_path: Path) -> None:
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
    assert flat["teacher_pretrained"] == "published"
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
    ("file", "text", "words", "place"),
    [
        ("args", "--seed 0\n--bach_size 3\n", "--bach_size: unknown flag; did you mean '--batch_size'?", "line 2"),
        ("args", "--seed 0\n\n--batch_size two\n", "--batch_size two: must be a whole number or auto", "line 3"),
        ("args", "--batch_size 0", "--batch_size 0: must be at least 1", "line 1"),
        (
            "args",
            "--seed 1\n--seeds 2\n--seed 3",
            "--seed: given twice, also in commandline_args.txt, line 1",
            "line 3",
        ),
        ("args", "--config x.yaml", "--config: can only be given on the command line", "line 1"),
        ("args", '{"num_clases": 3}', "'num_clases': unknown setting; did you mean 'num_classes'?", "key 'num_clases'"),
        ("yaml", "bach_size: 3", "'bach_size': unknown setting; did you mean 'batch_size'?", "key 'bach_size'"),
        ("yaml", "batch_size: two", "--batch_size two: must be a whole number or auto", "key 'batch_size'"),
        ("yaml", "seed: 1\nbatch_size: [1, 2]", "--batch_size [1, 2]: must be a whole number or auto", "'batch_size'"),
        ("yaml", "seed: 1\naugment: [crop]", "--augment ['crop']: must be text", "key 'augment'"),
        ("yaml", "seed: true", "--seed True: must be a whole number", "key 'seed'"),
        ("yaml", "distill: maybe", "--distill maybe: must be true or false", "key 'distill'"),
        ("yaml", "loss: {ce: [1]}", "--loss [1]: must be text", "key 'loss'"),
        ("yaml", "config: [x]", "--config: can only be given on the command line", "key 'config'"),
        ("yaml", "3: 4", "3: unknown setting", "key 3"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_place(file: str, text: str, words: str, place: str) -> None:
    path = {"args": "commandline_args.txt", "yaml": "c.yaml"}[file]
    Path(path).write_text(text)
    with pytest.raises(UserError) as caught:
        resolve(["--config", "c.yaml"] if file == "yaml" else [])
    message, _, origin = str(caught.value).partition("\n")
    assert message.startswith(words)
    assert path in origin
    assert origin.endswith(f"{place})")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("commandline_args.txt", "--name 'open", "commandline_args.txt, line 1: No closing quotation"),
        ("commandline_args.txt", '{"gpus": 1', "commandline_args.txt: not valid JSON, though it begins like an object"),
        ("c.yaml", "- a\n- b", "c.yaml: must hold 'name: value' lines, not a list"),
        ("c.yaml", "a: [", "c.yaml: not valid YAML"),
        ("c.yaml", "a: !!python/object/apply:os.system [ls]", "c.yaml: not valid YAML"),
    ],
)
def test_a_malformed_file_is_a_clean_error(file: str, text: str, words: str) -> None:
    Path(file).write_text(text)
    with pytest.raises(UserError, match=f"^{words}"):
        resolve(["--config", "c.yaml"] if file == "c.yaml" else [])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--bach_size 3", "--bach_size: unknown flag; did you mean '--batch_size'?"),
        ("--batch-size 3", "--batch-size: unknown flag; did you mean '--batch_size'?"),
        ("-b 3", "-b: unknown flag"),
        ("--batch_size two", "--batch_size two: must be a whole number or auto"),
        ("--seed 1.5", "--seed 1.5: must be a whole number"),
        ("--max_steps few", "--max_steps few: must be a whole number"),
        ("--limit_val_batches few", "--limit_val_batches few: must be a number"),
        ("--learning_rate fast", "--learning_rate fast: must be a number"),
        ("--batch_size", "--batch_size: needs a value"),
        ("--seed 1 2", "--seed 1 2: takes one value, not 2"),
        ("--temperature 0", "--temperature 0: must be above 0"),
        ("--temperature -1", "--temperature -1: must be above 0"),
        ("--sampler foo", "--sampler foo: must be shuffle or balanced"),
        ("--distill maybe", "--distill maybe: must be true or false"),
        ("--distill=maybe", "--distill maybe: must be true or false"),
        ("--no-distill true", "--no-distill: takes no value; write --distill true or --distill false"),
        ("--no-seeds", "--no-seeds: unknown flag"),
        ("stray", "stray: expected a flag such as --distill here"),
        ("--config absent.yaml", "absent.yaml: no such file"),
        ("--config .", ".: can't be read"),
        ("--args_file commandline_args.txt", "--args_file commandline_args.txt: no such file"),
        ("--resume nowhere", "--resume nowhere: no such folder"),
        ("--resume .", "--resume .: not an experiment's folder, as it has no config.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_a_clean_error(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(line.split())
    assert str(caught.value).startswith(words)


def test_help_takes_precedence_over_every_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        resolve(["--nonsense", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--teacher_model" in out
    assert "\nObjective:\n" in out
