"""Kill an experiment repeatedly, resume it after each kill, and compare the results with an uninterrupted experiment.

``uv run python -m benchmarks.kills --kills 30 --seed 0`` trains a teacher, a student on labels only and a distilled
student on the digits twice: once without interruption, once with SIGKILLs at random moments. Weights, optimizer states,
metrics, predictions and TensorBoard scalars must be bit-identical.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.console import make_console

ROOT = Path(__file__).parents[1]

EXPERIMENT = (
    *("--train_teacher", "--baseline", "--distill", "--dataset", "digits", "--image_size", "16", "--batch_size", "32"),
    *("--teacher_model", "convnet(widths=[16,32])", "--student_model", "convnet(widths=[8,8])", "--ema", "0.99"),
    *("--augment", "rotate", "--loss", "ce=0.5", "kl(temperature=linear(4, 2))=0.5", "--name", "digits"),
    *("--accelerator", "cpu", "--checkpoint_every", "7"),
)

# Durations, paths, and Lightning's counts of restarts differ legitimately.
_IGNORED_KEYS = {"seconds", "images_per_second", "checkpoint", "folder", "validation", "teacher_predictions"}
_IGNORED_KEYS |= {"teacher_checkpoints", "loops"}
_IGNORED_KEY_PARTS = ("path", "kth_", "best_k", "current_score", "Throughput")


@dataclass(frozen=True)
class Settings:
    """Number and timing of the kills.

    Args:
        kills: Number of SIGKILLs after a checkpoint.
        anytime: Number of further SIGKILLs at any moment from the start of the program to its end, so also while caches
            are built, networks measured and reports written; a finished experiment is compared and begun anew.
        seed: Random seed of their timing.
        epochs: Epochs per training; high enough that the experiment is still running at the last kill.
        max_checkpoints: Largest number of checkpoints written between two kills.
        workers: Number of data-loading workers.
    """

    kills: int = 30
    anytime: int = 0
    seed: int = 0
    epochs: int = 12
    max_checkpoints: int = 14
    workers: int = 0


def run_to_completion(root: Path, *flags: str) -> None:
    """Run or resume the experiment without interruption."""
    subprocess.run(_command(root, *flags), check=True, stdout=subprocess.DEVNULL, env=_environment(root), cwd=root)  # noqa: S603 (own command)


def run_and_kill(root: Path, *flags: str, checkpoints: int, seconds: float) -> str:
    """Resume the experiment and kill it.

    Args:
        root: Folder of the experiment.
        flags: Additional flags.
        checkpoints: Checkpoints to wait for before the kill, so that every run makes progress.
        seconds: Further time before the kill.

    Returns:
        The phase that was killed, such as ``teacher``, or ``finished`` if the experiment ended first.
    """
    command = _command(root, "--resume", *flags)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment(root), cwd=root) as process:  # noqa: S603 (own command)
        if process.stdout is not None:
            process.stdout.readline()
        written, latest = 0, _last_checkpoint_time(root)
        while process.poll() is None and written < checkpoints:
            if (now := _last_checkpoint_time(root)) != latest:
                written, latest = written + 1, now
            time.sleep(0.002)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    if process.returncode == 0:
        return "finished"
    phases = ("distilled", "baseline", "teacher")
    return next((phase for phase in phases if (root / "logs" / "digits" / phase).is_dir()), "startup")


def kill_anytime(root: Path, *flags: str, seconds: float) -> bool:
    """Resume the experiment and kill it after some seconds; return whether it was killed before its end."""
    command = _command(root, "--resume", *flags)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environment(root), cwd=root) as process:  # noqa: S603 (own command)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    return process.returncode != 0


def _last_checkpoint_time(root: Path) -> int:
    """Return when any phase last wrote a checkpoint, in nanoseconds; 0 if none did."""
    files = (root / "logs").glob("*/*/version_0/checkpoints/last.ckpt")
    return max((path.stat().st_mtime_ns for path in files), default=0)


def differences(first: Path, second: Path) -> list[str]:
    """Return the differences between two experiments, ignoring durations and paths."""
    found: list[str] = []
    for phase in ("teacher", "baseline", "distilled"):
        folders = [root / "logs" / "digits" / phase for root in (first, second)]
        versions = [len(list(folder.iterdir())) for folder in folders]
        if versions != [1, 1]:
            found.append(f"{phase}: versions {versions}")
        one, other = (_results(folder / "version_0") for folder in folders)
        found += _unequal(one, other, phase)
    return found


def _results(version: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        f"{name}.ckpt": torch.load(version / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for name in ("best", "last")
    }
    results["metrics.json"] = json.loads((version / "metrics.json").read_text(encoding="utf-8"))
    results["validation.npz"] = dict(np.load(version / "validation.npz"))
    events = EventAccumulator(str(version), size_guidance={"scalars": 0})
    events.Reload()
    results["TensorBoard"] = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    return results


def _command(root: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "experiment.py"), *EXPERIMENT, "--default_root_dir", str(root / "logs"), *flags]


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"KD_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT)}


def _is_compared(key: str) -> bool:
    return key not in _IGNORED_KEYS and not any(part in key for part in _IGNORED_KEY_PARTS)


def _unequal(first: Any, second: Any, path: str = "") -> list[str]:  # noqa: ANN401 (nested results)
    """Return the paths at which two nested results differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys, other_keys = ({key for key in value if _is_compared(str(key))} for value in (first, second))
        if keys != other_keys:
            return [f"{path}: {sorted(map(str, keys ^ other_keys))}"]
        return [line for key in first if key in keys for line in _unequal(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [line for index, pair in pairs for line in _unequal(*pair, f"{path}/{index}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    if isinstance(first, np.ndarray):
        return [] if np.array_equal(first, second) else [path]
    return [] if first == second else [f"{path}: {first} and {second}"]


def main() -> int:
    """Compare the two experiments; return the exit status."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.kills", use_underscores=True)
    console = make_console()
    rng = random.Random(settings.seed)  # noqa: S311 (not for cryptography)
    flags = ("--max_epochs", str(settings.epochs), "--num_workers", str(settings.workers))
    with tempfile.TemporaryDirectory() as folder:
        uninterrupted, killed = Path(folder) / "uninterrupted", Path(folder) / "killed"
        uninterrupted.mkdir()
        killed.mkdir()
        start = time.perf_counter()
        run_to_completion(uninterrupted, *flags)
        duration = time.perf_counter() - start
        console.print(f"uninterrupted: {duration:.0f} s")
        phases = Counter(
            run_and_kill(
                killed, *flags, checkpoints=rng.randint(0, settings.max_checkpoints), seconds=rng.uniform(0, 0.1)
            )
            for _ in range(settings.kills)
        )
        console.print(f"kills by phase: {dict(phases)}")
        run_to_completion(killed, "--resume", *flags)
        found, finished = differences(uninterrupted, killed), 1
        console.print(f"after kills at checkpoints: {len(found)} differences")
        for number in range(settings.anytime):
            root = Path(folder) / f"anytime-{finished}"
            root.mkdir(exist_ok=True)
            killed_early = kill_anytime(root, *flags, seconds=rng.uniform(0, duration))
            if not killed_early or number == settings.anytime - 1:
                run_to_completion(root, "--resume", *flags)
                found += differences(uninterrupted, root)
                finished += 1
        console.print(f"compared after the kills: {finished} experiments")
    for line in found:
        console.print(line)
    console.print(f"{len(found)} differences" if found else "bit-identical")
    return int(bool(found) or "finished" in phases)


if __name__ == "__main__":
    sys.exit(main())
