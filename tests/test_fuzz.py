"""Arbitrary files and arguments are either valid or raise a ``UserError``, never another exception."""

import contextlib
import copy
import io
import json
import string
from collections.abc import Callable
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
from kd.deploy.loading import METADATA_KEY
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
# For resolving settings, which is slower.
fewer_examples = settings(reproducible, max_examples=75)
FIELDS = [field.name for _, field in setting_fields()]


words = st.one_of(
    st.sampled_from([f"--{name}" for name in FIELDS]),
    st.sampled_from([f"--no-{name}" for name in FIELDS]),
    st.sampled_from(["true", "False", "None", "0", "-1", "1e400", "nan", "0.5", "kl=0.9", "ce", "#", "'", '"', "\\"]),
    st.sampled_from(["-h", "--help", "--", "-", "=", "--=", "--batch_size=3", "--distill=maybe", "\x00", "\u2028"]),
    st.integers().map(str),
    st.text(max_size=8),
)
lines = st.lists(st.lists(words, max_size=5).map(" ".join), max_size=6).map("\n".join)


def check_settings(*arguments: str) -> None:
    with contextlib.suppress(UserError):
        first = resolve(arguments)
        # Valid settings survive a round trip.
        write_config(first.settings, Path("written.yaml"))
        second = resolve(["--config", "written.yaml", "--args_file", "empty.txt"])
        assert second.settings.flat() == first.settings.flat()


@fewer_examples
@given(lines | st.text() | st.text().map("{".__add__))
def test_an_arbitrary_flags_file(text: str) -> None:
    Path("empty.txt").touch()
    Path("flags.txt").write_text(text, encoding="utf-8", errors="replace")
    check_settings("--args_file", "flags.txt")


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(["1e9", "auto", "kl=1"])
)
unusual = st.one_of(plain, st.dates(), st.binary(max_size=4), st.integers(min_value=10**400, max_value=10**401))
values = st.recursive(
    unusual, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3), max_leaves=5
)
mappings = st.dictionaries(st.sampled_from(FIELDS) | st.sampled_from(FIELDS) | plain, values, max_size=3)


@fewer_examples
@given(mappings)
def test_an_arbitrary_mapping_of_settings(mapping: dict[object, object]) -> None:
    Path("empty.txt").touch()
    Path("c.yaml").write_text(yaml.safe_dump(mapping, allow_unicode=True), encoding="utf-8", errors="replace")
    check_settings("--config", "c.yaml", "--args_file", "empty.txt")


yaml_fragments = st.sampled_from(
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


@fewer_examples
@given(st.text() | st.lists(yaml_fragments | st.sampled_from(FIELDS) | st.text(max_size=3), max_size=12).map("".join))
def test_an_arbitrary_settings_file(text: str) -> None:
    Path("empty.txt").touch()
    Path("c.yaml").write_text(text, encoding="utf-8", errors="replace")
    check_settings("--config", "c.yaml", "--args_file", "empty.txt")


@fewer_examples
@given(st.recursive(plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner), max_leaves=3))
def test_an_arbitrary_value_of_the_legacy_gpus_key(value: object) -> None:
    Path("legacy.txt").write_text(json.dumps({"gpus": value}))
    with contextlib.suppress(UserError):
        resolve(["--args_file", "legacy.txt"])


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
terms = st.tuples(names, hyperparameters, literals).map(lambda parts: "{}({})={}".format(*parts))


@reproducible
@given(st.text() | terms | st.lists(terms | names, max_size=3).map(" ".join) | st.text(string.punctuation + "kl 1"))
def test_an_arbitrary_objective(text: str) -> None:
    with contextlib.suppress(UserError):
        objective = build_objective(text)
        for epoch in (0, 1, 9):
            for term in objective.terms:
                term.at(epoch, 10)


def checkpoint() -> dict[str, Any]:
    torch.manual_seed(0)
    classifier = build_classifier("linear", classes=("a", "b"), image_size=4, mean=(0.5,) * 3, std=(0.2,) * 3)
    state = {STATE_PREFIX + name: value for name, value in classifier.state_dict().items()}
    return {CLASSIFIER_KEY: classifier.description.plain(), "state_dict": state}


