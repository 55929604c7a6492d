"""Being asked to stop, whoever answers first."""

import os
import signal

import pytest

from kd.errors import Interrupted
from kd.training import Interruption


def test_an_exit_that_a_signal_brought_about_is_no_success() -> None:
    interruption = Interruption()
    with (
        pytest.raises(Interrupted, match="stopped by SIGTERM") as stopped,
        interruption.listening(),
        interruption.waiting(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        # As Lightning does it in a validation.
        raise SystemExit
    assert stopped.value.received == signal.SIGTERM


def test_another_exit_stays_one() -> None:
    with pytest.raises(SystemExit), Interruption().waiting():
        raise SystemExit(3)
