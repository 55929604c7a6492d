import io

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from kd.console import make_console


def test_markup_is_not_interpreted_and_lines_are_not_wrapped_in_a_file() -> None:
    file = io.StringIO()
    make_console(file=file).print(f"pets[bold] net.py:Loop: 12 {'word ' * 40}end")
    assert file.getvalue() == f"pets[bold] net.py:Loop: 12 {'word ' * 40}end\n"


def test_a_terminal_wraps_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    file = io.StringIO()
    make_console(file=file).print("--distill: the teacher is no better than chance; add --allow_weak_teacher")
    assert all(len(line) <= 40 for line in file.getvalue().splitlines())
    assert "--allow_weak_teacher" in file.getvalue()


@pytest.mark.parametrize(("rank", "text"), [(0, "hello\n"), (1, "")])
@pytest.mark.parametrize("is_set", [True, False])
def test_only_the_first_process_prints(rank: int, text: str, is_set: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank if is_set else None, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    file = io.StringIO()
    make_console(file=file).print("hello")
    assert file.getvalue() == text
