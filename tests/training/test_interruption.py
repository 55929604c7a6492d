"""Being asked to stop, whoever answers first."""

import os
import signal

import pytest

from kd.errors import Interrupted
from kd.training import Interruption


def leave_as_lightning_does(interruption: Interruption) -> None:
    """Be asked to stop in a validation, where Lightning answers first."""
    with interruption.listening(), interruption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit


def test_an_exit_that_a_signal_brought_about_is_no_success() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as stopped:
        leave_as_lightning_does(Interruption())
    assert stopped.value.received == signal.SIGTERM


def test_another_exit_stays_one() -> None:
    with pytest.raises(SystemExit), Interruption().deferred():
        raise SystemExit(3)
