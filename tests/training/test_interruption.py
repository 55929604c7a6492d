"""Exits that Lightning raises after a signal."""

import os
import signal

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
