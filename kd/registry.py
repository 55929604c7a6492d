"""Components chosen by name: a registry, the syntax of a choice, and loading of user code."""

import ast
import difflib
import functools
import hashlib
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kd.errors import UserError

T = TypeVar("T")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the most similar known name, or an empty string if there is none."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or [other for other in known if name and other.startswith(name)]
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(dict[str, T]):
    """The components of one kind, such as ``"loss"``, by name; an unknown name is a ``UserError`` with the choices."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object as ``name``; a ``ValueError`` if the name is taken."""

        def add(entry: T) -> T:
            if name in self:
                raise ValueError(f"two {self.kind}s are called {name!r}")
            self[name] = entry
            return entry

        return add

    def __missing__(self, name: str) -> T:
        choices = ", ".join(self)
        raise UserError(f"there is no {self.kind} {name!r}{suggestion(name, self)} (there are: {choices})")


def parse_choice(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``name`` or ``name(key=value, ...)``, with Python literals or bare words for strings as values.

    Example:
        >>> parse_choice("convnet(widths=[8, 16])")
        ('convnet', {'widths': [8, 16]})
    """
    match = re.fullmatch(r"\s*([^()\s]+)\s*(?:\((.*)\))?\s*", text, flags=re.DOTALL)
    if match is None:
        raise UserError(f"{text!r} is not of the form name or name(key=value, ...)")
    name, arguments = match.groups(default="")
    # A dotted word, such as the name of a layer, is a string.
    arguments = re.sub(r"(?<=[=,\[])(\s*)(\w+(?:\.\w+)+)(?=\s*[,\])]|\s*$)", _quoted, arguments)
    try:
        call = ast.parse(f"_({arguments})", mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            values = {keyword.arg or "**": _literal(keyword.value) for keyword in call.keywords}
            if "**" not in values:
                return name, values
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise UserError(f"{text!r}: the parentheses must hold key=value pairs, such as {name}(size=8)")


def _quoted(match: re.Match[str]) -> str:
    """Quote a dotted word unless it is a number."""
    try:
        float(match[2])
    except ValueError:
        return f"{match[1]}'{match[2]}'"
    return match[0]


class Call(NamedTuple):
    """A value written as ``name(value, ...)``, such as the schedule ``linear(8, 2)``."""

    name: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})"


def parse_value(text: str) -> Any:  # noqa: ANN401 (any literal)
    """Parse a Python literal, a bare word for a string, or ``name(value, ...)`` as a `Call`; else a ``ValueError``.

    Example:
        >>> parse_value("0.9"), parse_value("warmup(0.9, 20)")
        (0.9, Call(name='warmup', arguments=(0.9, 20)))
    """
    try:
        return _literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not a valid value") from None


def _literal(node: ast.expr) -> Any:  # noqa: ANN401 (any literal)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return Call(node.func.id, tuple(ast.literal_eval(argument) for argument in node.args))
    if isinstance(node, ast.List | ast.Tuple):
        elements = [_literal(element) for element in node.elts]
        return elements if isinstance(node, ast.List) else tuple(elements)
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def check_hyperparameters(function: Callable[..., object], given: Mapping[str, Any], *, choice: str) -> None:
    """Raise a ``UserError``, which names the ``choice``, if a function doesn't accept the hyperparameters given."""
    known = inspect.signature(function).parameters
    for name in given:
        if not accepts(function, name):
            hint, names = suggestion(name, known), ", ".join(known) or "none"
            raise UserError(f"{choice!r}: there is no hyperparameter {name!r}{hint} (it takes: {names})")


def accepts(function: Callable[..., object], name: str) -> bool:
    """Return whether a function takes an argument of that name."""
    known = inspect.signature(function).parameters
    return name in known or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())


def is_own_code(name: str) -> bool:
    """Return whether a name refers to the user's own code, such as ``path/to/file.py:function``."""
    return bool(re.search(r"\.py:[^/:]+$", name))


def runs_own_code(choice: str) -> bool:
    """Return whether a choice names the user's own code, itself or in one of its hyperparameters."""
    return ".py:" in choice


def call_own_code(name: str, function: Callable[..., T], *arguments: object, **keywords: object) -> T:
    """Call the user's function; an exception becomes a ``UserError`` that gives the line of the user's file."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [(line, frame.f_code.co_filename) for frame, line in frames if frame.f_globals.get("_is_own_code")]
        if isinstance(error, SyntaxError):
            lines.append((error.lineno or 0, error.filename or name))
        place = " at line {} of {}".format(*lines[-1]) if lines else ""
        raise UserError(f"{name!r}: it raised {type(error).__name__}{place}: {error}") from error


def load_own_code(name: str) -> Callable[..., Any]:
    """Return the function of ``path/to/file.py:function``; the file is executed once per process."""
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{name!r}: there is no file {file}")
    contents = vars(call_own_code(name, _execute, file))
    function = contents.get(attribute)
    if not callable(function):
        defined = [key for key, value in contents.items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{file} has no function {attribute!r}{suggestion(attribute, defined)}")
    return function  # type: ignore[no-any-return]  # checked by callable


@functools.cache
def _execute(file: Path) -> types.ModuleType:
    # Classes look up their module by name.
    name = f"own_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(__file__=str(file), _is_own_code=True)
    # As for a script, its folder can be imported from; appended, so that no other module is hidden.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    exec(compile(file.read_bytes(), str(file), "exec"), vars(module))  # noqa: S102 (the user named the file)
    return module
