"""After a power loss at any moment, a training resumes to the same result."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.pipeline import run_experiment
from kd.settings import resolve
from tests.conftest import MakeFolder

FLAGS = (
    "--image_size 16 --batch_size 8 --accelerator cpu --student_model linear --baseline --max_epochs 2 "
    "--checkpoint_every 2 --name run --resume"
)
RUN = Path("logs/run/baseline/version_0")

Operation = tuple[str, ...]
State = dict[str, bytes]


class Recorder:
    """Records the writes, renames, links and removals below a folder, and when they are flushed to disk."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations: list[Operation] = []
        self.contents: list[bytes] = []
        self._root = root
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)
        for name in ("mkdir", "link", "replace", "rename", "unlink", "remove", "rmdir"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _relative(self, path: Any) -> str | None:
        absolute = Path(os.fsdecode(path)).absolute()
        return str(absolute.relative_to(self._root)) if absolute.is_relative_to(self._root) else None

    def _sync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        relative = self._relative(path)
        if relative is None:
            return
        if path.is_dir():
            self.operations.append(("sync", relative))
        else:
            self.contents.append(path.read_bytes())
            self.operations.append(("data", relative, str(len(self.contents) - 1)))

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            result = function(*paths, **options)
            relative = [self._relative(path) for path in paths if isinstance(path, str | os.PathLike)]
            if relative and None not in relative:
                self.operations.append((name, *map(str, relative)))
            return result

        return call


class Disk:
    """Which files survive a power loss: those whose content and whose entries in folders were flushed."""

    def __init__(self, contents: list[bytes]) -> None:
        self.entries: dict[str, int | None] = {}
        self._contents = contents
        self._synced: dict[str, int] = {}
        self._pending: list[Operation] = []

    def apply(self, operation: Operation) -> None:
        """Take one more operation into account."""
        kind, path, *rest = operation
        if kind == "data":
            self._synced[path] = int(rest[0])
        elif kind == "sync":
            mine = [each for each in self._pending if str(Path(each[-1]).parent) == path]
            self._pending = [each for each in self._pending if each not in mine]
            for each in mine:
                self._change(self.entries, each)
        else:
            if kind in ("replace", "rename", "link") and path in self._synced:
                self._synced[rest[0]] = self._synced[path]
            self._pending.append((kind, path, *rest, str(self._synced.get(path, -1)), operation[-1]))

    def states(self) -> Iterator[State]:
        """Yield what may be found after a power loss now: any subset of the operations not flushed may be done."""
        for length in range(len(self._pending) + 1):
            for done in itertools.combinations(self._pending, length):
                entries = dict(self.entries)
                for operation in done:
                    self._change(entries, operation)
                yield {
                    path: b"" if index == -1 else self._contents[index]
                    for path, index in entries.items()
                    if index is not None and self._is_reachable(path, entries)
                }

    def _change(self, entries: dict[str, int | None], operation: Operation) -> None:
        kind, path, *_, index, target = operation
        if kind == "mkdir":
            entries[path] = None
        elif kind in ("unlink", "remove", "rmdir"):
            entries.pop(path, None)
        else:
            if kind != "link":
                entries.pop(path, None)
            # A file that was renamed or linked before its content was flushed may be empty.
            entries[target] = int(index)

    @staticmethod
    def _is_reachable(path: str, entries: dict[str, int | None]) -> bool:
        return all(str(folder) in entries for folder in Path(path).parents if str(folder) != ".")


def result(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "metrics.json").read_text())
    states = {
        name: torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    }
    figures = {name: record[name] for name in ("history", "steps", "val_acc", "best_val_acc")}
    return {"states": states, "figures": figures}


@pytest.mark.slow
def test_a_training_resumes_from_whatever_a_power_loss_leaves(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve(["--data_dir", str(make_folder(train=12, val=4)), *FLAGS.split()]).settings
    with monkeypatch.context() as patches:
        recorder = Recorder(Path.cwd(), patches)
        run_experiment(settings)
    expected = result(RUN)
    shutil.rmtree("logs")
    disk, states = Disk(recorder.contents), dict[int, State]()
    for operation in [*recorder.operations, ("sync", ".")]:
        disk.apply(operation)
        for state in disk.states():
            # Files that are no part of the run itself are written from it.
            kept = {path: content for path, content in state.items() if path.startswith(str(RUN))}
            states.setdefault(hash(frozenset(kept.items())), kept)
    # None, and at least one for each of two files, five checkpoints and two records.
    assert len(states) > 10
    for state in states.values():
        for path, content in state.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
        run_experiment(settings)
        (finished,) = Path("logs/run/baseline").glob("version_*/metrics.json")
        torch.testing.assert_close(result(finished.parent), expected, rtol=0, atol=0)
        shutil.rmtree("logs")