def as_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


VALID = checkpoint()
VALID_BYTES = as_bytes(VALID)
byte_changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20)
cuts = st.none() | st.floats(0, 1)


def corrupted(data: bytes, changes: list[tuple[float, int]], cut: float | None) -> bytes:
    """Replace the bytes at relative positions, and truncate the file."""
    result = bytearray(data)
    for position, byte in changes:
        result[int(position * len(result))] = byte
    return bytes(result if cut is None else result[: int(cut * len(result))])


@reproducible
@given(byte_changes, cuts)
def test_a_corrupted_checkpoint(changes: list[tuple[float, int]], cut: float | None) -> None:
    Path("x.ckpt").write_bytes(corrupted(VALID_BYTES, changes, cut))
    with contextlib.suppress(UserError):
        load_classifier("x.ckpt")


tensors = st.sampled_from([torch.zeros(0), torch.zeros(2, 48), torch.full((2,), torch.nan), torch.zeros(2).bool()])
values_or_tensors = st.one_of(
    unusual.filter(lambda value: not hasattr(value, "year")), tensors, st.lists(plain, max_size=4)
)
descriptions = st.dictionaries(
    st.sampled_from([*VALID[CLASSIFIER_KEY], "x"]),
    values_or_tensors
    | st.sampled_from(["resnet18(x=1)", "timm/x", "own.py:f", "mlp(widths=[-1])", ["a", "a"], [0.5] * 3, 5]),
    min_size=1,
    max_size=3,
)


@reproducible
@given(descriptions, st.sampled_from([*VALID["state_dict"], "x"]), values_or_tensors, st.integers(0, 9))
def test_a_checkpoint_with_arbitrary_content(description: dict[str, Any], name: str, value: object, case: int) -> None:
    content = copy.deepcopy(VALID)
    modifications: dict[int, Callable[[], object]] = {
        0: lambda: content["state_dict"].update({name: value}),
        1: lambda: content["state_dict"].pop(name, None),
        2: lambda: content.update({CLASSIFIER_KEY: value}),
        3: lambda: content.update(state_dict=value),
    }
    modifications.get(case, lambda: content[CLASSIFIER_KEY].update(description))()
    torch.save(content, "x.ckpt")
    with contextlib.suppress(UserError):
        load_classifier("x.ckpt")


@reproducible
@given(descriptions, byte_changes, cuts, st.booleans())
def test_a_corrupted_safetensors_file(
    description: dict[str, Any], changes: list[tuple[float, int]], cut: float | None, is_corrupted: bool
) -> None:
    metadata = json.dumps(VALID[CLASSIFIER_KEY] | description, default=str)
    state = {name.removeprefix(STATE_PREFIX): value for name, value in VALID["state_dict"].items()}
    data = save(state, metadata={METADATA_KEY: metadata})
    Path("x.safetensors").write_bytes(corrupted(data, changes, cut) if is_corrupted else data)
    with contextlib.suppress(UserError):
        open_student("x.safetensors").logits(np.zeros((1, 3, 4, 4), dtype=np.float32))


def image_files() -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8))
    files = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF"):
        buffer = io.BytesIO()
        image.save(buffer, format=kind)
        files.append(buffer.getvalue())
    return files


@reproducible
@given(st.sampled_from(image_files()), byte_changes, cuts)
@pytest.mark.filterwarnings("ignore")
def test_a_corrupted_image(data: bytes, changes: list[tuple[float, int]], cut: float | None) -> None:
    Path("x.png").write_bytes(corrupted(data, changes, cut))
    with contextlib.suppress(UserError):
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
@given(byte_changes, cuts)
def test_corrupted_predictions_are_read_as_none(changes: list[tuple[float, int]], cut: float | None) -> None:
    Path("x.npz").write_bytes(corrupted(predictions(), changes, cut))
    read = Predictions.read("x.npz")
    assert read is None or len(read.logits) == len(read.labels) == len(read.keys)
