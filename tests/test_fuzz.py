"""Arbitrary files and arguments are either valid or end in a ``UserError``, never in another exception."""

import contextlib
import copy
import io
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from kd.deploy import open_student
from kd.deploy.formats import METADATA_KEY
from kd.errors import UserError
from kd.losses import LOSSES, build_objective
from kd.losses.schedules import SCHEDULES
from kd.models import build_classifier, load_classifier
from kd.models.checkpoint import CLASSIFIER_KEY, STATE_PREFIX
from kd.pixels import decode
from kd.report.measures import Predictions
from kd.settings import resolve, setting_fields, write_config

reproducible = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
# Resolving settings is slower.
fewer = settings(reproducible, max_examples=75)
FIELDS = [one.name for _, one in setting_fields()]


@contextlib.contextmanager
def only_user_errors() -> Iterator[None]:
    """Suppress a user's mistake."""
    with contextlib.suppress(UserError):
        yield


words = st.one_of(
    st.sampled_from([f"--{name}" for name in FIELDS]),
    st.sampled_from([f"--no-{name}" for name in FIELDS]),
    st.sampled_from(["true", "False", "None", "0", "-1", "1e400", "nan", "0.5", "kl=0.9", "ce", "#", "'", '"', "\\"]),
    st.sampled_from(["-h", "--help", "--", "-", "=", "--=", "--batch_size=3", "--distill=maybe", "\x00", "\u2028"]),
    st.integers().map(str),
    st.text(max_size=8),
)
lines = st.lists(st.lists(words, max_size=5).map(" ".join), max_size=6).map("\n".join)


def resolved(*arguments: str) -> None:
    with only_user_errors():
        found = resolve(arguments)
        # Valid settings are written and read again unchanged.
        write_config(found.settings, Path("again.yaml"))
        again = resolve(["--config", "again.yaml", "--args_file", "nothing.txt"])
        assert again.settings.flat() == found.settings.flat()


@fewer
@given(lines | st.text() | st.text().map("{".__add__))
def test_a_file_of_flags(text: str) -> None:
    Path("nothing.txt").touch()
    Path("flags.txt").write_text(text, encoding="utf-8", errors="replace")
    resolved("--args_file", "flags.txt")


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(["1e9", "auto", "kl=1"])
)
odd = st.one_of(plain, st.dates(), st.binary(max_size=4), st.integers(min_value=10**400, max_value=10**401))
values = st.recursive(
    odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3), max_leaves=5
)
mappings = st.dictionaries(st.sampled_from(FIELDS) | st.sampled_from(FIELDS) | plain, values, max_size=3)


@fewer
@given(mappings)
def test_a_mapping_of_settings(mapping: dict[object, object]) -> None:
    Path("nothing.txt").touch()
    Path("c.yaml").write_text(yaml.safe_dump(mapping, allow_unicode=True), encoding="utf-8", errors="replace")
    resolved("--config", "c.yaml", "--args_file", "nothing.txt")


marks = st.sampled_from(
    [
        *(
            "- ",
            ": ",
            "\n",
            "  ",
            "&a ",
            "*a ",
            "!!set ",
            "!!int ",
            "!!binary ",
            "!!timestamp ",
            "!!python/name:os.system ",
        ),
        *("? ", "[", "]", "{", "}", "|\n", "'", '"', "%", "@", "<<: ", "2020-99-99", "9" * 5_000, "---\n", "\t", "~"),
    ]
)


@fewer
@given(st.text() | st.lists(marks | st.sampled_from(FIELDS) | st.text(max_size=3), max_size=12).map("".join))
def test_a_text_for_a_mapping_of_settings(text: str) -> None:
    Path("nothing.txt").touch()
    Path("c.yaml").write_text(text, encoding="utf-8", errors="replace")
    resolved("--config", "c.yaml", "--args_file", "nothing.txt")


@fewer
@given(st.recursive(plain, lambda one: st.lists(one, max_size=2) | st.dictionaries(st.text(), one), max_leaves=3))
def test_the_first_generations_key_of_devices(value: object) -> None:
    Path("nothing.txt").write_text(json.dumps({"gpus": value}))
    with only_user_errors():
        resolve(["--args_file", "nothing.txt"])


