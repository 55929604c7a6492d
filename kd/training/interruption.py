"""Being asked to stop: by a person (Ctrl-C), or by whoever the machine belongs to."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kd.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether this process was asked to stop.

    While a network trains, the request waits for the end of the step, where the training saves itself; at any other
    time, and when it is made twice, it ends the program at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._can_wait = False
        self._is_listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the block, in the main thread; elsewhere Python lets nobody listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self._receive) for one in _SIGNALS}
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            for one, handler in before.items():
                signal.signal(one, handler)

    def take_over(self) -> None:
        """Listen alone from now on: Lightning would leave a validation at once, with nothing saved."""
        if self._is_listening:
            for one in _SIGNALS:
                signal.signal(one, self._receive)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a request wait for the training inside the block, which looks at ``received``.

        Raises:
            Interrupted: If Lightning leaves first, as it does before the first step: it answers SIGTERM with an exit
                that says nothing and looks like success.
        """
        self._can_wait = True
        try:
            yield
        except SystemExit:
            if self.received is None:
                raise
            self.stop(None)
        finally:
            self._can_wait = False

    def stop(self, where: str | None) -> None:
        """End the program now that everything is saved, or nothing has to be.

        Args:
            where: The checkpoint to go on from, or ``None``.

        Raises:
            Interrupted: Always.
        """
        received = self.received or signal.SIGTERM
        words = "nothing of this step had to be saved" if where is None else f"saved in {where}"
        raise Interrupted(f"stopped by {received.name}: {words}", received=int(received))

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a handler's signature)
        is_second = self.received is not None
        self.received = signal.Signals(number)
        if is_second or not self._can_wait:
            self.stop(None)
