from pathlib import Path

import pytest

from kd.errors import UserError
from kd.registry import Call, Registry, call_own_code, check_hyperparameters, load_own_code, parse_choice


def test_a_duplicate_name_raises() -> None:
    shapes: Registry[int] = Registry("shape")
    shapes.register("square")(4)
    with pytest.raises(ValueError, match="two shapes are called 'square'"):
        shapes.register("square")(5)


def test_an_unknown_name_lists_the_choices_and_suggests_the_nearest() -> None:
    shapes: Registry[int] = Registry("shape")
    shapes.register("square")(4)
    shapes.register("triangle")(3)
    with pytest.raises(UserError, match=r"there is no shape 'squar'; did you mean 'square'\? \(there are: square, tri"):
        shapes["squar"]
    assert "squar" not in shapes
    assert (list(shapes), len(shapes)) == (["square", "triangle"], 2)


def test_a_choice_is_a_name_and_hyperparameters() -> None:
    assert parse_choice("kl") == ("kl", {})
    assert parse_choice("kl()") == ("kl", {})
    assert parse_choice("dkd(alpha=1, beta=8.0)") == ("dkd", {"alpha": 1, "beta": 8.0})
    assert parse_choice("f(mode=crop, widths=(1, 2), neg=-1)") == ("f", {"mode": "crop", "widths": (1, 2), "neg": -1})


def test_a_value_may_be_written_as_a_call_which_is_not_executed() -> None:
    assert parse_choice("kl(x=open('f'))") == ("kl", {"x": Call("open", ("f",))})
    assert str(parse_choice("kl(temperature=linear(8, 2))")[1]["temperature"]) == "linear(8, 2)"


@pytest.mark.parametrize(
    "text", ["", "a b", "kl(3)", "kl(x=)", "kl(x=1", "kl(x=open(f='g'))", "kl(x=a.b(1))", "kl(**x)", "kl(x=1)(y=2)"]
)
def test_an_invalid_choice_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"form|key=value"):
        parse_choice(text)


def test_an_unknown_hyperparameter_suggests_the_nearest() -> None:
    def area(width: int, height: int) -> int:
        return width * height

    check_hyperparameters(area, {"width": 3}, choice="area(width=3)")
    with pytest.raises(
        UserError, match=r"no hyperparameter 'widht'; did you mean 'width'\? \(it takes: width, height\)"
    ):
        check_hyperparameters(area, {"widht": 3}, choice="area(widht=3)")


def test_a_function_with_variable_keywords_accepts_any_hyperparameter() -> None:
    check_hyperparameters(lambda **anything: anything, {"x": 1}, choice="f(x=1)")


def test_a_user_file_is_executed_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("calls = []\ndef double(x):\n    return 2 * x\n")
    double = load_own_code(f"{file}:double")
    assert double(4) == 8
    assert load_own_code(f"{file}:double") is double


def test_a_missing_user_file_or_function_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_own_code(f"{tmp_path}/absent.py:double")
    file = tmp_path / "mine.py"
    file.write_text("def double(x):\n    return 2 * x\n")
    with pytest.raises(UserError, match=r"has no function 'dubble'; did you mean 'double'\?"):
        load_own_code(f"{file}:dubble")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n1 / 0\n", r"it raised ZeroDivisionError at line 2 of .*broken.py: division by zero"),
        ("def f(:\n", r"it raised SyntaxError at line 1 of .*broken.py"),
        ("import absent_module\n", r"it raised ModuleNotFoundError at line 1 of .*: No module named 'absent_module'"),
    ],
)
def test_an_exception_in_a_user_file_is_located_each_time_it_is_loaded(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            load_own_code(f"{file}:anything")


def test_an_exception_in_a_user_function_is_located(tmp_path: Path) -> None:
    file = tmp_path / "fails.py"
    file.write_text("def f(x):\n    return x / 0\n")
    with pytest.raises(
        UserError, match=r"'mine': it raised ZeroDivisionError at line 2 of .*fails.py: division by zero"
    ):
        call_own_code("mine", load_own_code(f"{file}:f"), x=1)
    with pytest.raises(UserError, match=r"'mine': it raised TypeError: f\(\) got an unexpected keyword argument 'y'"):
        call_own_code("mine", load_own_code(f"{file}:f"), y=1)
