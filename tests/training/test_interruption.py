"""Signals that end a training, and exits that Lightning raises after one."""

import os
import signal
import subprocess
import sys

import pytest

from kd.errors import Interrupted
from kd.training import Interruption


def exit_as_lightning_does(interruption: Interruption) -> None:
    with interruption.listening(), interruption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit


def test_an_exit_after_a_signal_is_an_interruption() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as stopped:
        exit_as_lightning_does(Interruption())
    assert stopped.value.received == signal.SIGTERM


def test_an_exit_without_a_signal_is_not_changed() -> None:
    with pytest.raises(SystemExit), Interruption().deferred():
        raise SystemExit(3)


WAITS_FOR_EVER = """
import os, signal, threading, time
from kd.data import WatchedLoader
from kd.training import Interruption, resume

class Stuck:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(600)

resume._WAIT_SECONDS = 1
interruption = Interruption()
with interruption.listening(), interruption.deferred():
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    next(iter(WatchedLoader(Stuck(), num_workers=1)))
"""


def test_a_signal_ends_a_run_whose_loading_processes_are_stuck() -> None:
    # Status 143, and no process of its own that keeps the pipes open.
    command = [sys.executable, "-c", WAITS_FOR_EVER]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr.endswith("stopped by SIGTERM while waiting for images; the last checkpoint is intact\n")