@pytest.mark.timeout(20)
def test_a_config_whose_aliases_expand_exponentially_is_refused() -> None:
    levels = "\n".join(f"- &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12))
    for key in ("loss", "seed", "name", "distill", "nothing"):
        Path("c.yaml").write_text(f"{key}:\n- &a0 [x]\n{levels}")
        with pytest.raises(UserError, match=f"key '{key}'"):
            resolve(["--config", "c.yaml"])
    Path("c.yaml").write_text(f"seed: 1{'0' * 400}")
    with pytest.raises(UserError, match="must be at most 9223372036854775807"):
        resolve(["--config", "c.yaml"])


names = st.sampled_from([*LOSSES, "standardize", "my.py:loss", "x", ""])
literals = st.one_of(
    st.sampled_from(
        ["True", "None", "''", "[]", "[1,2]", "(1,)", "{}", "1e400", "nan", "-1", "0", "layer1.0", "x", "("]
    ),
    st.sampled_from(
        [f"{name}({inner})" for name in [*SCHEDULES, "x"] for inner in ("1,2", "0", "'a',1", "1,0", "x", "")]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=4),
)
keys = st.sampled_from(
    ["temperature", "beta", "alpha", "standardize", "layers", "width", "student", "teacher", "x", "*"]
)
hyperparameters = st.lists(st.tuples(keys, literals).map("=".join), max_size=3).map(",".join)
terms = st.tuples(names, hyperparameters, literals).map(lambda one: f"{one[0]}({one[1]})={one[2]}")


@reproducible
@given(st.text() | terms | st.lists(terms | names, max_size=3).map(" ".join) | st.text(string.punctuation + "kl 1"))
def test_an_objective(text: str) -> None:
    with only_user_errors():
        built = build_objective(text)
        for epoch in (0, 1, 9):
            for term in built.terms:
                term.at(epoch, 10)


def checkpoint() -> dict[str, Any]:
    torch.manual_seed(0)
    made = build_classifier("linear", classes=("a", "b"), image_size=4, mean=(0.5,) * 3, std=(0.2,) * 3)
    state = {STATE_PREFIX + name: value for name, value in made.state_dict().items()}
    return {CLASSIFIER_KEY: made.description.plain(), "state_dict": state}


def as_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


SOUND = checkpoint()
WHOLE = as_bytes(SOUND)
changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20)
cuts = st.none() | st.floats(0, 1)


def corrupted(whole: bytes, flips: list[tuple[float, int]], cut: float | None) -> bytes:
    some = bytearray(whole)
    for place, byte in flips:
        some[int(place * len(some))] = byte
    return bytes(some if cut is None else some[: int(cut * len(some))])


@reproducible
@given(changes, cuts)
def test_a_corrupted_checkpoint(flips: list[tuple[float, int]], cut: float | None) -> None:
    Path("x.ckpt").write_bytes(corrupted(WHOLE, flips, cut))
    with only_user_errors():
        load_classifier("x.ckpt")


tensors = st.sampled_from([torch.zeros(0), torch.zeros(2, 48), torch.full((2,), torch.nan), torch.zeros(2).bool()])
things = st.one_of(odd.filter(lambda one: not hasattr(one, "year")), tensors, st.lists(plain, max_size=4))
about = st.dictionaries(
    st.sampled_from([*SOUND[CLASSIFIER_KEY], "x"]),
    things | st.sampled_from(["resnet18(x=1)", "timm/x", "own.py:f", "mlp(widths=[-1])", ["a", "a"], [0.5] * 3, 5]),
    min_size=1,
    max_size=3,
)


@reproducible
@given(about, st.sampled_from([*SOUND["state_dict"], "x"]), things, st.integers(0, 9))
def test_a_checkpoint_of_other_things(other: dict[str, Any], name: str, thing: object, what: int) -> None:
    content = copy.deepcopy(SOUND)
    changed: dict[int, Callable[[], object]] = {
        0: lambda: content["state_dict"].update({name: thing}),
        1: lambda: content["state_dict"].pop(name, None),
        2: lambda: content.update({CLASSIFIER_KEY: thing}),
        3: lambda: content.update(state_dict=thing),
    }
    changed.get(what, lambda: content[CLASSIFIER_KEY].update(other))()
    torch.save(content, "x.ckpt")
    with only_user_errors():
        load_classifier("x.ckpt")


@reproducible
@given(about, changes, cuts, st.booleans())
def test_a_corrupted_safetensors_file(
    other: dict[str, Any], flips: list[tuple[float, int]], cut: float | None, is_corrupted: bool
) -> None:
    described = json.dumps(SOUND[CLASSIFIER_KEY] | other, default=str)
    state = {name.removeprefix(STATE_PREFIX): value for name, value in SOUND["state_dict"].items()}
    whole = save(state, metadata={METADATA_KEY: described})
    Path("x.safetensors").write_bytes(corrupted(whole, flips, cut) if is_corrupted else whole)
    with only_user_errors():
        open_student("x.safetensors").logits(np.zeros((1, 3, 4, 4), dtype=np.float32))


def pictures() -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8))
    made = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF"):
        buffer = io.BytesIO()
        image.save(buffer, format=kind)
        made.append(buffer.getvalue())
    return made


@reproducible
@given(st.sampled_from(pictures()), changes, cuts)
@pytest.mark.filterwarnings("ignore")
def test_a_corrupted_image(picture: bytes, flips: list[tuple[float, int]], cut: float | None) -> None:
    Path("x.png").write_bytes(corrupted(picture, flips, cut))
    with only_user_errors():
        assert decode(Path("x.png")).mode == "RGB"


def predictions() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        logits=np.zeros((3, 2)),
        labels=np.zeros(3, dtype=int),
        keys=np.array(["a", "b", "c"]),
        classes=np.array(["x", "y"]),
    )
    return buffer.getvalue()


@reproducible
@given(changes, cuts)
def test_corrupted_predictions_are_none(flips: list[tuple[float, int]], cut: float | None) -> None:
    Path("x.npz").write_bytes(corrupted(predictions(), flips, cut))
    found = Predictions.read("x.npz")
    assert found is None or len(found.logits) == len(found.labels) == len(found.keys)
