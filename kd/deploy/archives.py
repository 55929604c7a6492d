"""What torch.export wrote, looked through before it is loaded: torch's own loader runs code that a stranger put there.

It unpickles objects, loads compiled libraries, evaluates the expressions of shapes, runs guards, and calls whatever
function of torch a node names. So what is loaded is written anew from what was looked at: weights, and a graph of plain
operations on tensors.
"""

import ast
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kd.errors import UserError

_MODEL = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PLAIN = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/\w+\.json|archive_format|archive_version")
# Written by torch's writer itself.
_OWN = re.compile(r"\.data/\w+|byteorder")

_WORD = re.compile(r"[\w.]*", flags=re.ASCII)
_OPERATION = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)|_operator\.(add|and_|eq|floordiv|ge|"
    r"getitem|gt|le|lt|mod|mul|ne|neg|not_|or_|pow|sub|truediv)"
)
_OF_FILES = re.compile(r"torch\.ops\.aten\.(from_file|load|save|set_)\b")
_SYMBOL = re.compile(r"[a-z]+\d+")
_OF_SYMBOLS = frozenset(
    (
        *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "Identity"),
        *(
            "FloorDiv",
            "CleanDiv",
            "CeilDiv",
            "ModularIndexing",
            "IntTrueDiv",
            "FloatTrueDiv",
            "CeilToInt",
            "FloorToInt",
        ),
        *(
            "TruncToInt",
            "RoundToInt",
            "ToFloat",
            "PowByNatural",
            "And",
            "Or",
            "Not",
            "Eq",
            "Ne",
            "Lt",
            "Le",
            "Gt",
            "Ge",
        ),
        *("Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan"),
    )
)
_ARITHMETIC = (
    *(ast.Expression, ast.Call, ast.keyword, ast.expr_context),
    *(ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop),
)
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict")


class _NotPlainError(Exception):
    """Something in an archive might run."""


def without_code(path: Path) -> io.BytesIO:
    """Return what a file of torch.export holds, weights and plain operations, as an archive that nothing runs from.

    Args:
        path: The file.

    Raises:
        UserError: If it is no such file, or holds anything else.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(path))  # noqa: SLF001 (as torch.export's own loader)
        names = [name for name in reader.get_all_records() if not _OWN.fullmatch(name)]
        records = {name: reader.get_record(name) for name in names}
    except RuntimeError:
        raise UserError(f"{path}: torch.export can't read it: it is no file of torch.export, or damaged") from None
    try:
        checked = {name: _checked(name, content) for name, content in records.items()}
    except _NotPlainError as error:
        raise UserError(f"{path}: this file is not read, as it may run code: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: torch.export can't read it: {type(error).__name__} in its description") from None
    anew = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(anew)  # noqa: SLF001
    for name, content in checked.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    anew.seek(0)
    return anew


def _checked(name: str, content: bytes) -> bytes:
    """Return a part of the archive as it may be loaded."""
    if _PLAIN.fullmatch(name):
        return content
    if name in _CONFIGS:
        return _checked_config(content)
    if name == _MODEL:
        return _checked_model(content)
    if name == _INPUTS:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # noqa: BLE001 (a stranger's bytes make the unpickler raise anything)
            raise _NotPlainError(f"{name} holds more than tensors") from None
        return content
    raise _NotPlainError(f"it holds {name!r}")


def _checked_config(content: bytes) -> bytes:
    config = json.loads(content)
    for one in config["config"].values():
        place = str(one["path_name"])
        if one["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", place):
            raise _NotPlainError(f"{place!r} is a pickle")
    return json.dumps(config).encode()


def _checked_model(content: bytes) -> bytes:
    model = json.loads(content)
    # These are run; they tell of wrong inputs more plainly, and nothing else.
    model["guards_code"] = []
    _walk(model)
    return json.dumps(model).encode()


def _walk(value: Any, key: str = "") -> None:  # noqa: ANN401 (whatever JSON holds)
    """Look at every text in the description of a graph: by its key, or as a word."""
    if isinstance(value, dict):
        if key == "metadata":
            # Where an operation comes from: for people.
            value.clear()
        for name, one in value.items():
            _check_word(name)
            _walk(one, name)
    elif isinstance(value, list):
        for one in value:
            _walk(one, key)
    elif isinstance(value, str):
        _CHECKS.get(key, _check_word)(value)


def _check_word(text: str) -> None:
    if not _WORD.fullmatch(text):
        raise _NotPlainError(f"{text[:80]!r} is no word")


def _check_operation(text: str) -> None:
    if not _OPERATION.fullmatch(text) or _OF_FILES.match(text):
        raise _NotPlainError(f"{text[:80]!r} is no operation on tensors")


def _check_expression(text: str) -> None:
    """Accept sums, products and the like of symbols and numbers, as they are written for sympy."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError):
        raise _NotPlainError(f"{text[:80]!r} is no size") from None
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        is_plain = isinstance(node, _ARITHMETIC)
        if isinstance(node, ast.Name):
            is_plain = node.id in _OF_SYMBOLS if id(node) in called else bool(_SYMBOL.fullmatch(node.id))
        elif isinstance(node, ast.Constant):
            is_plain = bool(_SYMBOL.fullmatch(node.value)) if isinstance(node.value, str) else True
        if not is_plain:
            raise _NotPlainError(f"{text[:80]!r} is no size")


def _check_tree(text: str) -> None:
    """Accept the description of nested tuples, lists and dictionaries."""
    left = list(json.loads(text)[1:])
    while left:
        one = left.pop()
        if one["type"] not in _TREES:
            raise _NotPlainError(f"{str(one['type'])[:80]!r} is no tuple, list or dictionary")
        left += one["children_spec"]


def _anything(_: str) -> None:
    """Accept what is never run."""


_CHECKS: dict[str, Callable[[str], None]] = {
    "target": _check_operation,
    "expr_str": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "torch_version": _anything,
}
