"""Signals that ask a training to stop: it saves first, and the same command goes on."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

from faceembed import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Pre-emption and `kill`; Ctrl-C; what Slurm sends ahead of time with `--signal=USR1@120`."""


class Stopped(Exception):
    """A training was asked to stop, has saved, and its run is not finished.

    Attributes:
      status: what the process should exit with: 0, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Interrupts:
    """Takes note of `SIGNALS` while it is entered; asked after each update whether to stop.

    Only the main thread may handle signals in Python: entered in another, it leaves them as they are. A second Ctrl-C
    stops at once, as Ctrl-C does elsewhere.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._before: dict[int, Any] = {}
        self._agreement: processes.Agreement | None = None  # of several processes: one is told, and all stop

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
        if jax.process_count() > 1:
            self._agreement = processes.Agreement()  # it handles SIGTERM from here on
        for number in self._before:
            if not (self._agreement and number == signal.SIGTERM):
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._agreement:
            self._agreement.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        again = ""
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            again = "; Ctrl-C again stops at once"
        # Not print: a handler may come in the middle of one, which does not bear it.
        os.write(2, f"\n{signal.Signals(number).name}: saving after this update{again}\n".encode())
        if self._agreement:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after an update. The same answer in every process, and none waits for another.

        Args:
          step: updates done; to be asked after every one.
        """
        if self._agreement:
            return self._agreement.reached(step)
        return self._noted is not None

    def stopped(self, step: int) -> Stopped:
        """What to raise when all is saved."""
        by = signal.Signals(self._noted or signal.SIGTERM)
        status = 130 if by == signal.SIGINT else 0
        return Stopped(f"stopped by {by.name} at step {step}; saved; the same command goes on", status)
