"""Text is in the field's standard terms and in American spelling."""

import re
from pathlib import Path

import pytest

SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".html", ".js", ".css"}
FOLDERS = ("kd", "tests", "docs", "benchmarks", "configs", ".github")

# Literary, literal or riddling phrases that once stood in the place of standard terms.
STILTED = (
    r"hangs? (?:up)?on\b",
    r"\bis right on\b",
    r"\bright on [\d.]+ ?%",
    r"\bcomes? again\b",
    r"\b(?:was|were) cut off\b",
    r"\bgo(?:es)? on with\b",
    r"\bmemory enough\b",
    r"\btaken for what\b",
    r"\bas right as\b",
    r"\bwhat it c[ao]mes? to\b",
    r"\bdoes not know here\b",
    r"\bhow surprising\b",
    r"\bhad to be saved\b",
    r"\bwhat it is worth\b",
    r"\bto the last bit\b",
    r"\bstands? in the way\b",
    r"\bpassed over\b",
    r'"""Say ',
    r"\b(?:made|said) anew\b",
    r"\bthe one and the other\b",
    r"\bof one's own\b",
    r"\bit is told\b",
)
BRITISH = (
    r"\b(?:un)?labelled\b",
    r"\b(?:un)?labelling\b",
    r"\b\w+(?:al|im|ar|or|er|in)is(?:e|es|ed|ing|ation)\b",
    r"\bcolours?\b",
    r"\bbehaviours?\b",
    r"\bcentres?\b",
    r"\bneighbours?\b",
    r"\bgrey\b",
    r"\bfavour\w*\b",
)


def files(repository: Path) -> list[Path]:
    found = [path for folder in FOLDERS for path in (repository / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [path for path in repository.iterdir() if path.suffix in SUFFIXES]
    return [path for path in found if path.name not in ("test_english.py", "requirements.lock")]


@pytest.mark.parametrize("pattern", STILTED)
def test_no_stilted_phrase_returns(repository: Path, pattern: str) -> None:
    found = [
        f"{path.relative_to(repository)}:{number}: {line.strip()}"
        for path in files(repository)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line, re.IGNORECASE if "Say" not in pattern else 0)
    ]
    assert found == []


def test_spelling_is_american(repository: Path) -> None:
    found = {
        f"{path.relative_to(repository)}: {match.group()}"
        for path in files(repository)
        for pattern in BRITISH
        for match in re.finditer(pattern, path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert found == set()
